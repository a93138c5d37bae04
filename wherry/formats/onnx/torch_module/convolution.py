"""Convolutions: with constant weights nn.Conv1d/2d/3d and nn.ConvTranspose1d/2d/3d, else functions of tensors.

Pads that differ before and after an axis are a call of F.pad before the layer.
"""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Constant, Node

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
LAYERS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYERS_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def margins(
    sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int], pads: list[int] | None, auto: str
) -> list[tuple[int, int]]:
    """(before, after) for each spatial axis, as `pads` says or as auto_pad computes from the sizes."""
    n = len(kernel)
    if auto in ("", "NOTSET"):
        return [(pads[i], pads[i + n]) for i in range(n)] if pads else [(0, 0)] * n
    if auto == "VALID":
        return [(0, 0)] * n
    out = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        small = total // 2
        out.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    return out


def widen(x: Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """X with margins around its last axes."""
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=value) if any(not isinstance(n, int) or n for n in flat) else x


@runs("Conv")
def convolution(
    x: Tensor, w: Tensor, bias: Tensor | None = None, auto_pad: str = "NOTSET", dilations: list[int] | None = None,
    group: int = 1, kernel_shape: list[int] | None = None, pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """X [n, c, ...] with w [m, c / group, ...] plus bias [m]."""
    n = w.dim() - 2
    strides, dilations = strides or [1] * n, dilations or [1] * n
    x = widen(x, margins(list(x.shape[2:]), list(w.shape[2:]), strides, dilations, pads, auto_pad))
    return CONV[n](x, w, bias, strides, 0, dilations, group)


@runs("ConvTranspose")
def transposed(
    x: Tensor, w: Tensor, bias: Tensor | None = None, auto_pad: str = "NOTSET", dilations: list[int] | None = None,
    group: int = 1, kernel_shape: list[int] | None = None, output_padding: list[int] | None = None,
    output_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """The transpose of a convolution: x [n, c, ...] with w [c, m / group, ...] plus bias [m]."""
    n = w.dim() - 2
    strides, dilations, extra = strides or [1] * n, dilations or [1] * n, output_padding or [0] * n
    # computed without pads, then cut: begins, and ends where output_padding does not reach
    y = CONV_TRANSPOSE[n](x, w, None, strides, 0, 0, group, dilations)
    sizes = [s + e for s, e in zip(y.shape[2:], extra, strict=True)]
    if output_shape is not None or auto_pad not in ("", "NOTSET"):
        wanted = output_shape or [s * t for s, t in zip(x.shape[2:], strides, strict=True)]
        wanted = sizes if auto_pad == "VALID" and output_shape is None else wanted[-n:]
        cut = []
        for size, want in zip(sizes, wanted, strict=True):
            over = max(size - want, 0)
            half = over // 2
            first = half if auto_pad == "SAME_UPPER" else over - half
            cut.append((first, size - want - first))
    else:
        cut = [(pads[i], pads[i + n]) for i in range(n)] if pads else [(0, 0)] * n
    y = widen(y, [(-before, e - after) for (before, after), e in zip(cut, extra, strict=True)])
    return y if bias is None else y + bias.reshape(-1, *[1] * n)


@builds("Conv")
def _conv(b: Builder, node: Node) -> Any:
    x, w, bias = [*b.inputs(node), None][:3]
    facts, n = node.facts, (w.tensor.dim() - 2 if isinstance(w, Constant) else 0)
    if not isinstance(x, fx.Node) or not isinstance(w, Constant) or n not in LAYERS or not w.tensor.is_floating_point():
        return NotImplemented
    if bias is not None and not isinstance(bias, Constant):
        return NotImplemented
    kernel, group = list(w.tensor.shape[2:]), facts.get("group", 1)
    strides, dilations = facts.get("strides", [1] * n), facts.get("dilations", [1] * n)
    auto = facts.get("auto_pad", "NOTSET")
    dimensions = b.shape(node.inputs[0]) or []
    sizes = dimensions[2:] if len(dimensions) == n + 2 else []
    if auto.startswith("SAME"):
        if sizes and all(isinstance(s, int) for s in sizes) or all(s == 1 for s in strides):
            pads = margins(sizes if all(isinstance(s, int) for s in sizes) and sizes else [1 << 20] * n,
                           kernel, strides, dilations, None, auto)  # fmt: skip
        else:
            x, pads = b.call(same_pad, x, kernel, strides, dilations, auto), [(0, 0)] * n
    else:
        pads = margins([], kernel, strides, dilations, facts.get("pads"), auto)
    even = all(before == after for before, after in pads)
    if not even:
        x = b.call(F.pad, x, [v for pair in reversed(pads) for v in pair])
        pads = [(0, 0)] * n
    m, c = w.tensor.shape[0], w.tensor.shape[1] * group
    with torch.device("meta"):
        layer = LAYERS[n](
            c, m, kernel, strides, [p for p, _ in pads], dilations, group, bias is not None, dtype=w.tensor.dtype
        )
    layer.weight = b.parameter(w)
    if isinstance(bias, Constant):
        layer.bias = b.parameter(bias)
    return b.layer(layer, b.place(node, w, *([bias] if bias else [])), x)


def same_pad(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], auto: str) -> Tensor:
    """X with the margins that auto_pad SAME asks for at x's own sizes."""
    return widen(x, margins(list(x.shape[2:]), kernel, strides, dilations, None, auto))


@builds("ConvTranspose")
def _conv_transpose(b: Builder, node: Node) -> Any:
    x, w, bias = [*b.inputs(node), None][:3]
    facts, n = node.facts, (w.tensor.dim() - 2 if isinstance(w, Constant) else 0)
    pads = facts.get("pads") or [0] * (2 * n)
    plain = facts.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and "output_shape" not in facts
    if (
        not plain
        or not isinstance(x, fx.Node)
        or not isinstance(w, Constant)
        or n not in LAYERS
        or pads[:n] != pads[n:]
    ):
        return NotImplemented
    if bias is not None and not isinstance(bias, Constant):
        return NotImplemented
    extra, strides = facts.get("output_padding", [0] * n), facts.get("strides", [1] * n)
    dilations = facts.get("dilations", [1] * n)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        return NotImplemented
    group = facts.get("group", 1)
    with torch.device("meta"):
        layer = LAYERS_TRANSPOSE[n](
            w.tensor.shape[0], w.tensor.shape[1] * group, list(w.tensor.shape[2:]), strides, pads[:n], extra, group,
            bias is not None, dilations, dtype=w.tensor.dtype,
        )  # fmt: skip
    layer.weight = b.parameter(w)
    if isinstance(bias, Constant):
        layer.bias = b.parameter(bias)
    return b.layer(layer, b.place(node, w, *([bias] if bias else [])), x)


@runs("Col2Im", ints=(1, 2))
def columns_to_image(
    x: Tensor, image: list[int], block: list[int], dilations: list[int] | None = None, pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Columns [n, c * prod(block), l] added up at their places in an image [n, c, *image]."""
    n = len(image)
    strides, dilations, pads = strides or [1] * n, dilations or [1] * n, pads or [0] * (2 * n)
    batch, channels = x.shape[0], x.shape[1] // prod(block)
    wide = [s + pads[i] + pads[i + n] for i, s in enumerate(image)]
    steps = [(w - d * (k - 1) - 1) // s + 1 for w, k, s, d in zip(wide, block, strides, dilations, strict=True)]
    flat = torch.zeros(1, dtype=torch.int64)
    for axis in range(n):
        place = torch.arange(block[axis])[:, None] * dilations[axis] + torch.arange(steps[axis])[None] * strides[axis]
        view = [1] * (2 * n)
        view[axis], view[n + axis] = place.shape
        flat = flat * wide[axis] + place.reshape(view)
    out = x.new_zeros(batch, channels, prod(wide))
    index = flat.reshape(1, 1, -1).expand(batch, channels, -1)
    out = out.scatter_add(2, index, x.reshape(batch, channels, -1)).reshape(batch, channels, *wide)
    return widen(out, [(-pads[i], -pads[i + n]) for i in range(n)])
