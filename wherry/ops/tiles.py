"""Tiles: one scale for a block of rows and inputs, or for a whole weight, as fits, files and gradients see it.

A QTensor holds a scale for every row [n, g]; those of rows that share a tile are equal. A fit works on the tiles as on
rows of their own [tiles, rows * columns]; a file holds one scale for each tile [n / rows, k / columns].
Shapes: w [..., n, k]; tiles of `rows` x `columns`, the last of them shorter where rows do not divide n.
Source: the strategies "tensor" and "block" of compressed-tensors; DeepSeek-AI 2024 (V3, arXiv:2412.19437), section
    3.3.2, for blocks of 128 x 128.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from wherry.scheme import Row, Scheme

Fit = Callable[[torch.Tensor, Scheme, torch.Tensor | None], tuple[torch.Tensor | None, ...] | None]


def rows(scheme: Scheme, n: int) -> int:
    """How many neighbouring rows of a weight of n rows share their scales; 1 but for tiles."""
    return scheme.rows_per_scale(n)


def cut(w: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The tiles of w [..., n, k] as rows [..., tiles, rows * columns]; rows that are missing at the end are zeros."""
    n, k = w.shape[-2:]
    high, groups = rows(scheme, n), scheme.scales_per_row(k)
    w = torch.nn.functional.pad(w, (0, 0, 0, -n % high))
    parts = w.unflatten(-1, (groups, -1)).unflatten(-3, (-1, high))  # [..., n / rows, rows, g, columns]
    return parts.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def spread(x: torch.Tensor, n: int, scheme: Scheme) -> torch.Tensor:
    """Scales of tiles [..., n / rows, g] for each of n rows [..., n, g]; as they are where there are no tiles."""
    high = rows(scheme, n)
    return x if high == 1 else x.repeat_interleave(high, -2)[..., :n, :].contiguous()


def once(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The opposite of `spread`: the first of the rows that share a tile."""
    return x[..., :: rows(scheme, x.shape[-2]), :].contiguous()


def shared(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The mean of x [n, g] over the rows that share a tile, for each of them: gradients move a tile's together."""
    high = rows(scheme, len(x))
    return x if high == 1 else torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in x.split(high)])


def fit(
    way: Fit, w: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> Any:
    """What `way` finds for the tiles of w as rows of their own, for the rows of w; importance [k] of each input.

    way(tiles, scheme with one scale per row, importance [tiles, rows * columns]) -> tensors [tiles, 1] (times planes).
    """
    n, k = w.shape[-2:]
    groups = scheme.scales_per_row(k)
    if importance is not None:
        each = importance.unflatten(0, (groups, 1, -1)).expand(-1, rows(scheme, n), -1).flatten(1)  # [g, a tile]
        importance = each.repeat(-(-n // rows(scheme, n)), 1)
    found = way(cut(w, scheme), replace(scheme, grain=Row()), importance)
    if found is None:
        return None
    return tuple(x if x is None else spread(x.unflatten(-2, (-1, groups)).flatten(-2), n, scheme) for x in found)
