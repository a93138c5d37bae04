"""Operators that move, cut and join: Shape to Reshape, Transpose, Concat, Split, Slice, Pad, Expand, Tile and kin."""

import operator as python
from typing import Any

import torch
from torch import Tensor, fx

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.symbolic import reshaped
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Constant, Ints, Node


@runs("Shape")
def shape_of(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes of x, as int64 [rank], from axis start to end."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@builds("Shape")
def _shape(b: Builder, node: Node) -> Any:
    x, dimensions = b.get(node.inputs[0]), b.shape(node.inputs[0])
    if not isinstance(x, fx.Node) or dimensions is None:
        return NotImplemented
    axes = range(len(dimensions))[node.facts.get("start", 0) : node.facts.get("end", None)]
    return Ints([b.size(x, i, dimensions[i]) for i in axes])


@runs("Size")
def size_of(x: Tensor) -> Tensor:
    """How many elements x has."""
    return torch.scalar_tensor(x.numel(), dtype=torch.int64)


@builds("Size")
def _size(b: Builder, node: Node) -> Any:
    x = b.get(node.inputs[0])
    return Ints([b.graph.call_method("numel", (x,))], True) if isinstance(x, fx.Node) else NotImplemented


@runs("Reshape", ints=(1,))
def reshape(x: Tensor, shape: list[int], allowzero: int = 0) -> Tensor:
    """The elements of x in another shape; 0 keeps a size unless allowzero, -1 is what is left."""
    if not allowzero:
        shape = [x.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(shape)]
    return x.reshape(shape)


@builds("Reshape")
def _reshape(b: Builder, node: Node) -> Any:
    x, shape = b.inputs(node)
    vector = b.as_vector(shape)
    if isinstance(x, Ints) and vector is not None and vector.items in ([-1], [len(x.items)]):
        return Ints(x.items)
    if not isinstance(x, fx.Node) or vector is None:
        return NotImplemented
    source = b.shape(node.inputs[0])
    items = list(vector.items)
    if any(isinstance(item, int) and item == 0 for item in items):
        if node.facts.get("allowzero"):
            return b.call(torch.reshape, x, items)
        items = [b.size(x, i, source[i] if source else None) if item == 0 else item for i, item in enumerate(items)]
    if b.symbolic and source is not None:
        new = reshaped(b, x, source, items)
        b.changed["reshape"] += any(a is not c for a, c in zip(new, items, strict=True))
        items = new
    return b.call(torch.reshape, x, items)


@runs("Flatten")
def flatten(x: Tensor, axis: int = 1) -> Tensor:
    """X as a matrix: the axes before `axis`, and the others."""
    axis = axis + x.dim() if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows = rows * size
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, x[(0,) * axis].numel() if rows else 0)


@builds("Flatten")
def _flatten(b: Builder, node: Node) -> Any:
    x, dimensions = b.get(node.inputs[0]), b.shape(node.inputs[0])
    if isinstance(x, fx.Node) and node.facts.get("axis", 1) == 1 and dimensions is not None and len(dimensions) > 1:
        return b.call(torch.flatten, x, 1)
    return NotImplemented


@runs("Transpose")
def transpose(x: Tensor, perm: list[int] | None = None) -> Tensor:
    """The axes of x in another order, by default the reverse."""
    return x.permute(perm if perm is not None else list(range(x.dim()))[::-1])


@builds("Transpose")
def _transpose(b: Builder, node: Node) -> Any:
    x, perm = b.get(node.inputs[0]), node.facts.get("perm")
    if isinstance(x, Constant) and x.tensor.dim() == 2 and perm in (None, [1, 0]):
        return Constant(x.tensor.t(), x.name, not x.flipped, x.derived)
    return b.call(torch.permute, x, perm) if isinstance(x, fx.Node) and perm is not None else NotImplemented


@runs("Concat")
def concat(*xs: Tensor, axis: int) -> Tensor:
    """The inputs one behind the other on an axis."""
    return torch.cat(xs, axis)


@builds("Concat")
def _concat(b: Builder, node: Node) -> Any:
    values = b.inputs(node)
    if any(isinstance(v, Ints) and not v.known for v in values):
        vectors = [b.as_vector(v) for v in values]
        if all(v is not None and not v.scalar for v in vectors):
            return Ints([item for v in vectors if v is not None for item in v.items])
    if all(b.known(v) is not None for v in values):
        return NotImplemented
    axis = node.facts["axis"]
    parts = [b.tensor(v) for v in values]
    moving = [(p, n) for p, n, v in zip(parts, node.inputs, values, strict=True) if isinstance(v, fx.Node)]
    for i, value in enumerate(values):
        if isinstance(value, Constant) and b.symbolic and value.tensor.dim() > 1 and axis % value.tensor.dim():
            other, name = moving[0]
            dimensions = b.shape(name)
            row = b.one_row(value, value.tensor.dim())
            parts[i] = b.tensor(row)
            if row.tensor.shape[0] == 1 and dimensions and dimensions[0] in (1, None, b.batch):
                first = b.size(other, 0, dimensions[0])  # a row that exporters repeated once for each example
                parts[i] = b.graph.call_method("expand", (parts[i], first, *[-1] * (value.tensor.dim() - 1)))
                b.changed["concat"] += 1
    return b.call(torch.cat, parts, axis)


@runs("Split", ints=(1,))
def split(
    x: Tensor, split: list[int] | None = None, axis: int = 0, num_outputs: int = 0, outputs: int = 1
) -> tuple[Tensor, ...]:
    """X cut into parts of the sizes `split`, else into equal ones, the last smaller."""
    if split is not None:
        return torch.split(x, list(split), axis)
    return torch.split(x, -(-x.size(axis) // (num_outputs or outputs)), axis)


@builds("Split")
def _split(b: Builder, node: Node) -> Any:
    values = b.inputs(node)
    x, count = values[0], len(node.outputs)
    sizes = node.facts.get("split")
    if len(values) > 1 and values[1] is not None:
        vector = b.as_vector(values[1])
        sizes = vector.items if vector is not None and vector.known else None
        if sizes is None:
            return NotImplemented
    if isinstance(x, Ints):
        sizes = sizes or [len(x.items) // count] * count
        starts = [sum(sizes[:i]) for i in range(count)]
        return [Ints(x.items[s : s + n]) for s, n in zip(starts, sizes, strict=True)]
    if not isinstance(x, fx.Node):
        return NotImplemented
    axis = node.facts.get("axis", 0)
    equal = sizes is not None and len(set(sizes)) == 1
    dimensions = b.shape(node.inputs[0])
    whole = dimensions is not None and isinstance(dimensions[axis], int) and dimensions[axis] % count == 0
    if (equal and b.symbolic) or (sizes is None and whole):  # follows the number of channels
        parts = b.call(torch.chunk, x, count, axis)
        b.changed["split"] += equal
    elif sizes is not None:
        parts = b.call(torch.split, x, sizes, axis)
    else:
        return NotImplemented
    return [b.call(python.getitem, parts, i) for i in range(count)]


@runs("Squeeze", ints=(1,))
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """X without axes of size 1."""
    return torch.squeeze(x) if axes is None else torch.squeeze(x, tuple(axes))


@runs("Unsqueeze", ints=(1,))
def unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    """X with new axes of size 1 at `axes` of the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(a + rank if a < 0 else a for a in axes):
        x = torch.unsqueeze(x, axis)
    return x


@builds("Squeeze", "Unsqueeze")
def _squeeze(b: Builder, node: Node) -> Any:
    values = b.inputs(node)
    x, axes = values[0], node.facts.get("axes")
    if len(values) > 1:
        vector = b.as_vector(values[1])
        axes = vector.items if vector is not None and vector.known else None
    if isinstance(x, Ints) and not x.known and len(x.items) == 1:
        if node.kind == "Unsqueeze" and x.scalar and axes in ([0], [-1]):
            return Ints(x.items)
        if node.kind == "Squeeze" and not x.scalar and axes in (None, [0], [-1]):
            return Ints(x.items, True)
    if not isinstance(x, fx.Node) or axes is None:
        return NotImplemented
    if node.kind == "Squeeze":
        return b.call(torch.squeeze, x, axes[0] if len(axes) == 1 else tuple(axes))
    if len(axes) > 1 and any(a < 0 for a in axes):
        return NotImplemented
    for axis in sorted(axes):
        x = b.call(torch.unsqueeze, x, axis)
    return x


@runs("Slice", ints=(1, 2, 3, 4))
def slice_axes(
    x: Tensor, starts: list[int], ends: list[int], axes: list[int] | None = None, steps: list[int] | None = None
) -> Tensor:
    """x[start:end:step] on each of the axes; steps may go backwards."""
    axes = list(range(len(starts))) if axes is None else axes
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(axes), strict=True):
        axis = axis + x.dim() if axis < 0 else axis
        if step > 0:
            x = x[(slice(None),) * axis + (slice(start, end, step),)]
        else:
            size = x.size(axis)
            first, last, _ = slice(start, end, step).indices(size)
            x = torch.index_select(x, axis, torch.arange(first, last, step))
    return x


@builds("Slice")
def _slice(b: Builder, node: Node) -> Any:
    values = b.inputs(node)
    x = values[0]
    vectors = [b.as_vector(v) for v in values[1:]]
    if isinstance(x, Ints) and all(v is not None and v.known for v in vectors):
        start, end = vectors[0].items[0], vectors[1].items[0]  # type: ignore[union-attr]
        step = vectors[3].items[0] if len(vectors) > 3 and vectors[3] else 1
        return Ints(x.items[start:end:step])
    if not isinstance(x, fx.Node) or any(v is None for v, given in zip(vectors, values[1:], strict=True) if given):
        return NotImplemented
    starts, ends = vectors[0].items, vectors[1].items  # type: ignore[union-attr]
    axes = vectors[2].items if len(vectors) > 2 and vectors[2] else list(range(len(starts)))
    steps = vectors[3].items if len(vectors) > 3 and vectors[3] else [1] * len(starts)
    dimensions = b.shape(node.inputs[0])
    if dimensions is None or any(not isinstance(s, int) or s < 1 for s in steps):
        return NotImplemented
    cut = [slice(None)] * len(dimensions)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dimensions[axis]
        whole = isinstance(end, int) and end >= (size if isinstance(size, int) else 1 << 31)
        cut[axis] = slice(None if start == 0 else start, None if whole else end, None if step == 1 else step)
    while cut and cut[-1] == slice(None):
        cut.pop()
    return b.call(python.getitem, x, tuple(cut)) if cut else x


@runs("Expand", ints=(1,))
def expand(x: Tensor, shape: list[int]) -> Tensor:
    """X repeated to the shape that it and `shape` broadcast to."""
    shape = list(shape)
    rank = max(len(shape), x.dim())
    sizes, shape = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(shape)) + shape
    out = []
    for own, wanted in zip(sizes, shape, strict=True):
        out.append(own if isinstance(wanted, int) and wanted == 1 else wanted)
    return x.expand(out)


@builds("Expand")
def _expand(b: Builder, node: Node) -> Any:
    """Items that say 1 keep x's own size."""
    x, shape = b.inputs(node)
    vector, dimensions = b.as_vector(shape), b.shape(node.inputs[0])
    if isinstance(x, Ints) and vector is not None and vector.known and len(x.items) == 1 and len(vector.items) == 1:
        return Ints(x.items * vector.items[0])
    if vector is None or dimensions is None or vector.known and isinstance(x, Constant | Ints):
        return NotImplemented
    rank = max(len(vector.items), len(dimensions))
    if isinstance(x, Constant) and len(vector.items) == rank and bool((x.tensor == x.tensor.reshape(-1)[:1]).all()):
        own = [1] * (rank - len(dimensions)) + dimensions
        sizes = [size if item == 1 else item for size, item in zip(own, vector.items, strict=True)]
        return b.call(torch.full, sizes, number(x.tensor), dtype=x.tensor.dtype)
    own = [1] * (rank - len(dimensions)) + dimensions
    items: list[Any] = []
    for size, item in zip(own, [1] * (rank - len(vector.items)) + vector.items, strict=True):
        new = len(items) < rank - len(dimensions)
        if isinstance(item, int) and not new and item in (1, size):
            item = -1
        elif size is None and not isinstance(item, int) and rank == len(dimensions):
            return NotImplemented  # the size may be 1 or the other
        elif isinstance(size, str) and not isinstance(item, int) and b.symbols.get(item) != size:
            return NotImplemented
        items.append(item)
    return b.graph.call_method("expand", (b.tensor(x), *items))


@runs("ConstantOfShape", ints=(0,))
def constant_of_shape(shape: list[int], value: Tensor | None = None) -> Tensor:
    """One value everywhere."""
    if value is None:
        return torch.zeros(list(shape))
    return torch.full(list(shape), value.reshape(()).item(), dtype=value.dtype)


@builds("ConstantOfShape")
def _constant_of_shape(b: Builder, node: Node) -> Any:
    shape, value = b.as_vector(b.get(node.inputs[0])), node.facts.get("value", torch.zeros(1))
    if shape is None or shape.known:
        return NotImplemented
    return b.call(torch.full, shape.items, number(value), dtype=value.dtype)


def number(value: Tensor) -> float:
    """The first number of a tensor; TorchScript fills with no bool."""
    first = value.reshape(-1)[0].item()
    return int(first) if isinstance(first, bool) else first


@runs("Range", ints=())
def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Start, start + delta, ... before limit."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@builds("Range")
def _range(b: Builder, node: Node) -> Any:
    vectors = [b.as_vector(v) for v in b.inputs(node)]
    if any(v is None for v in vectors) or all(v is not None and v.known for v in vectors):
        return NotImplemented
    start, limit, delta = (v.items[0] for v in vectors if v is not None)
    return b.call(torch.arange, start, limit, delta)
