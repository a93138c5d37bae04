"""Magnitude: zero the weights of smallest absolute value; the baseline of every other method.

Source: Han et al. 2015, arXiv:1506.02626; Zhu & Gupta 2017, arXiv:1710.01878 for one threshold over all layers.
Idea:   |w| is what removing w changes at most per unit of input. scope=layer and scope=row take the same share of each
        layer or output; scope=global one threshold for all weights, so that layers of small weights lose more;
        threshold=t takes every |w| < t, whatever share that is.
Shapes: w [n, k]; a convolution's k = channels * kernel.
Cost:   O(n k log(n k)), one tensor in memory, no data; global and threshold read the weights once or twice before.
Fails:  BadInput where a threshold leaves a layer nothing or takes nothing at all: `threshold` when the plan is made,
        which reads the weights then, scope=global before any weight is written.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from wherry.errors import BadInput
from wherry.gait import Pruner
from wherry.ops import sparse


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """scope: what a share is taken of: layer, row or global. threshold: in place of sparsity, when above 0."""

    scope: Literal["layer", "row", "global"] = "layer"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < math.inf:
            raise BadInput(f"magnitude: threshold={self.threshold:g} is not a size of weights above 0")
        if (self.scope == "global" or self.threshold) and (self.pattern or self.block):
            raise BadInput("magnitude: a threshold goes by single weights; leave pattern= and block= out")

    @property
    def rows(self) -> bool:
        """Whether each output loses the same share."""
        return self.scope == "row"

    @property
    def by_itself(self) -> bool:
        """Whether one threshold, or a pattern, says how much each weight loses."""
        return super().by_itself or bool(self.threshold) or self.scope == "global"

    def foresee(self, plan: Any) -> None:
        """Read the weights once for a threshold that leaves a layer nothing, or takes nothing."""
        if self.threshold:
            self.share(plan, [], lambda *_: None)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the share is one weight or more; where one threshold is for all, the weights decide."""
        return bool(self.threshold) or self.scope == "global" or super().takes(shape)

    def planned(self, shape: tuple[int, ...]) -> float:
        """Share of a weight that becomes zero; 0 where the weights decide."""
        found = super().planned(shape)
        return 0.0 if self.threshold or self.scope == "global" else found

    def wording(self, sparsity: float) -> str:
        """What the plan says of a weight."""
        if self.threshold:
            return f"every |w| < {self.threshold:g} is made zero"
        if self.scope == "global":
            return f"its part of {100 * self.sparsity:.4g}% zeros over all layers, by one threshold"
        return super().wording(sparsity)

    def share(self, plan: Any, batches: Any, progress: Any) -> dict[str, float]:
        """The share of each weight that one threshold takes. Raises BadInput where that is all of a layer, or none."""
        if not self.threshold and self.scope != "global":
            return {}
        names = [row.name for row in plan.rows if row.step >= 0]
        progress(0, 1, "threshold over all layers")
        t = self.threshold or sparse.threshold(lambda: map(plan.checkpoint.weight, names), self.sparsity)
        found = {}
        for name in names:
            w = plan.checkpoint.weight(name).abs()
            below = int((w < t).sum())
            if below == w.numel():
                raise BadInput(
                    f"magnitude: the threshold {t:.4g} leaves nothing of {name}, whose largest weight is "
                    f"{float(w.max()):.4g}.\nTake less, scope=layer, or leave the layer out with ignore="
                )
            found[name] = below / w.numel()
        if not any(found.values()):
            raise BadInput(f"magnitude: threshold={t:g} is below every weight: it takes nothing")
        return found

    def prune(self, w: torch.Tensor, stat: Any = None, notes: list[str] | None = None) -> torch.Tensor:
        """W [n, k] with its smallest weights zero."""
        if self.threshold:
            return w * (w.abs() >= self.threshold)
        return w * self.keep(w.float().abs())
