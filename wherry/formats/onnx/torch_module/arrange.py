"""Operators that repeat, pad, crop and rearrange: Tile, Pad, Trilu, DepthToSpace, ReverseSequence and kin."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Ints, Node, dtype_of


@runs("Tile", ints=(1,))
def tile(x: Tensor, repeats: list[int]) -> Tensor:
    """X again and again on each axis."""
    return x.repeat(list(repeats))


@runs("Pad", ints=(1, 3))
def pad(
    x: Tensor, pads: list[int], constant_value: Tensor | None = None, axes: list[int] | None = None,
    mode: str = "constant",
) -> Tensor:  # fmt: skip
    """X with more before and after each axis (or less); pads: all begins, then all ends."""
    axes = list(range(x.dim())) if axes is None else [a + x.dim() if a < 0 else a for a in axes]
    if mode == "constant":
        wide = [0] * (2 * x.dim())
        for i, axis in enumerate(axes):
            wide[2 * (x.dim() - 1 - axis)], wide[2 * (x.dim() - 1 - axis) + 1] = pads[i], pads[i + len(axes)]
        value = (
            0
            if constant_value is None
            else constant_value.item()
            if isinstance(constant_value, Tensor)
            else constant_value
        )
        return F.pad(x, wide, value=value)
    for i, axis in enumerate(axes):
        before, after, size = pads[i], pads[i + len(axes)], x.size(axis)
        index = torch.arange(-before, size + after)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = torch.remainder(index, size)
        else:
            period = max(2 * (size - 1), 1)
            index = torch.remainder(index, period)
            index = torch.where(index >= size, period - index, index)
        x = torch.index_select(x, axis, index)
    return x


@builds("Pad")
def _pad(b: Builder, node: Node) -> Any:
    """Known pads of a known rank: F.pad."""
    x, pads, value, axes = [*b.inputs(node), None, None, None][:4]
    counts, dimensions = b.as_vector(pads), b.shape(node.inputs[0])
    number = 0.0 if value is None else b.known(value)
    places = b.as_vector(axes) if axes is not None else Ints(list(range(len(dimensions or []))))
    if not isinstance(x, fx.Node) or counts is None or dimensions is None or number is None or places is None:
        return NotImplemented
    mode, rank = node.facts.get("mode", "constant"), len(dimensions)
    wide: list[Any] = [0] * (2 * rank)
    for i, axis in enumerate(a % rank for a in places.items):
        wide[2 * (rank - 1 - axis)], wide[2 * (rank - 1 - axis) + 1] = (
            counts.items[i],
            counts.items[i + len(places.items)],
        )
    if mode == "constant":
        while wide and isinstance(wide[-1], int) and isinstance(wide[-2], int) and wide[-1] == wide[-2] == 0:
            wide = wide[:-2]
        return b.call(F.pad, x, wide, value=number.item() if isinstance(number, Tensor) else number)
    return NotImplemented


@runs("EyeLike")
def eye_like(x: Tensor, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal of a matrix of x's shape."""
    wanted = x.dtype if dtype is None else dtype_of(dtype)
    return (torch.arange(x.shape[1])[None] == torch.arange(x.shape[0])[:, None] + k).to(wanted)


@runs("Trilu", ints=(1,))
def trilu(x: Tensor, k: int | None = None, upper: int = 1) -> Tensor:
    """The upper or lower triangle from the k-th diagonal on."""
    return torch.triu(x, k or 0) if upper else torch.tril(x, k or 0)


@runs("DepthToSpace")
def depth_to_space(x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels [n, c b b, h, w] as pixels [n, c, h b, w b]."""
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    y = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@runs("SpaceToDepth")
def space_to_depth(x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    """Pixels [n, c, h b, w b] as channels [n, b b c, h, w]."""
    if mode == "CRD":
        return F.pixel_unshuffle(x, blocksize)
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@runs("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first `length` steps of each example in reverse."""
    y = x.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(y.shape[1])[None]
    index = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    return y[torch.arange(y.shape[0])[:, None], index].movedim((0, 1), (batch_axis, time_axis))


@runs("CenterCropPad", ints=(1,))
def center_crop_pad(x: Tensor, shape: list[int], axes: list[int] | None = None) -> Tensor:
    """X cut or padded with zeros around its middle, to `shape` on `axes`."""
    for axis, wanted in zip(range(x.dim()) if axes is None else axes, shape, strict=True):
        size, axis = x.size(axis), axis + x.dim() if axis < 0 else axis
        if wanted < size:
            x = x.narrow(axis, (size - wanted) // 2, wanted)
        else:
            before = (wanted - size) // 2
            x = F.pad(x, [0] * (2 * (x.dim() - 1 - axis)) + [before, wanted - size - before])
    return x
