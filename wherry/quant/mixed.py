"""Mixed: give each weight the scheme that costs least where it hurts least, under a budget of bits or bytes.

Source: Dong et al. 2019 (HAWQ, arXiv:1905.03696) for sensitivity times squared error; Kim et al. 2023 (SqueezeLLM,
    arXiv:2306.07629) for the diagonal Fisher information in its place.
Idea:   near the trained weights the loss grows by 1/2 sum_i F_i d_i^2, with F_i = E[g_i^2] over gradients of the
        log-likelihood of labels that the model itself draws, and d what rounding to a scheme does to the weight. Or
        ("kl") round one weight alone and measure. Then an exact solver chooses (ops/allocate.py). Bytes are those of
        the files that the plan writes, each of which must keep the budget (budget.py); else of the checkpoint.
Shapes: F, d [n, k]; cost [weights, schemes].
Cost:   fisher: one backward pass over the windows, the model and its gradients in memory. kl: weights * schemes
        forward passes over one batch.
Fails:  BadInput, when the plan is made, where the smallest schemes do not fit the budget.
Differs: rounding stands for whatever solver comes after.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from wherry.budget import Budget, in_bytes
from wherry.errors import BadInput
from wherry.ops import grid
from wherry.ops.allocate import allocate
from wherry.recipe import Pass
from wherry.scheme import PRESETS, Scheme


@dataclass(frozen=True, kw_only=True)
class Mixed(Pass):
    """bits: most bits per weight over all weights that it wants, scales and zeros included. A solver must come after.

    size: in place of bits, most bytes of the model's file, like 100MB, all that it holds included.
    schemes: spellings to choose from, `;` between them; they take the group size of the solver's scheme, or, where that
        has none to give (rows, NVFP4, k-quants), group_size of this step, else their usual one.
    """

    schemes: tuple[str, ...] = ("W2A16", "W3A16", "W4A16", "W8A16")
    bits: float = 3.5
    size: str = ""
    sensitivity: Literal["fisher", "kl"] = "fisher"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 32 or not self.schemes:
            raise BadInput(f"mixed: bits={self.bits:g} is not a number of bits per weight; 3.5 is the default")
        if self.size and self.bits != Mixed.bits:
            raise BadInput(f"mixed: bits={self.bits:g} and size={self.size} are two budgets: give one of them")
        _ = self.size and in_bytes(self.size)
        for text in self.schemes:
            Scheme.parse(text)

    def choices(self, scheme: Scheme) -> list[Scheme]:
        """The schemes to choose from, in the groups of the solver's."""
        found = [replace(Scheme.parse(text), rank=scheme.rank) for text in self.schemes]
        if scheme.tiled:
            return [s if s.fixed else replace(s, grain=scheme.grain) for s in found]
        size = None if scheme.fixed else scheme.group_size
        size = self.scheme.group_size if size is None and self.scheme != PRESETS["W4A16"] else size
        return [s if s.fixed or size is None else s.with_group(size) for s in found]

    def rounded(self, w: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """The weight as plain rounding in searched ranges leaves it."""
        rounding = grid.stored(scheme, grid.portable if self.portable else None)
        return grid.encode(w, scheme, *grid.search(w, scheme, rounding)).decode()

    def most(self, counted: int, rest: float) -> float:
        """Bytes for weights of `counted` parameters in all, beside `rest` bytes of all else in the file."""
        return in_bytes(self.size) - rest if self.size else self.bits * counted / 8

    def short(self, budget: Budget) -> str:
        """What is wrong with a budget that the smallest schemes miss, and what would do."""
        if self.size:
            asked, least = f"size={self.size}", f"{math.ceil((budget.least + budget.rest) / 1e4) / 100:.2f}MB"
        else:
            asked, least = f"bits={self.bits:g}", f"{math.ceil(8e3 * budget.least / budget.counted) / 1e3:g}"
        return f"{asked}: the smallest schemes take {least} in {budget.format}; raise it to that, or add smaller ones"

    def assign(self, cost: np.ndarray, budgets: list[Budget]) -> np.ndarray:
        """Index of the scheme for each weight, of least cost [weights, schemes] in sum within every budget."""
        return allocate(cost, np.stack([budget.sizes for budget in budgets]), [budget.most for budget in budgets])
