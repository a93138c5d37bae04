"""HQQ: fit each group's scale and zero to the weights but for a few outliers, without data.

Source: Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models (mobiusml.github.io/hqq_blog).
Idea:   minimise ||W - s (Q - z)||_p with p < 1, which forgives outliers. Half-quadratic splitting: E takes the large
        errors by the generalised soft threshold, shrink(e) = sign(e) relu(|e| - |e|^(p-1) / beta); then s and z are
        least squares on W - E; beta grows by kappa.
Shapes: w, E, Q [n, g, size]; s, z [n, g].
Cost:   `iters` roundings of w; no data.
Fails:  never: a step that does not lessen the p-norm error of a group is not taken there.
Differs: the paper moves only a float zero; here zeros are integers, as the formats hold them, and the scale moves too.
        Tables (NF4, fp4, signs) have no zero; a k-quant's minimum is a float, and its steps are taken by super-block.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from wherry.errors import BadInput
from wherry.ops import grid, tiles
from wherry.ops.kquant import SUPER
from wherry.recipe import Pass
from wherry.scheme import QTensor, Scheme


@dataclass(frozen=True, kw_only=True)
class HQQ(Pass):
    """p: norm of the error. beta, kappa: strength of the split, and its growth. iters: steps."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iters: int = 20
    one_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.p < 2 or self.beta <= 0 or self.kappa < 1 or self.iters < 1:
            raise BadInput(f"hqq: p={self.p:g}, beta={self.beta:g}, kappa={self.kappa:g}: use 0.7, 10 and 1.01")

    def solve(self, w: torch.Tensor, stat: None = None, notes: list[str] | None = None) -> QTensor:
        """Codes of w [..., n, k] by its own values alone."""
        return grid.encode(w, self.scheme, *self.fitted(w, self.scheme))

    def fitted(self, w: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zeros [..., n, g] of w [..., n, k]."""
        if scheme.tiled:
            scale, zero = tiles.fit(lambda each, one, _: self.fitted(each, one), w, scheme)
            return scale, zero
        rounding = self.rounding
        scale, zero = grid.fit(w, scheme, rounding)
        minimum = zero is not None and scheme.minimum != "code"  # a k-quant's, which is a float
        W, beta = grid.grouped(w.float(), scheme), self.beta
        best = torch.full_like(scale, torch.inf)
        kept, kept_zero = scale, zero
        for _ in range(self.iters + 1):
            q = grid.encode(w, scheme, scale, zero)
            step = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
            v = q.decode().float().unflatten(-1, W.shape[-2:])
            unit = (W - v) / step  # errors in steps: beta means one thing
            size = unit.abs().clamp(min=1e-6)
            power = size.pow(self.p)
            better = together(power.sum(-1) * step.squeeze(-1).pow(self.p), scheme) < together(best, scheme)
            best = torch.where(better, power.sum(-1) * step.squeeze(-1).pow(self.p), best)
            kept = torch.where(better, scale, kept)
            if zero is not None and kept_zero is not None:
                kept_zero = torch.where(better, zero, kept_zero)
            E = unit.sign() * (size - power / size / beta).clamp(min=0)
            target = W - E * step
            d = v / step
            if zero is not None and minimum:
                d = d + zero.unsqueeze(-1) / step
                zero = (d * step - target).mean(-1).clamp(min=0)
                target = target + zero.unsqueeze(-1)
            elif zero is not None:
                code = q.code.unflatten(-1, W.shape[-2:]).float()
                zero = (code - target / step).mean(-1).round().clamp(scheme.qmin, scheme.qmax).to(torch.int8)
                d = code - zero.float().unsqueeze(-1)
            fitted = (d * target).sum(-1) / d.square().sum(-1).clamp(min=1e-12)
            scale = torch.where((fitted > scale / 2) & (fitted < scale * 2), fitted, scale)
            if rounding is not None:
                scale, zero = grid.settled(scale, zero, scheme, rounding)
            beta *= self.kappa
        return kept, kept_zero


def together(error: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Errors [..., n, g], each the sum over the groups whose scales hang together: a super-block, or NVFP4's tensor."""
    if scheme.scale == "float8_e4m3fn":
        return error.sum().expand_as(error)
    if not scheme.nested:
        return error
    blocks = error.unflatten(-1, (-1, SUPER // (scheme.group_size or 1)))
    return blocks.sum(-1, keepdim=True).expand_as(blocks).flatten(-2)
