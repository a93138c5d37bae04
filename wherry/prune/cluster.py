"""Cluster: weight sharing; the weights of a layer take a few values, zero always among them, which code to few bits.

Source: Han et al. 2016, Deep Compression, arXiv:1510.00149, section 3: k-means in one dimension, from equal steps.
Idea:   minimise sum_i (w_i - c_a(i))^2 over 2^bits - 1 centroids of the weights that are not zero. Centroids begin on
        equal steps between the smallest and largest weight, which keeps the few large ones that matter (section 3.2).
Shapes: w [n, k]; centroids [2^bits - 1].
Cost:   O(n k log 2^bits) for each round, `rounds` at most; no data.
Fails:  BadInput for bits outside of 1 to 10.
Differs: the centroids are not trained on; give more bits instead. The result is floats, and smaller only in a file that
        codes them: --format compact.
"""

from dataclasses import dataclass
from typing import Any

import torch

from wherry.errors import BadInput
from wherry.gait import Pass


@dataclass(frozen=True, kw_only=True)
class Cluster(Pass):
    """bits: 2^bits values for each layer, zero included. rounds: of k-means, at most."""

    bits: int = 5
    rounds: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 10 or self.rounds < 1:
            raise BadInput(f"cluster: bits={self.bits}, rounds={self.rounds}: 1 to 10 bits, and 1 round or more")

    def planned(self, shape: tuple[int, ...]) -> float:
        """It makes no zeros."""
        return 0.0

    def wording(self, sparsity: float) -> str:
        """What the plan says of a weight."""
        return f"{2**self.bits} values, zero among them,"

    def prune(self, w: torch.Tensor, stat: Any = None, notes: list[str] | None = None) -> torch.Tensor:
        """W [n, k] with each weight at the nearest centroid; zeros stay."""
        there = w[w != 0].float()
        count = min(2**self.bits - 1, len(there))
        if not count:
            return w
        centres = torch.linspace(float(there.min()), float(there.max()), count, dtype=torch.float64)
        nearest = torch.zeros(0)
        for _ in range(self.rounds):
            found = torch.searchsorted((centres[1:] + centres[:-1]).float() / 2, there)
            if len(nearest) and torch.equal(found, nearest):
                break
            nearest = found
            size = torch.bincount(nearest, minlength=len(centres))
            total = torch.zeros(len(centres), dtype=torch.float64).index_add_(0, nearest, there.double())
            centres = torch.where(size > 0, total / size.clamp(min=1), centres)
        values = centres.float()
        values[values == 0] = torch.finfo(torch.float32).tiny  # a weight that was there stays there
        out = w.float().clone()
        out[w != 0] = values[nearest]
        return out
