"""Resize in all its coordinate modes, Upsample, GridSample, AffineGrid, RoiAlign, DeformConv.

Idea:   along each axis a Resize is a matrix of weights over neighbours; nearest, linear and cubic differ in their
        weights alone. F.interpolate is taken where torch has exactly the same rule.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Node


def coordinates(old: int, new: int, scale: float, way: str, begin: float = 0.0, end: float = 1.0) -> Tensor:
    """Where each of the `new` places lies among the `old` ones, float64 [new]."""
    at = torch.arange(new, dtype=torch.float64)
    if way == "asymmetric":
        return at / scale
    if way == "align_corners":
        return at * (old - 1) / (new - 1) if new > 1 else at * 0
    if way == "tf_crop_and_resize":
        if new > 1:
            return begin * (old - 1) + at * (end - begin) * (old - 1) / (new - 1)
        return at * 0 + 0.5 * (begin + end) * (old - 1)
    if way == "pytorch_half_pixel" and new <= 1:
        return at * 0
    shift = 0.0
    if way == "half_pixel_symmetric":
        shift = old / 2 * (1 - new / (scale * old))
    return shift + (at + 0.5) / scale - 0.5


def nearest(at: Tensor, way: str) -> Tensor:
    """Coordinates as whole places."""
    if way == "round_prefer_floor":
        return torch.ceil(at - 0.5)
    if way == "round_prefer_ceil":
        return torch.floor(at + 0.5)
    return torch.floor(at) if way == "floor" else torch.ceil(at)


def cubic(t: Tensor, a: float) -> Tensor:
    """Keys' kernel at distance t >= 0."""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def weights(at: Tensor, old: int, mode: str, a: float, outside: int, shrink: float) -> Tensor:
    """Weights [new, old] of the neighbours of each coordinate; shrink < 1 widens the kernel (antialias)."""
    stretch = 1 / shrink if shrink < 1 else 1.0
    radius = math.ceil((2 if mode == "cubic" else 1) * stretch)
    first = torch.floor(at) - radius + 1
    places = first[:, None] + torch.arange(2 * radius)[None]
    distance = (places - at[:, None]).abs() / stretch
    w = cubic(distance, a) if mode == "cubic" else (1 - distance).clamp(min=0)
    if outside:
        w = torch.where((places < 0) | (places >= old), 0, w)
    if outside or stretch > 1:
        total = w.sum(1, keepdim=True)
        w = torch.where(total == 0, 0, w / torch.where(total == 0, 1, total))
    index = places.clamp(0, old - 1).to(torch.int64)
    return torch.zeros(len(at), old, dtype=torch.float64).scatter_add(1, index, w)


@runs("Resize", ints=(3,))
def resize(
    x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: list[int] | None = None,
    antialias: int = 0, axes: list[int] | None = None, coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest", nearest_mode: str = "round_prefer_floor",
) -> Tensor:  # fmt: skip
    """X at other sizes along `axes`, by scales or to sizes."""
    places = list(range(x.dim())) if axes is None else [a + x.dim() if a < 0 else a for a in axes]
    factors = scales.tolist() if scales is not None and scales.numel() else None
    if factors is None:
        assert sizes is not None
        factors = [s / x.size(a) for s, a in zip(sizes, places, strict=True)]
        new = list(sizes)
        if keep_aspect_ratio_policy != "stretch":
            one = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [one] * len(factors)
            new = [math.floor(x.size(a) * one + 0.5) for a in places]
    else:
        new = [math.floor(x.size(a) * f) for a, f in zip(places, factors, strict=True)]
    box = roi.tolist() if roi is not None else []
    dtype, y = x.dtype, x
    for i, axis in enumerate(places):
        old, way = x.size(axis), coordinate_transformation_mode
        begin, end = (box[i], box[i + len(places)]) if way == "tf_crop_and_resize" else (0.0, 1.0)
        if new[i] == old and factors[i] == 1 and (begin, end) == (0.0, 1.0):
            continue
        at = coordinates(old, new[i], factors[i], way, begin, end)
        if mode == "nearest":
            y = torch.index_select(y, axis, nearest(at, nearest_mode).clamp(0, old - 1).to(torch.int64))
        else:
            shrink = factors[i] if antialias else 1.0
            w = weights(at, old, mode, cubic_coeff_a, exclude_outside, shrink)
            y = torch.matmul(y.movedim(axis, -1).double(), w.t()).movedim(-1, axis)
        if way == "tf_crop_and_resize":
            out = (at < 0) | (at > old - 1)
            y = torch.where(out.reshape([-1 if j == axis else 1 for j in range(x.dim())]), extrapolation_value, y)
    if not dtype.is_floating_point and mode != "nearest":
        info = torch.iinfo(dtype)
        y = torch.round(y).clamp(info.min, info.max)
    return y.to(dtype)


@runs("Upsample")
def upsample(x: Tensor, scales: Tensor, mode: str = "nearest") -> Tensor:
    """Resize with asymmetric coordinates."""
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


SAME_RULE = {("nearest", "asymmetric"): ("nearest", None), ("linear", "half_pixel"): ("linear", False),
             ("linear", "pytorch_half_pixel"): ("linear", False), ("linear", "align_corners"): ("linear", True),
             ("cubic", "half_pixel"): ("bicubic", False), ("cubic", "align_corners"): ("bicubic", True)}  # fmt: skip
LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@builds("Resize")
def _resize(b: Builder, node: Node) -> Any:
    """F.interpolate for images [n, c, ...] when only the axes from 2 on are resized by torch's own rule."""
    values, facts, dimensions = b.inputs(node), node.facts, b.shape(node.inputs[0])
    x, _, scales, sizes = [*values, None, None, None][:4]
    mode, way = facts.get("mode", "nearest"), facts.get("coordinate_transformation_mode", "half_pixel")
    rule = SAME_RULE.get((mode, way))
    if rule is None or not isinstance(x, fx.Node) or dimensions is None or len(dimensions) not in LINEAR:
        return NotImplemented
    if mode == "nearest" and facts.get("nearest_mode", "round_prefer_floor") != "floor" or b.kind(node.inputs[0]) != 1:
        return NotImplemented
    if any(facts.get(k) for k in ("antialias", "axes", "exclude_outside")):
        return NotImplemented
    if rule[0] == "bicubic" and len(dimensions) != 4:
        return NotImplemented
    if facts.get("keep_aspect_ratio_policy", "stretch") != "stretch" or facts.get("cubic_coeff_a", -0.75) != -0.75:
        return NotImplemented
    more: dict[str, Any] = {"mode": LINEAR[len(dimensions)] if rule[0] == "linear" else rule[0]}
    if rule[1] is not None:
        more["align_corners"] = rule[1]
    factors = b.known(scales) if scales is not None else None
    if factors is not None and factors.numel():
        numbers = factors.tolist()
        if numbers[:2] != [1, 1] or way == "pytorch_half_pixel":
            return NotImplemented
        if all(n == int(n) for n in numbers) or rule[1] is None:
            return b.call(F.interpolate, x, scale_factor=numbers[2:], **more)
        return NotImplemented
    vector = b.as_vector(sizes) if sizes is not None else None
    if vector is None or way == "pytorch_half_pixel":
        return NotImplemented
    for i in range(2):
        item = vector.items[i]
        same = item == dimensions[i] and isinstance(item, int) or b.symbols.get(item, 0) == dimensions[i]
        if not same:
            return NotImplemented
    return b.call(F.interpolate, x, size=vector.items[2:], **more)


@runs("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, mode: str = "linear", padding_mode: str = "zeros", align_corners: int = 0
) -> Tensor:
    """X [n, c, ...] at the coordinates -1 to 1 in grid [n, ..., axes]."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid.to(x.dtype), mode, padding_mode, bool(align_corners))


@runs("AffineGrid", ints=(1,))
def affine_grid(theta: Tensor, size: list[int], align_corners: int = 0) -> Tensor:
    """Coordinates -1 to 1 of an image of `size`, moved by theta."""
    return F.affine_grid(theta, list(size), bool(align_corners))


@runs("RoiAlign")
def roi_align(
    x: Tensor, rois: Tensor, batch: Tensor, coordinate_transformation_mode: str = "half_pixel", mode: str = "avg",
    output_height: int = 1, output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Boxes [k, 4] (x1, y1, x2, y2) cut out of x [n, c, h, w] and pooled to one size, with linear samples."""
    shift = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    h, w = x.shape[2:]
    out = []
    for box, i in zip((rois * spatial_scale - shift).tolist(), batch.tolist(), strict=True):
        width, height = box[2] - box[0], box[3] - box[1]
        if not shift:
            width, height = max(width, 1.0), max(height, 1.0)
        ny = sampling_ratio or math.ceil(height / output_height)
        nx = sampling_ratio or math.ceil(width / output_width)
        ys = box[1] + (torch.arange(output_height * ny) + 0.5) * (height / (output_height * ny))
        xs = box[0] + (torch.arange(output_width * nx) + 0.5) * (width / (output_width * nx))
        wy, wx = _samples(ys, h, x.dtype), _samples(xs, w, x.dtype)
        if mode == "avg":
            y = torch.einsum("yh,chw,xw->cyx", wy, x[i], wx)
            y = y.reshape(-1, output_height, ny, output_width, nx).mean((2, 4))
        else:  # the largest of the weighted corners, as the operator says
            parts = torch.einsum("yh,chw,xw->cyhxw", wy, x[i], wx)
            y = parts.amax((2, 4)).reshape(-1, output_height, ny, output_width, nx).amax((2, 4))
        out.append(y)
    return torch.stack(out) if out else x.new_zeros(0, x.shape[1], output_height, output_width)


def _samples(at: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    low = at.floor().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    places = torch.arange(size)[None]
    w = (places == low[:, None]) * (1 - (at - low))[:, None] + (places == high[:, None]) * (at - low)[:, None]
    return (w * inside[:, None]).to(dtype)
