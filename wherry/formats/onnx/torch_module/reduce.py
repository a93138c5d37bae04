"""Sums, means, extremes and kin along axes; ArgMax, TopK, CumSum."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.elementwise import on_ints
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Ints, Node


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep).to(x.dtype)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % max(x.dim(), 1) for a in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    if x.numel() == 0:
        if x.dtype == torch.bool:
            end: Any = not largest
        else:
            info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
            end = (-torch.inf if largest else torch.inf) if x.is_floating_point() else info.min if largest else info.max
        sizes = [1 if i in axes else s for i, s in enumerate(x.shape)] if keep else [
            s for i, s in enumerate(x.shape) if i not in axes
        ]  # fmt: skip
        return torch.full(sizes, end, dtype=x.dtype)
    return x.amax(axes, keep) if largest else x.amin(axes, keep)


WAYS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceProd": _prod,
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, True),
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, False),
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: _sum(x.float() ** 2, axes, keep).sqrt().to(x.dtype),
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}
KEEP = {"ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceLogSum": torch.log, "ReduceSumSquare": torch.square}


def reduce(
    x: Tensor, axes: list[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0, kind: str = ""
) -> Tensor:
    """X reduced along `axes`: by default all, or none with noop_with_empty_axes; `kind` is the operator's name."""
    if axes is None or len(axes) == 0:
        if noop_with_empty_axes:
            return KEEP[kind](x) if kind in KEEP else x
        axes = list(range(x.dim()))
    axes = [a + x.dim() if a < 0 else a for a in axes]
    return WAYS[kind](x, axes, bool(keepdims)) if axes else WAYS[kind](x[None], [0], False)


for _name in WAYS:
    runs(_name, ints=(1,))(reduce)
DIRECT: dict[str, Any] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
}


@builds(*WAYS)
def _reduce(b: Builder, node: Node) -> Any:
    x, facts = b.get(node.inputs[0]), node.facts
    if isinstance(x, Ints) and not x.known and node.kind == "ReduceProd":
        out = Ints(x.items[:1], True)
        for item in x.items[1:]:
            out = on_ints(b, operator.mul, out, Ints([item], True))
        return Ints(out.items, not facts.get("keepdims", 1))
    axes, dimensions = facts.get("axes"), b.shape(node.inputs[0])
    if len(node.inputs) > 1 and node.inputs[1]:
        vector = b.as_vector(b.get(node.inputs[1]))
        axes = vector.items if vector is not None and vector.known else None
        dimensions = dimensions if vector is not None else None
    if not axes and not facts.get("noop_with_empty_axes") and dimensions:
        axes = list(range(len(dimensions)))
    direct: Any = DIRECT.get(node.kind)
    if isinstance(x, fx.Node) and direct is not None and axes and b.kind(node.inputs[0]) == 1:
        return b.call(direct, x, axes, keepdim=bool(facts.get("keepdims", 1)))
    node.facts["kind"] = node.kind
    return NotImplemented


def argument(x: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0, largest: bool = True) -> Tensor:
    """The place of the largest (or smallest) along an axis: the first, or the last, of equals."""
    real = x if x.is_floating_point() or x.dtype == torch.int64 else x.to(torch.int64)
    pick = torch.argmax if largest else torch.argmin
    if not select_last_index:
        return pick(real, axis, bool(keepdims))
    return x.size(axis) - 1 - pick(real.flip(axis), axis, bool(keepdims))


@runs("ArgMax")
def argument_of_largest(x: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """The place of the largest along an axis."""
    return argument(x, axis, keepdims, select_last_index)


@runs("ArgMin")
def argument_of_smallest(x: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """The place of the smallest along an axis."""
    return argument(x, axis, keepdims, select_last_index, False)


@runs("TopK", ints=(1,))
def top_k(x: Tensor, k: list[int], axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, ...]:
    """The k largest or smallest along an axis and their places; of equals the first."""
    count = k[0] if isinstance(k, list | tuple) else k
    order = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return order.values.narrow(axis, 0, count), order.indices.narrow(axis, 0, count)


@runs("CumSum", ints=(1,))
def running_sum(x: Tensor, axis: int, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """The sum of all before (and, unless exclusive, with) each place."""
    axis = axis[0] if isinstance(axis, list) else axis
    y = x.flip(axis) if reverse else x
    z = torch.cumsum(y, axis, dtype=x.dtype)
    z = z - y if exclusive else z
    return z.flip(axis) if reverse else z


@runs("CumProd", ints=(1,))
def running_product(x: Tensor, axis: int, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """The product of all before (and, unless exclusive, with) each place."""
    axis = axis[0] if isinstance(axis, list) else axis
    y = x.flip(axis) if reverse else x
    if exclusive:
        y = torch.cat([torch.ones_like(y.narrow(axis, 0, 1)), y.narrow(axis, 0, y.size(axis) - 1)], axis)
    z = torch.cumprod(y, axis, dtype=x.dtype)
    return z.flip(axis) if reverse else z


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) over its sum along an axis."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """The logarithm of the softmax along an axis."""
    return torch.log_softmax(x, axis)


runs("Softmax")(softmax)
runs("LogSoftmax")(log_softmax)


@builds("Softmax", "LogSoftmax")
def _softmax(b: Builder, node: Node) -> Any:
    x = b.get(node.inputs[0])
    function = torch.softmax if node.kind == "Softmax" else torch.log_softmax
    return b.call(function, x, node.facts.get("axis", -1)) if isinstance(x, fx.Node) else NotImplemented


@runs("Hardmax")
def hardmax(x: Tensor, axis: int = -1) -> Tensor:
    """1 at the first of the largest along an axis, else 0."""
    return torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, True), 1)


@runs("LpNormalization")
def unit_length(x: Tensor, axis: int = -1, p: int = 2) -> Tensor:
    """X over its p-norm along an axis; zeros stay."""
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return torch.where(norm == 0, 0, x / norm)
