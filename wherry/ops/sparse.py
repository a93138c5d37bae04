"""Sparse: which weights stay, by a score; N:M patterns and tiles; a threshold over many tensors without holding them.

Shapes: score, w [n, k], n = outputs, k = inputs; a mask is True where a weight stays.
Source of N:M: Mishra et al. 2021, arXiv:2104.08378 (2 of every 4 neighbouring inputs, what sparse tensor cores take).
"""

import re
from collections.abc import Callable, Iterable

import torch

from wherry.errors import BadInput

HALF = 1 << 16


def keep_of(pattern: str, method: str = "pattern") -> tuple[int, int]:
    """(N, M) of "2:4", or (0, 0) of an empty text. Raises BadInput for anything else."""
    if not pattern:
        return 0, 0
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m:
        raise BadInput(f"{method}: pattern={pattern} is not N:M with 0 < N < M; 2:4 keeps 2 of every 4 inputs")
    return n, m


def tile_of(block: str, method: str = "block") -> tuple[int, int]:
    """(outputs, inputs) of "4x1", or (1, 1) of an empty text. Raises BadInput for anything else."""
    if not block:
        return 1, 1
    found = re.fullmatch(r"(\d+)x(\d+)", block)
    if not found or not int(found[1]) or not int(found[2]):
        raise BadInput(f"{method}: block={block} is not OUTPUTSxINPUTS; 4x1 zeroes 4 outputs of one input together")
    return int(found[1]), int(found[2])


def fits(shape: tuple[int, ...], pattern: str, block: str) -> None:
    """Raise BadInput where a pattern or block does not divide a weight [n, k]."""
    _, m = keep_of(pattern)
    if m and shape[-1] % m:
        raise BadInput(f"pattern={pattern} does not divide its {shape[-1]} inputs; leave the layer out with ignore=")
    for extent, size, what in zip(shape[-2:], tile_of(block), ("outputs", "inputs"), strict=True):
        if extent % size:
            raise BadInput(f"block={block} does not divide its {extent} {what}; leave the layer out with ignore=")


def keep(score: torch.Tensor, sparsity: float, pattern: str = "", block: str = "", rows: bool = False) -> torch.Tensor:
    """The mask [n, k] that zeroes a share of `sparsity`, of smallest score; of equal scores the last ones.

    pattern: N of every M neighbouring inputs stay instead. block: tiles stay or go by their sum.
    rows: the share is taken of every row, not of the whole. At least one weight (tile) of each whole stays.
    """
    if pattern:
        n, m = keep_of(pattern)
        return lowest(score.unflatten(-1, (-1, m)), m - n).logical_not().flatten(-2)
    high, wide = tile_of(block)
    if block:
        tiles = score.unflatten(-1, (-1, wide)).unflatten(0, (-1, high)).sum((1, 3))
        small = keep(tiles, sparsity, rows=rows)
        return small.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    flat = score if rows else score.reshape(1, -1)
    count = min(round(sparsity * flat.shape[-1]), flat.shape[-1] - 1)
    return lowest(flat, count).logical_not().reshape(score.shape)


def lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """A mask, True at the `count` smallest along the last axis; of equal ones the last."""
    order = torch.argsort(score.flip(-1), dim=-1, stable=True)[..., :count]
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    return mask.scatter_(-1, order, value=True).flip(-1)


def threshold(tensors: Callable[[], Iterable[torch.Tensor]], sparsity: float) -> float:
    """The smallest |w| that stays when a share of all weights together goes: exact, in two passes, 512 kB of memory.

    The bits of a float32 above zero are ordered as the numbers are: the upper half of them is counted, then the lower.
    """
    counts, total = torch.zeros(HALF, dtype=torch.int64), 0
    for w in tensors():
        bits = w.float().abs().flatten().view(torch.int32)
        counts += torch.bincount(bits >> 16, minlength=HALF)
        total += bits.numel()
    place = min(round(sparsity * total), total - 1)  # index, from the smallest, of the first that stays
    upper = int(torch.searchsorted(counts.cumsum(0), place, right=True))
    place -= int(counts[:upper].sum())
    counts = torch.zeros(HALF, dtype=torch.int64)
    for w in tensors():
        bits = w.float().abs().flatten().view(torch.int32)
        counts += torch.bincount(bits[bits >> 16 == upper] & (HALF - 1), minlength=HALF)
    lower = int(torch.searchsorted(counts.cumsum(0), place, right=True))
    return float(torch.tensor([upper << 16 | lower], dtype=torch.int32).view(torch.float32))
