"""Products of matrices: Gemm and MatMul with a constant become nn.Linear, Gather of a table nn.Embedding; Einsum."""

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from wherry.errors import BadInput
from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import builds, is_torch, runs
from wherry.formats.onnx.torch_module.values import Constant, Ints, Node

is_torch("MatMul", torch.matmul)


@runs("Gemm")
def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
    transB: int = 0,
) -> Tensor:  # fmt: skip
    """Alpha * a @ b + beta * c, a and b transposed where asked."""
    y = torch.matmul(a.t() if transA else a, b.t() if transB else b)
    y = y if alpha == 1 else (y * alpha).to(y.dtype)
    return y if c is None else y + (c if beta == 1 else (c * beta).to(c.dtype))


@runs("Einsum")
def einsum(*xs: Tensor, equation: str) -> Tensor:
    """Sums of products by Einstein's convention."""
    if re.search(r"[^a-zA-Z,.\-> ]", equation):
        raise BadInput(f"einsum cannot read {equation!r}")
    return torch.einsum(equation, *xs)


def linear(b: Builder, node: Node, x: fx.Node, weight: Constant, bias: Constant | None, change: str) -> fx.Node:
    """A call of nn.Linear; weight [k, n] (change "t") or [n, k]; bias [n] or None."""
    n, k = weight.tensor.shape[::-1] if change == "t" else weight.tensor.shape
    with torch.device("meta"):
        layer = nn.Linear(k, n, bias is not None, dtype=weight.tensor.dtype)
    layer.weight = b.parameter(weight, change)
    if bias is not None:
        layer.bias = b.parameter(bias)
    return b.layer(layer, b.place(node, weight, *([bias] if bias is not None else [])), x)


def is_matrix(value: Any) -> bool:
    """Whether a value is a constant float matrix."""
    return isinstance(value, Constant) and value.tensor.dim() == 2 and value.tensor.is_floating_point()


@builds("MatMul")
def _matmul(b: Builder, node: Node) -> Any:
    x, w = b.inputs(node)
    if not isinstance(x, fx.Node) or not is_matrix(w):
        return NotImplemented
    bias = bias_behind(b, node, w.tensor.shape[1])
    y = linear(b, node, x, w, bias, "t")
    return y


def bias_behind(b: Builder, node: Node, n: int) -> Constant | None:
    """The constant vector that the only reader of the node adds; that Add is then done."""
    name = node.outputs[0]
    readers = b.consumers.get(name, [])
    if len(readers) != 1 or readers[0].kind != "Add" or readers[0].domain or name in b.outputs:
        return None
    add = readers[0]
    other = add.inputs[1] if add.inputs[0] == name else add.inputs[0]
    value = b.peek(other)
    if not isinstance(value, Constant) or list(value.tensor.shape) != [n]:
        return None
    b.follow(add.outputs[0], name)
    return value


@builds("Gemm")
def _gemm(b: Builder, node: Node) -> Any:
    x, w, c = [*b.inputs(node), None][:3]
    facts = node.facts
    plain = not facts.get("transA") and facts.get("alpha", 1.0) == 1 and facts.get("beta", 1.0) == 1
    if not plain or not isinstance(x, fx.Node) or not is_matrix(w):
        return NotImplemented
    n = w.tensor.shape[0 if facts.get("transB") else 1]
    if c is not None and (not isinstance(c, Constant) or c.tensor.numel() != n or c.tensor.shape[-1] != n):
        return NotImplemented
    if isinstance(c, Constant) and c.tensor.dim() != 1:
        c = Constant(c.tensor.reshape(n), c.name, derived=True)
    return linear(b, node, x, w, c, "" if facts.get("transB") else "t")


@runs("Gather")
def gather(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """Slices of x at `index` (negative: from the end) of an axis; the shape of index takes the axis's place."""
    axis = axis + x.dim() if axis < 0 else axis
    index = torch.where(index < 0, index + x.size(axis), index)
    return torch.index_select(x, axis, index.reshape(-1)).reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@builds("Gather")
def _gather(b: Builder, node: Node) -> Any:
    x, index = b.inputs(node)
    at = b.as_vector(index)
    if isinstance(x, Ints) and at is not None and at.known:
        return Ints([x.items[i] for i in at.items], at.scalar)
    axis = node.facts.get("axis", 0)
    if isinstance(x, Constant) and isinstance(index, fx.Node) and is_matrix(x) and axis == 0:
        rows, columns = x.tensor.shape
        with torch.device("meta"):
            layer = nn.Embedding(rows, columns, dtype=x.tensor.dtype)
        layer.weight = b.parameter(x)
        return b.layer(layer, b.place(node, x), index)
    if isinstance(x, fx.Node) and at is not None and at.known and at.scalar and at.items[0] >= 0:
        return b.call(torch.select, x, axis, at.items[0])
    return NotImplemented
