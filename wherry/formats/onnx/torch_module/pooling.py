"""Pools: F.max_pool and F.avg_pool where torch's own rules fit, else written out with the ONNX rules."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.convolution import CONV, margins, widen
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Node

MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def reach(
    x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], pads: list[tuple[int, int]], ceil: int
) -> list[tuple[int, int]]:
    """Margins with what ceil_mode needs behind the end; a window must begin before the end of the right margin."""
    out = []
    for size, k, stride, dilation, (before, after) in zip(x.shape[2:], kernel, strides, dilations, pads, strict=True):
        room = size + before + after - dilation * (k - 1) - 1
        steps = -(-room // stride) if ceil else room // stride
        if ceil and steps * stride >= size + before:
            steps -= 1
        out.append((before, after + max(0, steps * stride - room)))
    return out


@runs("MaxPool")
def max_pool(
    x: Tensor, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    kernel_shape: list[int] = [], pads: list[int] | None = None, storage_order: int = 0,  # noqa: B006
    strides: list[int] | None = None, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The largest of each window, and its place in the whole of x, flat."""
    n = len(kernel_shape)
    strides, dilations = strides or [1] * n, dilations or [1] * n
    around = margins(list(x.shape[2:]), kernel_shape, strides, dilations, pads, auto_pad)
    around = reach(x, kernel_shape, strides, dilations, around, ceil_mode)
    real = x if x.is_floating_point() else x.float()
    wide = widen(real, around, -torch.inf)
    if outputs == 1:
        return (MAX[n](wide, kernel_shape, strides, 0, dilations).to(x.dtype),)
    y, at = MAX[n](wide, kernel_shape, strides, 0, dilations, return_indices=True)
    place, rest = torch.zeros_like(at), at
    sizes = list(x.shape[2:])
    coordinates: list[Tensor] = []
    for axis in reversed(range(n)):
        coordinates.insert(0, rest % wide.shape[2 + axis] - around[axis][0])
        rest = rest // wide.shape[2 + axis]
    order = range(n) if storage_order == 0 else reversed(range(n))
    for axis in order:
        place = place * sizes[axis] + coordinates[axis]
    first = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * n) * prod(sizes)
    return y.to(x.dtype), place + first


def stock(facts: dict[str, Any]) -> dict[str, Any] | None:
    """Kernel, stride and padding as torch's own pools take them; None where these cannot say what the node says."""
    kernel = facts["kernel_shape"]
    n, pads = len(kernel), facts.get("pads") or [0] * (2 * len(kernel))
    simple = facts.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and pads[:n] == pads[n:]
    fits = all(2 * p <= k for p, k in zip(pads, kernel, strict=False)) and n in MAX and not facts.get("ceil_mode")
    if not simple or not fits:
        return None
    return {"kernel_size": kernel, "stride": facts.get("strides", [1] * n), "padding": pads[:n]}


@builds("MaxPool")
def _max_pool(b: Builder, node: Node) -> Any:
    x, facts, pool = b.get(node.inputs[0]), node.facts, stock(node.facts)
    alone = len([o for o in node.outputs if o]) == 1
    if pool is None or not alone or b.kind(node.inputs[0]) not in (1, 10, 11, 16) or not isinstance(x, fx.Node):
        return NotImplemented
    more = {"dilation": facts["dilations"]} if set(facts.get("dilations", [1])) != {1} else {}
    return b.call(MAX[len(pool["kernel_size"])], x, **pool, **more)


def windows(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Tensor:
    """The sum of each window of x [n, c, ...]."""
    y = x.reshape(-1, 1, *x.shape[2:])
    y = CONV[len(kernel)](y, torch.ones(1, 1, *kernel, dtype=x.dtype), None, strides, 0, dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


@runs("AveragePool")
def average_pool(
    x: Tensor, auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: list[int] | None = None, kernel_shape: list[int] = [], pads: list[int] | None = None,  # noqa: B006
    strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """The mean of each window; the margin counts when asked, what ceil_mode adds never."""
    n = len(kernel_shape)
    strides, dilations = strides or [1] * n, dilations or [1] * n
    around = margins(list(x.shape[2:]), kernel_shape, strides, dilations, pads, auto_pad)
    final = reach(x, kernel_shape, strides, dilations, around, ceil_mode)
    counted = torch.ones_like(x[:1, :1])
    if count_include_pad:
        counted = widen(counted, around, 1.0)
        counted = widen(counted, [(0, b[1] - a[1]) for a, b in zip(around, final, strict=True)])
    else:
        counted = widen(counted, final)
    wide = widen(x, final)
    return windows(wide, kernel_shape, strides, dilations) / windows(counted, kernel_shape, strides, dilations)


@builds("AveragePool")
def _average_pool(b: Builder, node: Node) -> Any:
    x, facts, pool = b.get(node.inputs[0]), node.facts, stock(node.facts)
    if pool is None or set(facts.get("dilations", [1])) != {1} or not isinstance(x, fx.Node):
        return NotImplemented
    counted = bool(facts.get("count_include_pad", 0))
    return b.call(AVERAGE[len(pool["kernel_size"])], x, **pool, count_include_pad=counted)


@runs("LpPool")
def power_pool(
    x: Tensor, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: list[int] | None = None,
    kernel_shape: list[int] = [], p: int = 2, pads: list[int] | None = None, strides: list[int] | None = None,  # noqa: B006
) -> Tensor:  # fmt: skip
    """The p-norm of each window."""
    n = len(kernel_shape)
    strides, dilations = strides or [1] * n, dilations or [1] * n
    around = margins(list(x.shape[2:]), kernel_shape, strides, dilations, pads, auto_pad)
    wide = widen(x.abs() ** p, reach(x, kernel_shape, strides, dilations, around, ceil_mode))
    return windows(wide, kernel_shape, strides, dilations) ** (1 / p)


@runs("GlobalAveragePool")
def global_average(x: Tensor) -> Tensor:
    """The mean of each channel, [n, c, 1, ...]."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


@runs("GlobalMaxPool")
def global_max(x: Tensor) -> Tensor:
    """The largest of each channel, [n, c, 1, ...]."""
    return x.amax(list(range(2, x.dim())), keepdim=True)


@runs("GlobalLpPool")
def global_power(x: Tensor, p: int = 2) -> Tensor:
    """The p-norm of each channel, [n, c, 1, ...]."""
    return (x.abs() ** p).sum(list(range(2, x.dim())), keepdim=True) ** (1 / p)


@builds("GlobalAveragePool", "GlobalMaxPool")
def _global(b: Builder, node: Node) -> Any:
    x, dimensions = b.get(node.inputs[0]), b.shape(node.inputs[0])
    if not isinstance(x, fx.Node) or dimensions is None:
        return NotImplemented
    axes = list(range(2, len(dimensions)))
    return b.call(torch.mean if node.kind == "GlobalAveragePool" else torch.amax, x, axes, keepdim=True)


@runs("MaxUnpool", ints=(2,))
def max_unpool(
    x: Tensor, at: Tensor, shape: list[int] | None = None, kernel_shape: list[int] = [],  # noqa: B006
    pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """X put back to the places `at` of a tensor of zeros."""
    n = len(kernel_shape)
    strides, pads = strides or [1] * n, pads or [0] * (2 * n)
    sizes = [(s - 1) * strides[i] - pads[i] - pads[i + n] + kernel_shape[i] for i, s in enumerate(x.shape[2:])]
    own = [*x.shape[:2], *sizes]
    out = x.new_zeros(prod(own)).scatter(0, at.reshape(-1), x.reshape(-1)).reshape(own)
    return out if shape is None else widen(out, [(0, w - s) for w, s in zip(shape[2:], sizes, strict=True)])
