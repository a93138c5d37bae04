"""Reshape's constants made to follow the input again, so that a frozen graph runs at another batch and can be pruned.

Idea:   the dimensions of the input and of the result are cut into the smallest groups with equal products. A group
            one to one     is that size of the input
            many to one    is the product of those sizes
            one to many    the first of the many follows, the others are kept: [128, 384] to [128, 12, 32] keeps 32,
                           so heads may be taken out; the one written as -1 follows where there is one
            many to many   the same, as one product
        Ones go with what stands behind them: [1, 128, 384] to [128, 384] is batch times length, and back again.
What cannot be known: a constant says only a number. [128, 384] to [1, 128, 384] may mean a new batch axis or a batch
        of one that was merged before; the second is taken. [1, 116, 8, 8] to [1, 2, 58, 8, 8] keeps 58 and not 2.
        Constants in other operators (ends of slices, sizes of Resize, a mask of one length) stay as they are.
"""

import operator
from math import prod
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from wherry.formats.onnx.torch_module.builder import Builder


def reshaped(b: "Builder", x: fx.Node, source: list, items: list[Any]) -> list[Any]:
    """Items of a reshape (ints, one -1, fx.Nodes) with constants that follow a size of x replaced. See above.

    source: the dimensions of x as the file says (ints, names, None).
    """
    target: list[Any] = [item if isinstance(item, int) else b.symbols.get(item) for item in items]
    out = list(items)
    left = 0
    while left < min(len(source), len(target)) and _same(source[left], target[left]):
        if isinstance(items[left], int):
            out[left] = b.size(x, left, source[left])
        left += 1
    rest: list[Any]
    rest, wanted = source[left:], target[left:]
    right = 0
    while right < min(len(rest), len(wanted)) and _same(rest[-1 - right], wanted[-1 - right]):
        right += 1
    if right and not all(isinstance(d, int) for d in rest + wanted):
        for i in range(1, right + 1):
            if isinstance(items[-i], int):
                out[-i] = b.size(x, len(source) - i, source[-i])
        rest, wanted = rest[: len(rest) - right], wanted[: len(wanted) - right]
    unknown = [i for i, d in enumerate(wanted) if d == -1]
    if unknown and not all(isinstance(d, int) for d in rest):
        # sizes that are not known stand for -1 when what is behind both fits
        after = wanted[unknown[0] + 1 :]
        k = len(rest)
        while k > 0 and isinstance(rest[k - 1], int) and all(isinstance(d, int) for d in after):
            if prod(rest[k - 1 :]) > prod(after):
                break
            k -= 1
        if after and unknown[0] == 0 and k == 1 and prod(rest[1:]) == prod(after):
            out[left] = b.size(x, left, rest[0])
            _groups(b, x, rest, wanted, out, left, 1, 1)
        return out
    if not all(isinstance(d, int) and d != 0 for d in rest) or not all(isinstance(d, int) and d != 0 for d in wanted):
        return out
    free = unknown[0] if unknown else None
    if free is not None:
        others = -prod(wanted)
        if others <= 0 or prod(rest) % others:
            return out
        wanted[free] = prod(rest) // others
    if prod(rest) == prod(wanted):
        _groups(b, x, rest, wanted, out, left, 0, 0, free)
    return out


def _same(size: Any, item: Any) -> bool:
    return size == item and size not in (None, 0, -1)


def _groups(
    b: "Builder", x: fx.Node, rest: list[int], wanted: list[int], out: list[Any], left: int, i: int, j: int,
    free: int | None = None,
) -> None:  # fmt: skip
    """Cut both lists into groups of equal products from i and j on; write the items into `out` from `left` on."""
    while i < len(rest) and j < len(wanted):
        first, begin, own, new = i, j, rest[i], wanted[j]
        i, j = i + 1, j + 1
        while own != new:
            if own < new and i < len(rest):
                own, i = own * rest[i], i + 1
            elif j < len(wanted):
                new, j = new * wanted[j], j + 1
            else:
                return
        if j == len(wanted):
            i = len(rest)  # ones at the end of the input
        if i == len(rest) and j < len(wanted) and free is not None and free >= j:
            return
        _group(b, x, range(left + first, left + i), wanted, out, left, range(begin, j), free)


def _group(
    b: "Builder", x: fx.Node, axes: range, wanted: list[int], out: list[Any], left: int, places: range, free: int | None
) -> None:
    whole: Any = b.size(x, axes[0], None)
    for axis in axes[1:]:
        whole = b.call(operator.mul, whole, b.size(x, axis, None))
    moving = free if free is not None and free in places else places[0]
    divisor = 1
    for place in places:
        if place != moving:
            out[left + place] = wanted[place]
            divisor *= wanted[place]
    out[left + moving] = whole if divisor == 1 else b.call(operator.floordiv, whole, divisor)
