"""L2: the regulariser lambda R(f) of the objective min E[L(f(x), y)] + lambda R(f).

Source: Tikhonov 1963; Tibshirani 1996 (lasso) for power 1, which drives weights to zero.
Idea:   R(f) = sum of |w|^p / p over all elements of the weights that are trained. Unlike an optimizer's weight decay it
        is a part of the loss, so gradients of AdamW are scaled with it.
Shapes: any w.
Cost:   one pass over the weights.
Fails:  BadInput for another power than 1 and 2.
"""

from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.objective import Step


@dataclass(frozen=True, kw_only=True)
class L2(Step):
    """weight: lambda. power: 2, or 1 for the lasso."""

    weight: float = 1e-4
    power: int = 2

    def __post_init__(self) -> None:
        if self.power not in (1, 2) or self.weight < 0:
            raise BadInput(f"l2: power={self.power}, weight={self.weight:g}: power 1 or 2, weight not negative")

    def penalty(self, w: torch.Tensor) -> torch.Tensor:
        """R of one weight: a scalar."""
        return w.float().abs().sum() if self.power == 1 else w.float().square().sum() / 2
