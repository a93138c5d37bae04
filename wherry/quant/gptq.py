"""GPTQ: round one column at a time and let the columns not yet rounded absorb the error.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; act-order with static groups as in the authors' code.
Idea:   minimise ||(W - Q) X||^2. With H = X X^T + damp * mean(diag H) * I and H^-1 = U^T U (U upper),
        rounding column j costs e_j = (w_j - q_j) / U_jj, which the rest pays: W[:, j:] -= e_j U[j, j:].
        Columns go in the order of falling diag H; each keeps the scale of the group that it came from, which
        was fixed before (static), so that the result needs no index of groups. Once all codes stand, the scales
        are fitted to them by least squares in the same metric (refit; COMQ, Zhang et al. 2024, arXiv:2403.07134).
Shapes: w [n, k]; x [tokens, k]; H, U [k, k]; e [n, block].      n = outputs, k = inputs.
Cost:   O(n k^2 + k^3) time in lazy blocks of 128 columns, 8 k^2 bytes for H; one pass over the calibration tokens.
Fails:  Diverged if H is not positive definite even with damp = 1 (too few tokens for k inputs).
Differs: refit (refit=false is the paper); an exact zero stays zero (so that it composes with pruning); damping that
        fails is raised tenfold and reported.
"""

import math
from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.ops import grid
from wherry.ops.solve import Hessian, columns, ordered_factor, refit_codes
from wherry.recipe import Pass
from wherry.scheme import QTensor

OBSERVERS = ("minmax", "mse", "imatrix_mse")


@dataclass(frozen=True, kw_only=True)
class GPTQ(Pass):
    """damp: added to diag(H), as a fraction of its mean. actorder: "static" or "none". refit: fit scales to codes.

    observer: how a group's range is found: "minmax", or by least error, plain ("mse") or weighted by diag(H).
    norm: power of that error; above 2 less is clipped, as later columns can pay for many small errors, not for a large.
    """

    damp: float = 0.01
    actorder: str = "static"
    block: int = 128
    refit: bool = True
    observer: str = "imatrix_mse"
    norm: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.damp < math.inf:
            raise BadInput(f"gptq: damp={self.damp:g} is not a fraction; 0.01 is the usual one")
        if self.actorder not in ("static", "none"):
            raise BadInput(f"gptq: actorder={self.actorder} is not known; it is static or none")
        if self.observer not in OBSERVERS:
            raise BadInput(f"gptq: observer={self.observer} is not known; it is one of {', '.join(OBSERVERS)}")
        if not 1 <= self.norm <= 8:
            raise BadInput(f"gptq: norm={self.norm:g} is not a power from 1 to 8; 3 is the usual one")
        if self.block < 1:
            raise BadInput(f"gptq: block={self.block} is not a number of columns; 128 is the usual one")

    def observe(self, stat: Hessian | None, x: torch.Tensor) -> Hessian:
        """Add the tokens x [tokens, k] to the statistic."""
        return Hessian.add(stat, x)

    def solve(self, w: torch.Tensor, stat: Hessian | None = None, notes: list[str] | None = None) -> QTensor:
        """Codes of w [n, k] that keep w x where the calibration inputs lie."""
        if stat is None:
            raise BadInput("gptq needs calibration statistics; rtn is the method without data")
        W, k = w.float(), w.shape[-1]
        H = stat.total / max(stat.tokens, 1)
        if self.observer == "minmax":
            scale, zero = grid.fit(W, self.scheme, self.rounding)
        else:
            importance = H.diagonal() if self.observer == "imatrix_mse" else None
            scale, zero = grid.search(W, self.scheme, self.rounding, importance, norm=self.norm)
        order, U, damp = ordered_factor(stat.total, stat.tokens, self.damp, self.actorder == "static")
        if damp != self.damp and notes is not None:
            notes.append(f"damping raised from {self.damp:g} to {damp:g}: the Hessian was not positive definite")
        code = columns(W, U, scale, zero, self.scheme, order, self.block)
        if self.refit:
            H = H + damp * torch.diag_embed(H.diagonal().mean().expand(k))
            scale = refit_codes(W, code, self.scheme, H, scale, zero)
            scale = scale if self.rounding is None else self.rounding(scale)
        return QTensor(self.scheme, code.to(torch.int8), scale, zero)
