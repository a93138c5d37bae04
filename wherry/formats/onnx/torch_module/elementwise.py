"""Operators that work number by number, with ONNX's broadcasting (numpy's, as torch's).

A constant scalar stands in the graph as a Python number. Sums and products of sizes stay Python ints.
"""

import math
import operator as python
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import TABLE, builds, is_torch, runs
from wherry.formats.onnx.torch_module.values import Constant, Ints, Node, dtype_of

for _name in ("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor",
              "Log", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Tan",
              "Tanh", "Greater", "Less", "Equal", "Where", "Det"):  # fmt: skip
    is_torch(_name, getattr(torch, {"Equal": "eq", "Greater": "gt", "Less": "lt"}.get(_name, _name.lower())))
is_torch("GreaterOrEqual", torch.ge)
is_torch("LessOrEqual", torch.le)
is_torch("Not", torch.logical_not)
is_torch("And", torch.logical_and)
is_torch("Or", torch.logical_or)
is_torch("Xor", torch.logical_xor)
is_torch("BitwiseAnd", torch.bitwise_and)
is_torch("BitwiseOr", torch.bitwise_or)
is_torch("BitwiseXor", torch.bitwise_xor)
is_torch("BitwiseNot", torch.bitwise_not)
is_torch("IsNaN", torch.isnan)
is_torch("Softplus", F.softplus)
is_torch("Softsign", F.softsign)
is_torch("Mish", F.mish)
is_torch("HardSwish", F.hardswish)
is_torch("LeakyRelu", F.leaky_relu, alpha=("negative_slope", 0.01))
is_torch("Elu", F.elu, alpha=("alpha", 1.0))
is_torch("Celu", F.celu, alpha=("alpha", 1.0))
is_torch("Gelu", F.gelu, approximate=("approximate", "none"))
is_torch("com.microsoft::Gelu", F.gelu)
is_torch("Add", torch.add)
is_torch("Sub", torch.sub)
is_torch("Mul", torch.mul)
WIDE = {
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}  # torch barely computes in these


@runs("Div")
def divide(x: Tensor, y: Tensor) -> Tensor:
    """X / y; of integers, cut towards zero."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@runs("Pow")
def power(x: Tensor, y: Tensor) -> Tensor:
    """X to the power of y, in the type of x."""
    wide = torch.promote_types(x.dtype, y.dtype) if isinstance(y, Tensor) else x.dtype
    return torch.pow(x.to(wide), y).to(x.dtype)


@runs("Mod")
def modulo(x: Tensor, y: Tensor, fmod: int = 0) -> Tensor:
    """The rest of x / y, with the sign of y, or of x when fmod."""
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


@runs("Sum")
def total(*xs: Tensor) -> Tensor:
    """The sum of all inputs."""
    out = xs[0]
    for x in xs[1:]:
        out = out + x
    return out


@runs("Mean")
def average(*xs: Tensor) -> Tensor:
    """The mean of all inputs."""
    return total(*xs) / len(xs)


@runs("Max")
def largest(*xs: Tensor) -> Tensor:
    """The largest of all inputs."""
    out = xs[0]
    for x in xs[1:]:
        out = torch.maximum(out, x)
    return out


@runs("Min")
def smallest(*xs: Tensor) -> Tensor:
    """The smallest of all inputs."""
    out = xs[0]
    for x in xs[1:]:
        out = torch.minimum(out, x)
    return out


@runs("Clip")
def clip(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    """min(max(x, min), max); the upper bound wins."""
    x = x if min is None else torch.maximum(x, min.reshape(()))
    return x if max is None else torch.minimum(x, max.reshape(()))


@runs("Cast")
def cast(x: Tensor, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """X in another type; beyond the range of an 8-bit float it is cut (saturate) or becomes NaN or infinity."""
    return convert(x, dtype_of(to), saturate, to)


@runs("CastLike")
def cast_like(x: Tensor, y: Tensor, saturate: int = 1, round_mode: str = "up", to: int = 0) -> Tensor:
    """X in the type of y, which ONNX numbers `to`."""
    return convert(x, y.dtype, saturate, to)


@builds("CastLike")
def _cast_like(b: Builder, node: Node) -> Any:
    node.facts["to"] = b.kind(node.inputs[1]) or 0  # types of less than a byte are held in bytes
    return NotImplemented


def convert(x: Tensor, dtype: torch.dtype, saturate: int = 1, to: int = 0) -> Tensor:
    """X in the type `dtype`, with the ONNX rules for 8-bit floats and for integers of less than a byte (type `to`)."""
    if to in (21, 22, 25, 26):  # uint4, int4, uint2, int2: the lowest bits
        bits, signed = (4, to == 22) if to in (21, 22) else (2, to == 26)
        x = x.to(torch.int64) & ((1 << bits) - 1)
        return (torch.where(x >= 1 << (bits - 1), x - (1 << bits), x) if signed else x).to(dtype)
    if dtype.is_floating_point and dtype.itemsize == 1 and x.is_floating_point():
        wide = x.float()
        if saturate:
            info = torch.finfo(dtype)
            wide = wide.clamp(info.min, info.max)
        elif dtype == torch.float8_e4m3fn:
            wide = torch.where(wide.abs() > 464, torch.nan, wide)
        return wide.to(dtype)
    return x.to(dtype)


@runs("BitCast")
def bit_cast(x: Tensor, to: int) -> Tensor:
    """The same bits read as another type of the same width."""
    return x.view(dtype_of(to))


@runs("BitShift")
def bit_shift(x: Tensor, y: Tensor, direction: str) -> Tensor:
    """The bits of x moved by y places."""
    wide = WIDE.get(x.dtype, x.dtype)
    a, b = x.to(wide), y.to(wide)
    return (a << b if direction == "LEFT" else a >> b).to(x.dtype)


@runs("IsInf")
def is_infinite(x: Tensor, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where x is infinite, of the signs asked for."""
    x = x if x.dtype.itemsize > 1 else x.float()
    positive, negative = x == math.inf, x == -math.inf
    return (positive & bool(detect_positive)) | (negative & bool(detect_negative))


@runs("Selu")
def selu(x: Tensor, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """Gamma * x, below zero gamma * alpha * (exp(x) - 1)."""
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@runs("HardSigmoid")
def hard_sigmoid(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Alpha * x + beta, kept in 0 to 1."""
    return torch.clamp(x * alpha + beta, 0, 1)


@runs("ThresholdedRelu")
def thresholded_relu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """X where it is above alpha, else 0."""
    return torch.where(x > alpha, x, 0)


@runs("Shrink")
def shrink(x: Tensor, lambd: float = 0.5, bias: float = 0.0) -> Tensor:
    """X + bias below -lambd, x - bias above lambd, else 0."""
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0)).to(x.dtype)


@runs("PRelu")
def parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    """X, below zero times slope."""
    return torch.where(x < 0, slope * x, x)


@runs("Swish", "com.microsoft::QuickGelu")
def swish(x: Tensor, alpha: float = 1.0) -> Tensor:
    """X * sigmoid(alpha * x)."""
    return x * torch.sigmoid(alpha * x)


@builds("com.microsoft::QuickGelu")
def _quick_gelu(b: Builder, node: Node) -> Any:
    node.facts.setdefault("alpha", 1.702)
    return NotImplemented


@runs("SwiGLU")
def swiglu(gate: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    """X times swish of the gate."""
    return swish(gate, alpha) * x


@runs("Identity")
def identity(x: Tensor) -> Tensor:
    """X itself."""
    return x


@runs("Dropout")
def dropout(
    x: Tensor, ratio: Tensor | None = None, training_mode: Tensor | None = None, seed: int | None = None,
    outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """X itself and a mask of ones; in training mode torch's own random numbers are dropped."""
    if training_mode is not None and bool(training_mode):
        p = 0.5 if ratio is None else float(ratio)
        keep = torch.rand(x.shape) >= p
        return torch.where(keep, x / (1 - p) if p < 1 else x, 0), keep
    return x, torch.ones_like(x, dtype=torch.bool)


@builds("Identity")
def _identity(b: Builder, node: Node) -> Any:
    return b.get(node.inputs[0])


@builds("Dropout")
def _dropout(b: Builder, node: Node) -> Any:
    x, *rest = b.inputs(node)
    mode = b.known(rest[1]) if len(rest) > 1 and rest[1] is not None else torch.tensor(False)
    if len(node.outputs) == 1 and mode is not None and not bool(mode):
        return x
    return NotImplemented


def trunc_div(x: int, y: int) -> int:
    """X / y of Python ints, cut towards zero."""
    return x // y if (x >= 0) == (y > 0) else -(-x // y)


ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": python.add, "Sub": python.sub, "Mul": python.mul, "Div": trunc_div, "Mod": python.mod, "Max": max,
    "Min": min,
}  # fmt: skip


def on_ints(b: Builder, function: Callable, *values: Ints) -> Ints:
    """`function` on every item of int vectors of one length, or scalars."""
    length = max(len(v.items) for v in values)
    out = []
    for i in range(length):
        args = [v.items[i if len(v.items) > 1 else 0] for v in values]
        known = all(isinstance(a, int) for a in args)
        out.append(function(*args) if known else _shorter(b, function, args))
    return Ints(out, all(v.scalar for v in values))


def _shorter(b: Builder, function: Callable, args: list[Any]) -> Any:
    if function in (python.mul, trunc_div) and args[1] == 1 or function in (python.add, python.sub) and args[1] == 0:
        return args[0]
    if function is python.mul and args[0] == 1 or function is python.add and args[0] == 0:
        return args[1]
    return b.call(function, *args)


@builds("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Pow", "Where", "Greater", "Less", "GreaterOrEqual",
        "LessOrEqual", "And", "Or", "Clip")  # fmt: skip
def _binary(b: Builder, node: Node) -> Any:
    values = b.inputs(node)
    if any(isinstance(v, Ints) and not v.known for v in values):
        vectors = [b.as_vector(v) for v in values]
        lengths = {len(v.items) for v in vectors if v is not None}
        fits = all(v is not None for v in vectors) and len(lengths - {1}) <= 1
        if fits and node.kind in ARITHMETIC and len(values) == 2 and not node.facts.get("fmod"):
            return on_ints(b, ARITHMETIC[node.kind], *[v for v in vectors if v is not None])
        if node.kind == "Where" and (chosen := _where_ints(b, values)) is not None:
            return chosen
    if node.kind == "Clip" and isinstance(values[0], fx.Node):
        return _clip(b, node, values)
    ranks = [len(b.shape(name) or []) for name in node.inputs if name]
    if any(isinstance(v, fx.Node) for v in values):
        rows = [b.one_row(v, max(ranks, default=0)) for v in values]
        if any(r is not v for r, v in zip(rows, values, strict=True)):
            return b.generic(node, values=rows)
    first = values[0]
    if len(values) == 2 and isinstance(first, fx.Node) and isinstance(values[1], Constant):
        if (number := scalar_of(b, node, 0, values[1])) is not None:
            entry = TABLE[node.domain, node.kind]
            assert entry.run is not None
            floating = isinstance(number, float)
            if node.kind == "Div" and floating:
                return b.call(torch.div, first, number)
            if node.kind == "Pow" and floating:
                return b.call(torch.pow, first, int(number) if number.is_integer() else number)
            if node.kind in ("Add", "Sub", "Mul", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"):
                return b.call(entry.run, first, number)
    if len(values) == 2 and isinstance(first, Constant) and isinstance(values[1], fx.Node):
        number = scalar_of(b, node, 1, first)
        if number is not None and node.kind in ("Add", "Mul"):
            return b.call(torch.add if node.kind == "Add" else torch.mul, values[1], number)
        if number is not None and node.kind == "Sub":
            return b.call(torch.rsub, values[1], number)
    return NotImplemented


def scalar_of(b: Builder, node: Node, other: int, value: Constant) -> Any:
    """The number of a constant of one element, when the result keeps the shape of the input `other`."""
    t = value.tensor
    if t.numel() != 1 or t.dtype == torch.bool or t.dtype in WIDE or t.is_complex():
        return None
    rank = b.shape(node.inputs[other])
    if t.dim() and (rank is None or len(rank) < t.dim()):
        return None
    number = t.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _clip(b: Builder, node: Node, values: list) -> Any:
    bounds = [b.known(v) if v is not None else None for v in [*values[1:], None, None][:2]]
    if any(v is not None and k is None for v, k in zip(values[1:], bounds, strict=False)):
        return NotImplemented
    low, high = (None if k is None else k.item() for k in bounds)
    if low is None and high is None:
        return values[0]
    if low is not None and high is not None and low > high:
        return NotImplemented
    return b.call(torch.clamp, values[0], min=low, max=high)


def _where_ints(b: Builder, values: list) -> Ints | None:
    """Where(condition, shape, shape) with a known condition: what exporters write for -1 in expand."""
    condition, first, second = b.known(values[0]), b.as_vector(values[1]), b.as_vector(values[2])
    if condition is None or first is None or second is None:
        return None
    length = max(condition.numel(), len(first.items), len(second.items))
    pick = condition.reshape(-1).tolist()
    items = []
    for i in range(length):
        side = first if pick[i if len(pick) > 1 else 0] else second
        items.append(side.items[i if len(side.items) > 1 else 0])
    return Ints(items, condition.dim() == 0 and first.scalar and second.scalar)


@builds("Equal")
def _equal(b: Builder, node: Node) -> Any:
    """A size equals no negative number; a size with itself always."""
    first, second = (b.as_vector(v) for v in b.inputs(node))
    if first is None or second is None or first.known and second.known:
        return NotImplemented
    length = max(len(first.items), len(second.items))
    out = []
    for i in range(length):
        x, y = (v.items[i if len(v.items) > 1 else 0] for v in (first, second))
        if isinstance(x, int) and isinstance(y, int):
            out.append(x == y)
        elif x is y:
            out.append(True)
        elif (isinstance(x, int) and x < 0) or (isinstance(y, int) and y < 0):
            out.append(False)
        elif length == 1 and b.only_read_by(node.outputs[0], "If"):
            return Ints([b.call(python.eq, x, y)], True)  # a Python bool: a size is known when the module runs
        else:
            return NotImplemented
    return Constant(torch.tensor(out[0] if first.scalar and second.scalar else out))


@builds("Cast")
def _cast(b: Builder, node: Node) -> Any:
    value = b.get(node.inputs[0])
    if node.facts.get("to") in (6, 7) and isinstance(value, Ints):
        return value if node.facts["to"] == 7 or not value.known else NotImplemented
    if isinstance(value, fx.Node) and node.facts.get("to") in (1, 6, 7, 9, 10, 11, 16):
        return b.graph.call_method("to", (value, dtype_of(node.facts["to"])))
    return NotImplemented
