"""Wanda: zero, in each row, the weights whose size times the norm of their input is smallest; nothing else moves.

Source: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695.
Idea:   score S_ij = |W_ij| ||X_j||_2: what removing one weight adds to the output, if inputs were uncorrelated. Weights
        of one output compete with each other alone, which is what makes it work (their table 7).
Shapes: w [n, k]; x [tokens, k]; the statistic is a sum of squares [k].
Cost:   O(n k log k) time, 4 k bytes of statistic; one pass over the calibration tokens.
Fails:  BadInput where a pattern or block does not fit, before any work.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from wherry.gait import Pruner


class Squares(NamedTuple):
    """A sum over tokens: of x^2 for each input, and their number."""

    total: torch.Tensor  # [k] float32
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruner):
    """Size of weights times norms of inputs."""

    @property
    def rows(self) -> bool:
        """Weights of one output compete with each other alone."""
        return True

    def observe(self, stat: Squares | None, x: torch.Tensor) -> Squares:
        """Add the tokens x [tokens, k] to the statistic."""
        found = x.float().square().sum(0)
        return Squares(found, len(x)) if stat is None else Squares(stat.total + found, stat.tokens + len(x))

    def prune(self, w: torch.Tensor, stat: Squares | None = None, notes: list[str] | None = None) -> torch.Tensor:
        """W [n, k] with the lowest scores of each row zero; by size alone without a statistic."""
        score = w.float().abs()
        if stat is not None:
            score = score * (stat.total / max(stat.tokens, 1)).sqrt()
        return w * self.keep(score)
