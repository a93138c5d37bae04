"""SparseGPT: zero weights column by column and let those to the right make up for what went.

Source: Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
    arXiv:2301.00774, algorithm 1; N:M as in its section 3.3.
Idea:   minimise ||(W - W') X||^2. With H = X X^T + damp * mean(diag H) * I and H^-1 = U^T U (U upper), zeroing w_j
        costs (w_j / U_jj)^2 and the rest of the row pays W[:, j:] -= (w_j / U_jj) U[j, j:]. In each block of 128
        columns the cheapest share of all its weights goes. The mask chosen, what stays is fitted once more by
        conjugate gradients in the same metric, all rows at once (refit; as least squares in Boza 2024,
        arXiv:2401.02938).
Shapes: w [n, k]; x [tokens, k]; H, U [k, k].      n = outputs, k = inputs.
Cost:   O(n k^2 + k^3) time, and as much again for each 2 to 3 of `refit` steps; 8 k^2 bytes for H.
Fails:  Diverged if H is not positive definite even with damp = 1 (too few tokens for k inputs).
Differs: refit (refit=0 is the paper); weights that are zero already are the first to go and stay zero.
"""

import math
from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.gait import Pruner
from wherry.ops import sparse
from wherry.ops.solve import Hessian, fit_kept, inverse_factor, zero_columns


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Pruner):
    """damp: added to diag(H), as a fraction of its mean. columns: of a block. refit: steps of conjugate gradients."""

    damp: float = 0.01
    columns: int = 128
    refit: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp < math.inf:
            raise BadInput(f"sparsegpt: damp={self.damp:g} is not a fraction; 0.01 is the usual one")
        if self.columns < 1 or self.refit < 0:
            raise BadInput(f"sparsegpt: columns={self.columns}, refit={self.refit}: 128 and 16 are the usual ones")

    def observe(self, stat: Hessian | None, x: torch.Tensor) -> Hessian:
        """Add the tokens x [tokens, k] to the statistic."""
        return Hessian.add(stat, x)

    def prune(self, w: torch.Tensor, stat: Hessian | None = None, notes: list[str] | None = None) -> torch.Tensor:
        """W [n, k] with zeros, and the rest moved to where the outputs stay; by size alone without a statistic."""
        W = w.float()
        if stat is None:
            return W * self.keep(W.abs())
        H = stat.total / max(stat.tokens, 1)
        U, damp = inverse_factor(H, self.damp)
        if damp != self.damp and notes is not None:
            notes.append(f"damping raised from {self.damp:g} to {damp:g}: the Hessian was not positive definite")
        _, m = sparse.keep_of(self.pattern)
        _, wide = sparse.tile_of(self.block)
        size = max(self.columns // max(m, wide), 1) * max(m, wide)  # a block holds whole groups
        V = zero_columns(W, U, lambda score: sparse.keep(score, self.sparsity, self.pattern, self.block), size, m)
        if self.refit:
            V = fit_kept(W, V, H + damp * H.diagonal().mean() * torch.eye(len(H), device=H.device), self.refit)
        return V
