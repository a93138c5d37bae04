"""LowRank: two thin float matrices beside the codes give back the part of their error that the inputs see most.

Source: Zhang et al. 2024 (QERA, arXiv:2410.06040), theorem 1 (metric=exact; the same subspace as EoRA's, Liu et al.
    2024, arXiv:2410.21271) and its diagonal approximation; Zhang et al. 2024 (LQER, arXiv:2402.02446; none = its SVD).
Idea:   y = Q x + B (A x). With E = W - Q and R = E[x x^T], the B A of rank r that minimises tr (E - B A) R (E - B A)^T
        is B = U, A = U^T E, U the r leading eigenvectors of E R E^T: what is left is the sum of the other eigenvalues.
Shapes: W, Q, E [n, k]; x [tokens, k]; R [k, k]; B [n, r]; A [r, k]. 2 r (n + k) bytes more.
Cost:   O(n k^2 + min(n, k)^3) time; one pass of a block over the calibration tokens for each input that layers share.
Fails:  BadInput for a rank that is none of the weight.
Differs: B and A are rounded to fixed point of 11 bits per column and row, so that fp16 holds them and their product is
        the same in every format. A pruned weight's zeros are zeros of Q alone; the notes say how many were lost.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from wherry.errors import BadInput
from wherry.recipe import Pass
from wherry.scheme import QTensor

BITS = 11  # significant bits of fp16
SPREAD = 2.0**-24  # a component this much smaller than the largest is left out: then float64 holds their sum exactly


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """rank: of the correction. metric: what its error is weighted by: all of R, its diagonal, or nothing (none)."""

    rank: int = 16
    metric: Literal["exact", "diagonal", "none"] = "exact"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput(f"lowrank: rank={self.rank} is no rank; 16 is the usual one")

    def observe(self, stat: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Add the tokens x [tokens, k] to the sum of x x^T [k, k]."""
        x = x.float()
        return x.T @ x if stat is None else torch.addmm(stat, x.T, x)

    def correct(self, w: torch.Tensor, q: QTensor, stat: torch.Tensor | None, notes: list[str]) -> QTensor:
        """The codes q of w [n, k] with left [n, r] and right [r, k] beside them."""
        plain = replace(q, left=None, right=None).decode()
        E = w.double() - plain.double()
        if stat is None and self.metric != "none":
            notes.append("no calibration input reached it: corrected without weights")
        R = torch.eye(E.shape[1], dtype=E.dtype, device=E.device)
        if stat is not None and self.metric != "none":
            R = stat.double() if self.metric == "exact" else torch.diag(stat.diagonal().double())
        B = leading(E, R, self.rank)
        left, right = fixed(B, B.T @ E)
        done = replace(q, scheme=replace(q.scheme, rank=self.rank), left=left, right=right)
        before, after = (float(((e @ R) * e).sum()) for e in (E, w.double() - done.decode().double()))
        notes.append(f"rank {self.rank} leaves {after / max(before, 1e-300):.3g} of the squared error of the outputs")
        lost = int(((w == 0) & (plain == 0) & (done.decode() != 0)).sum())
        if lost:
            notes.append(f"{lost} exact zeros are zeros of the codes alone: the correction is dense")
        return done


def leading(E: torch.Tensor, R: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading `rank` eigenvectors [n, rank] of E R E^T, by the smaller side of E [n, k]."""
    n, k = E.shape
    if n <= k:
        return torch.linalg.eigh(E @ R @ E.T)[1][:, -rank:].flip(-1)
    values, vectors = torch.linalg.eigh(R)
    M = E @ (vectors * values.clamp(min=0).sqrt())  # E R^1/2, up to a rotation of its columns
    values, vectors = torch.linalg.eigh(M.T @ M)
    U = M @ vectors[:, -rank:].flip(-1)
    return torch.linalg.qr(U)[0]


def fixed(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B [n, r] and A [r, k] as float32 of 11 bits after one power of two per column and row, both of like size."""
    b, a = B.abs().amax(0), A.abs().amax(1)
    size = b * a
    alive = (size > SPREAD * size.max()) & (size > 0)
    balance = torch.where(alive, (a / b.clamp(min=1e-300)).clamp(min=1e-300).sqrt(), torch.ones_like(b))
    B, A = B * balance * alive, A / balance.unsqueeze(-1) * alive.unsqueeze(-1)

    def rounded(x: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
        step = torch.exp2(torch.ceil(torch.log2(most.clamp(min=2.0**-13))) - BITS)
        return (x / step).round() * step

    return (
        rounded(B, B.abs().amax(0, keepdim=True)).float().contiguous(),
        rounded(A, A.abs().amax(1, keepdim=True)).float().contiguous(),
    )
