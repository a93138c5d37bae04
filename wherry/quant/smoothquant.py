"""SmoothQuant: move the outliers of activations into the weights, so that both fit 8 bits.

Source: Xiao et al. 2022, arXiv:2211.10438, equation 4.
Idea:   (x / s) (s w) is the same product. s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) halves (for alpha 1/2) the
        outliers of column j in decades; 1/s goes into the norm or layer before.
Shapes: ws [n_i, k] each, of one shared input; x [tokens, k]; s [k].
Cost:   one pass over the calibration tokens.
Fails:  never: a layer whose input nothing can scale is left, and says so.
Differs: any layer before that passes the probe takes the scales, not norms alone.
"""

from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.recipe import Pass


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Pass):
    """alpha: 0 leaves the activations as they are, 1 flattens them. A solver must come after it."""

    alpha: float = 0.5
    merge = "max"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"smoothquant: alpha={self.alpha:g} is not in 0 to 1; 0.5 is the usual one")

    def observe(self, stat: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """The largest |x| of each input [k] so far."""
        most = x.float().abs().amax(0)
        return most if stat is None else torch.maximum(stat, most)

    def smooth(self, ws: list[torch.Tensor], stat: torch.Tensor) -> torch.Tensor:
        """Scales s [k] of the columns of all ws [n_i, k], which share their input."""
        w = torch.cat([w.float() for w in ws]).abs().amax(0)
        s = stat**self.alpha / w.clamp(min=1e-5) ** (1 - self.alpha)
        return torch.where((stat > 0) & (w > 0), s, torch.ones_like(s)).clamp(min=1e-5)
