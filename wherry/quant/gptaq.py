"""GPTAQ: GPTQ that also repairs what the compressed layers before have done to its input.

Source: Li et al. 2025, arXiv:2504.02692 (asymmetric calibration), algorithm 1; grid, order and refit as in gptq.
Idea:   minimise ||Q X - W X'||^2, X what the compressed model feeds, X' what the original fed. With dX = X' - X and
        H^-1 = U^T U, rounding column j also asks the later columns for w_j P[j, j+1:],
        P = triu(dX X^T U^T, 1) U: the part of W dX that they can still give.
Shapes: w [n, k]; x, x_ref [tokens, k]; H, D = dX X^T, U, P [k, k].      n = outputs, k = inputs.
Cost:   twice GPTQ's statistics, and one more product in the loop; each layer of a block is observed on its own.
Fails:  as gptq.
Differs: `alpha` scales the correction (1 is the paper). So does 1 - k / tokens, since some of dX seems to follow from X
        by chance, as in the adjusted R^2; from as many inputs as tokens on it is gptq. Signs cannot follow a large
        one: for binary and ternary grids alpha, a half and a quarter of it and 0 are tried, and what gives that layer
        the least ||Q X - W X'||^2 stays, with a remark; rounding, if all of them went 0.9 of the weight's norm away.
        refit fits scales to the corrected target W (H + D) H^-1, so that both pull the same way.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from wherry.errors import BadInput
from wherry.ops import grid
from wherry.ops.solve import columns, ordered_factor, refit_codes
from wherry.recipe import Pass
from wherry.scheme import QTensor

PARTS = (1.0, 0.5, 0.25, 0.0)  # of the correction, tried where codes are signs
LOST = 0.9  # of a weight's norm: codes that are farther from it hold nothing of it beyond the inputs that were seen


class Pair(NamedTuple):
    """Sums over tokens of x x^T and (x_ref - x) x^T [k, k] float32, and the number of tokens."""

    total: torch.Tensor
    drift: torch.Tensor
    tokens: int


@dataclass(frozen=True, kw_only=True)
class GPTAQ(Pass):
    """damp: added to diag(H), as a fraction of its mean. alpha: 0 is gptq, 1 the whole correction. norm: as gptq's."""

    damp: float = 0.01
    alpha: float = 1.0
    block: int = 128
    refit: bool = True
    norm: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.norm <= 8:
            raise BadInput(f"gptaq: norm={self.norm:g} is not a power from 1 to 8; 3 is the usual one")
        if not 0 <= self.damp < 10 or not 0 <= self.alpha <= 1 or self.block < 1:
            raise BadInput(f"gptaq: damp={self.damp:g}, alpha={self.alpha:g}, block={self.block}: use 0.01, 0..1, 128")

    def observe(self, stat: Pair | None, x: torch.Tensor, x_ref: torch.Tensor) -> Pair:
        """Add the tokens x [tokens, k] and what the original had in their place."""
        x, d = x.float(), x_ref.float() - x.float()
        if stat is None:
            return Pair(x.T @ x, d.T @ x, len(x))
        return Pair(torch.addmm(stat.total, x.T, x), torch.addmm(stat.drift, d.T, x), stat.tokens + len(x))

    def solve(self, w: torch.Tensor, stat: Pair | None = None, notes: list[str] | None = None) -> QTensor:
        """Codes of w [n, k] that on the compressed inputs give what w gave on the original's."""
        if stat is None:
            raise BadInput("gptaq needs calibration statistics; rtn is the method without data")
        W, k = w.float(), w.shape[-1]
        trust = max(0.0, 1 - k / max(stat.tokens, 1))
        if trust < 0.5 and notes is not None:
            notes.append(f"{trust:.2f} of the correction: {stat.tokens} tokens say little of the drift of {k} inputs")
        H, D = (total / max(stat.tokens, 1) for total in (stat.total, self.alpha * trust * stat.drift))
        scale, zero = grid.search(W, self.scheme, self.rounding, H.diagonal(), norm=self.norm)
        order, U, damp = ordered_factor(stat.total, stat.tokens, self.damp)
        if damp != self.damp and notes is not None:
            notes.append(f"damping raised from {self.damp:g} to {damp:g}: the Hessian was not positive definite")
        P = (D[order][:, order] @ U.T).triu(1) @ U
        damped = H + damp * torch.diag_embed(H.diagonal().mean().expand(k))

        def corrected(part: float) -> QTensor:
            code = columns(W, U, scale, zero, self.scheme, order, self.block, part * P)
            fitted = scale
            if self.refit:
                target = W + part * torch.linalg.solve(damped, W @ D, left=False)
                fitted = refit_codes(target, code, self.scheme, damped, scale, zero)
                fitted = fitted if self.rounding is None else self.rounding(fitted)
            return QTensor(self.scheme, code.to(torch.int8), fitted, zero)

        if self.scheme.bits > 1 and self.scheme.table != "ternary":
            return corrected(1.0)
        found: list[tuple[bool, float, float, QTensor]] = []
        for part in PARTS if bool(D.any()) else (1.0,):
            q = corrected(part)
            E = q.decode() - W
            lost = bool(E.norm() > LOST * W.norm())
            found.append((lost, float(((E @ H) * E).sum() - 2 * ((E @ D.T) * W).sum()), part, q))
        lost, _, part, q = min(found, key=lambda each: each[:2])
        if lost:
            if notes is not None:
                notes.append(f"rounded to nearest: {stat.tokens} tokens say too little of {k} inputs for so few codes")
            return grid.encode(W, self.scheme, scale, zero)
        if part != 1 and notes is not None:
            notes.append(f"alpha={self.alpha * part:g}: the whole correction is more than signs can follow here")
        return q
