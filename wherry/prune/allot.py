"""Allot: how many zeros each layer takes, more where they cost least, under one share over all layers.

Source: the diagonal Fisher information for pruning: Theis et al. 2018, arXiv:1801.05787; after LeCun et al. 1989,
    Optimal Brain Damage. The budget is shared out by an exact solver, as in `mixed`.
Idea:   zeroing w_i raises the loss by about 1/2 F_i w_i^2, with F_i = E[g_i^2] over labels that the model itself draws.
        For each layer the cost of some shares is summed up over its smallest weights ("fisher"), or measured, one layer
        at a time ("kl"). Then sum of cost is least under sum of what stays <= (1 - sparsity) of all weights.
Shapes: F, w [n, k]; cost [layers, shares].
Cost:   fisher: one backward pass over the windows, the model and its gradients in memory. kl: layers * levels forward
        passes over one batch.
Fails:  Unsupported on graphs (there magnitude:scope=global shares by one threshold); BadInput for shares outside of 0
        to 1. A step that prunes must come after it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from wherry.errors import BadInput
from wherry.gait import Pass
from wherry.ops import sparse
from wherry.ops.allocate import allocate


@dataclass(frozen=True, kw_only=True)
class Allot(Pass):
    """spread: a layer takes the pruner's sparsity, more or less by at most so much. levels: shares to choose from."""

    spread: float = 0.2
    levels: int = 9
    sensitivity: Literal["fisher", "kl"] = "fisher"

    def __post_init__(self) -> None:
        if not 0 < self.spread < 1 or self.levels < 2:
            raise BadInput(f"allot: spread={self.spread:g}, levels={self.levels}: like 0.2, and 2 levels or more")

    def choices(self, sparsity: float) -> list[float]:
        """The shares that a layer may take. Raises BadInput where one would be 0 or less, or all."""
        low, high = sparsity - self.spread, sparsity + self.spread
        if not 0 < low < high < 1:
            most = min(sparsity, 1 - sparsity)
            raise BadInput(f"allot: spread={self.spread:g} around {sparsity:g} leaves 0 to 1; take less than {most:g}")
        return [float(f"{s:.6g}") for s in np.linspace(low, high, self.levels)]

    def rounded(self, w: torch.Tensor, sparsity: float) -> torch.Tensor:
        """The weight [n, k] without its smallest values: what stands for whatever pruner comes after."""
        return torch.where(sparse.keep(w.abs(), sparsity, rows=True), w, 0.0)

    def allot(self, cost: np.ndarray, size: np.ndarray, sparsity: float) -> np.ndarray:
        """Index of the share for each layer; cost [layers, shares], size [layers]: weights of each."""
        kept = size[:, None] * (1 - np.array(self.choices(sparsity)))
        return allocate(cost, kept, float((1 - sparsity) * size.sum()) * (1 + 1e-9))
