"""Keep zeros: what pruning set to zero stays zero while the rest is trained.

Source: Han et al. 2015, arXiv:1506.02626 (retraining with the mask held); Zhu & Gupta 2017, arXiv:1710.01878.
Idea:   w_used = w * m, m = 1 where the weight was not zero before training. The gradient of what is masked is zero, and
        at the end the zeros are exact. With qat after it, the code of zero stays zero where the grid has one.
Shapes: m of the weight's shape, one byte each.
Cost:   one product per weight and step.
Fails:  BadInput when no weight has as many zeros as `least`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from wherry.errors import BadInput
from wherry.objective import Step


@dataclass(frozen=True, kw_only=True)
class KeepZeros(Step):
    """least: share of zeros from which on a weight counts as pruned."""

    least: float = 0.01

    @property
    def method(self) -> str:
        """Its name on the shelf."""
        return "keep_zeros"

    def prepare(self, module: torch.nn.Module, checkpoint: Any = None) -> None:
        """Hold the masks of all weights of two axes or more that have zeros enough."""
        held = 0
        for layer in list(module.modules()):
            w = layer._parameters.get("weight")
            if w is not None and w.ndim > 1 and float((w == 0).float().mean()) >= self.least:
                parametrize.register_parametrization(layer, "weight", Mask(w), unsafe=True)
                held += 1
        if not held:
            raise BadInput(f"keep_zeros: no weight has {self.least:.0%} zeros or more: prune first, or leave it out")

    def finish(self, module: torch.nn.Module, checkpoint: Any = None) -> None:
        """Plain weights again, zeros in place."""
        for layer in list(module.modules()):
            if parametrize.is_parametrized(layer, "weight"):
                steps = layer.parametrizations["weight"]  # type: ignore[index]
                if any(isinstance(step, Mask) for step in steps):
                    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class Mask(torch.nn.Module):
    """The parametrization: w to w * mask."""

    mask: torch.Tensor

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", w.detach() != 0)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """The weight with its zeros."""
        return torch.where(self.mask, w, 0.0)  # a product would leave -0.0
