"""Rules of operators that lay lanes out anew: concatenation, splits, slices, padding, gathering."""

from typing import Any

import numpy as np

from wherry.dependency.flow import NONE, Flow
from wherry.dependency.record import Op, Value
from wherry.dependency.rules import rule, same


def argument(op: Op, name: str, place: int, default: Any) -> Any:
    """An argument by name or place."""
    return op.kwargs.get(name, op.args[place] if len(op.args) > place else default)


@rule("cat", "concatenate", "concat")
def cat(flow: Flow, op: Op) -> None:
    """Lanes of one behind those of the other."""
    out, start = op.outputs[0], 0
    dim = argument(op, "dim", 1, 0) % out.rank
    for x in op.args[0]:
        if x.shape == (0,):
            continue
        same(flow, x, out, but=(dim,))
        flow.tie(x, dim, out, dim, start + np.arange(x.shape[dim]))
        start += x.shape[dim]


@rule("stack")
def stack(flow: Flow, op: Op) -> None:
    """A new dimension, whose lanes stay."""
    out = op.outputs[0]
    dim = argument(op, "dim", 1, 0) % out.rank
    for x in op.args[0]:
        for d in range(x.rank):
            flow.tie(x, d, out, d + (d >= dim))


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def split(flow: Flow, op: Op) -> None:
    """The opposite of cat."""
    x, start = op.args[0], 0
    dim = argument(op, "dim", 2, 0) % x.rank
    for out in op.outputs:
        same(flow, out, x, but=(dim,))
        flow.tie(out, dim, x, dim, start + np.arange(out.shape[dim]))
        start += out.shape[dim]


@rule("slice", "narrow")
def slice_(flow: Flow, op: Op) -> None:
    """Some lanes of one dimension."""
    x, out = op.args[0], op.outputs[0]
    dim = argument(op, "dim", 1, 0) % x.rank
    start = argument(op, "start", 2, 0) or 0
    step = argument(op, "step", 4, 1) if op.name.startswith("slice") else 1
    start = min(max(start + x.shape[dim] if start < 0 else start, 0), x.shape[dim])
    same(flow, out, x, but=(dim,))
    flow.tie(out, dim, x, dim, start + step * np.arange(out.shape[dim]))


@rule("select", "unbind")
def select(flow: Flow, op: Op) -> None:
    """One lane by its number, or each by its own: that dimension stays."""
    x = op.args[0]
    dim = argument(op, "dim", 1, 0) % x.rank
    for out in op.outputs:
        for d in range(x.rank):
            if d != dim:
                flow.tie(x, d, out, d - (d > dim))


@rule("constant_pad_nd", "pad")
def pad(flow: Flow, op: Op) -> None:
    """Lanes of a constant before and behind; they belong to nobody until something ties them. Negative: cut off."""
    x, out = op.args[0], op.outputs[0]
    sizes = op.args[1]
    for d in range(x.rank):
        back = x.rank - 1 - d
        low = sizes[2 * back] if 2 * back < len(sizes) else 0
        where = np.arange(x.shape[d]) + low
        where[(where < 0) | (where >= out.shape[d])] = NONE
        flow.tie(x, d, out, d, where)


@rule("index_select")
def index_select(flow: Flow, op: Op) -> None:
    """Lanes by numbers that are tensors: that dimension stays."""
    x, out = op.args[0], op.outputs[0]
    same(flow, x, out, but=(argument(op, "dim", 1, 0) % max(x.rank, 1),))


@rule("index", "_unsafe_index")
def index(flow: Flow, op: Op) -> None:
    """Numpy's indexing by tensors: dimensions that are not indexed keep their lanes."""
    x, out = op.args[0], op.outputs[0]
    indices = list(op.args[1]) + [None] * (x.rank - len(op.args[1]))
    places = [d for d, item in enumerate(indices) if item is not None]
    if any(item is not None and item.rank == 0 for item in indices):
        return
    block = max((item.rank for item in indices if item is not None), default=0)
    joined = not places or places == list(range(places[0], places[-1] + 1))
    first = places[0] if joined and places else 0
    rest = [d for d in range(x.rank) if indices[d] is None]
    for n, d in enumerate(rest):
        flow.tie(x, d, out, n if n < first else n + block)


@rule("index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce", "gather", "slice_scatter",
      "select_scatter", "index_fill", "masked_scatter", "_index_put_impl", "take_along_dim")  # fmt: skip
def scatter(flow: Flow, op: Op) -> None:
    """Rows added or written at numbers that are tensors: last dimensions of equal size keep their lanes."""
    x, out = op.args[0], op.outputs[0]
    dim = op.args[1] % x.rank if len(op.args) > 1 and isinstance(op.args[1], int) else 0
    indexed = {dim}
    if "index_put" in op.name:
        indexed = {d for d, item in enumerate(op.args[1]) if item is not None}
    same(flow, x, out, but=() if op.name != "gather" else tuple(indexed))
    for d in indexed:
        flow.pin(out, d, f"{op} writes at numbers")
    for value in [v for v in op.args[1:] if isinstance(v, Value) and v.rank > 0]:
        for back in range(1, min(value.rank, out.rank) + 1):
            d = out.rank - back
            if d not in indexed and value.shape[-back] == out.shape[d] and out.shape[d] > 1:
                flow.tie(value, value.rank - back, out, d)


@rule("flip", "roll", "tril", "triu", "rot90", "unfold", "as_strided", "diagonal")
def whole(flow: Flow, op: Op) -> None:
    """Dimensions that it does not work on keep their lanes; those that it does stay."""
    x, out = op.args[0], op.outputs[0]
    if op.name in ("flip", "roll"):
        dims = {d % x.rank for d in (op.args[-1] if isinstance(op.args[-1], list | tuple) else [op.args[-1]])}
        same(flow, x, out, but=tuple(dims))
    elif op.name in ("tril", "triu"):
        same(flow, x, out, but=(x.rank - 1, x.rank - 2))
    elif op.name == "unfold":
        same(flow, x, out, but=(op.args[1] % x.rank,))
