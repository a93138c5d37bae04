"""HQQ: fit each group's scale and zero to the weights but for a few outliers, without data.

Source: Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models (mobiusml.github.io/hqq_blog).
Idea:   minimise ||W - s (Q - z)||_p with p < 1, which forgives outliers. Half-quadratic splitting: E takes the large
        errors by the generalised soft threshold, shrink(e) = sign(e) relu(|e| - |e|^(p-1) / beta); then s and z are
        least squares on W - E; beta grows by kappa.
Shapes: w, E, Q [n, g, size]; s, z [n, g].
Cost:   `iters` roundings of w; no data.
Fails:  never: a step that does not lessen the p-norm error of a group is not taken there.
Differs: the paper moves only a float zero; here zeros are integers, as the formats hold them, and the scale moves too.
"""

from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.ops import grid
from wherry.recipe import Pass
from wherry.scheme import QTensor


@dataclass(frozen=True, kw_only=True)
class HQQ(Pass):
    """p: norm of the error. beta, kappa: strength of the split, and its growth. iters: steps."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iters: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p < 2 or self.beta <= 0 or self.kappa < 1 or self.iters < 1:
            raise BadInput(f"hqq: p={self.p:g}, beta={self.beta:g}, kappa={self.kappa:g}: use 0.7, 10 and 1.01")

    def solve(self, w: torch.Tensor, stat: None = None, notes: list[str] | None = None) -> QTensor:
        """Codes of w [..., n, k] by its own values alone."""
        scale, zero = grid.fit(w, self.scheme, self.rounding)
        W, beta = grid.grouped(w.float(), self.scheme), self.beta
        best = torch.full_like(scale, torch.inf)
        kept, kept_zero = scale, zero
        for _ in range(self.iters + 1):
            q = grid.encode(w, self.scheme, scale, zero)
            z = torch.zeros_like(scale) if zero is None else zero.float()
            code = q.code.unflatten(-1, W.shape[-2:]).float()
            unit = (W / scale.unsqueeze(-1)) - (code - z.unsqueeze(-1))  # errors in steps: beta means one thing
            size = unit.abs().clamp(min=1e-6)
            power = size.pow(self.p)
            error = power.sum(-1) * scale.pow(self.p)
            better = error < best
            best, kept = torch.where(better, error, best), torch.where(better, scale, kept)
            if zero is not None and kept_zero is not None:
                kept_zero = torch.where(better, zero, kept_zero)
            E = unit.sign() * (size - power / size / beta).clamp(min=0)
            target = W - E * scale.unsqueeze(-1)
            if zero is not None:
                free = (code - target / scale.unsqueeze(-1)).mean(-1)
                zero = free.round().clamp(self.scheme.qmin, self.scheme.qmax).to(torch.int8)
            d = code - (0 if zero is None else zero.float().unsqueeze(-1))
            fitted = (d * target).sum(-1) / d.square().sum(-1).clamp(min=1e-12)
            fitted = torch.where((fitted > scale / 2) & (fitted < scale * 2), fitted, scale)
            scale = fitted if self.rounding is None else self.rounding(fitted)
            beta *= self.kappa
        return grid.encode(w, self.scheme, kept, kept_zero)
