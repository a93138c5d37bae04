"""AWQ: scale up the inputs that matter before rounding, and give the inverse to the norm or layer before.

Source: Lin et al. 2023, arXiv:2306.00978, section 3; the search over W and X together is that of the authors' code.
Idea:   Q(W s) (x / s) rounds the columns of large s with a finer step. s = mean|x|^r / mean|w|^(1-r) or mean|x|^r,
        scaled to sqrt(max s * min s) = 1; the r in [0, 1] and the form with the least ||(Q(W s) / s - W) X||^2 over all
        layers of x.
Shapes: ws [n_i, k] each; x [tokens, k]; s [k]; H = X X^T [k, k].
Cost:   2 `grid` roundings of each weight, O(n k^2) each by H; two passes over the calibration tokens.
Fails:  never: where nothing before a layer can take the scales, it says so and only the range is searched.
Differs: the loss is of the layers' own outputs, by H, not of the whole attention or MLP. Alone it rounds to nearest
        in ranges searched by diag(H); with a solver after it (`awq | gptq`) that one chooses the codes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from wherry.errors import BadInput
from wherry.ops import grid
from wherry.recipe import Pass
from wherry.scheme import QTensor


class Inputs(NamedTuple):
    """Sums over tokens: of x x^T [k, k], of |x| [k], and their number."""

    total: torch.Tensor
    size: torch.Tensor
    tokens: int


@dataclass(frozen=True, kw_only=True)
class AWQ(Pass):
    """grid: steps of the search for r; norm: power of the error in the search of ranges, as gptq's."""

    grid: int = 20
    norm: float = 3.0

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise BadInput(f"awq: grid={self.grid} is not a number of steps; 20 is the usual one")
        if not 1 <= self.norm <= 8:
            raise BadInput(f"awq: norm={self.norm:g} is not a power from 1 to 8; 3 is the usual one")

    def observe(self, stat: Inputs | None, x: torch.Tensor) -> Inputs:
        """Add the tokens x [tokens, k]."""
        x = x.float()
        if stat is None:
            return Inputs(x.T @ x, x.abs().sum(0), len(x))
        return Inputs(torch.addmm(stat.total, x.T, x), stat.size + x.abs().sum(0), stat.tokens + len(x))

    def smooth(self, ws: list[torch.Tensor], stat: Inputs) -> torch.Tensor:
        """Scales s [k] of the columns of all ws [n_i, k], which share their input."""
        H = stat.total / max(stat.tokens, 1)
        x = (stat.size / max(stat.tokens, 1)).clamp(min=1e-4)
        W = torch.cat([w.float() for w in ws])
        groups = self.scheme.scales_per_row(W.shape[-1])
        parts = W.abs().unflatten(-1, (groups, -1))
        w = (parts / parts.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(-2).mean(0).clamp(min=1e-4)
        ratios = [i / self.grid for i in range(1, self.grid + 1)]
        tried = (torch.ones_like(x), *(x**r / w ** (1 - r) for r in ratios), *(x**r for r in ratios[:-1]))
        best, least = torch.ones_like(x), torch.inf
        for s in (each / (each.max() * each.min()).sqrt() for each in tried):
            loss = 0.0
            for own in W.split([len(each) for each in ws]):
                E = grid.encode(own * s, self.scheme, *grid.fit(own * s, self.scheme, self.rounding)).decode() / s - own
                loss += float(((E @ H) * E).sum())
            if loss < least:
                best, least = s, loss
        return best

    def solve(self, w: torch.Tensor, stat: Inputs | None = None, notes: list[str] | None = None) -> QTensor:
        """Codes of the scaled w [n, k], each to the nearest, in ranges searched by the size of the inputs."""
        if stat is None:
            raise BadInput("awq needs calibration statistics; rtn is the method without data")
        importance = stat.total.diagonal()
        return grid.encode(w, self.scheme, *grid.search(w, self.scheme, self.rounding, importance, norm=self.norm))
