"""Operators that pick and place by index: GatherElements, GatherND, Scatter*, OneHot, NonZero, Compress, Unique."""

from math import prod

import torch
from torch import Tensor

from wherry.formats.onnx.torch_module.table import runs


def _positive(index: Tensor, size: int) -> Tensor:
    return torch.where(index < 0, index + size, index).to(torch.int64)


@runs("GatherElements")
def gather_elements(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """x[..., index[..., i, ...], ...] along an axis, element by element."""
    return torch.gather(x, axis, _positive(index, x.size(axis)))


@runs("GatherND")
def gather_nd(x: Tensor, index: Tensor, batch_dims: int = 0) -> Tensor:
    """X at the coordinates that the last axis of index holds, for each of the first batch_dims axes apart."""
    batch = prod(x.shape[:batch_dims])
    flat, at = x.reshape(batch, *x.shape[batch_dims:]), index.reshape(batch, -1, index.shape[-1])
    depth = index.shape[-1]
    places = [_positive(at[..., i], flat.shape[1 + i]) for i in range(depth)]
    y = flat[(torch.arange(batch)[:, None], *places)]
    return y.reshape([*index.shape[:-1], *x.shape[batch_dims + depth :]])


MODES = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@runs("ScatterElements", "Scatter")
def scatter_elements(x: Tensor, index: Tensor, updates: Tensor, axis: int = 0, reduction: str = "none") -> Tensor:
    """X with updates at places along an axis, in the place of what was there, or joined with it."""
    index = _positive(index, x.size(axis))
    if reduction == "none":
        return torch.scatter(x, axis, index, updates)
    return torch.scatter_reduce(x, axis, index, updates, MODES[reduction])


@runs("ScatterND")
def scatter_nd(x: Tensor, index: Tensor, updates: Tensor, reduction: str = "none") -> Tensor:
    """X with slices at the coordinates in index replaced by updates, or joined with them."""
    depth = index.shape[-1]
    places = tuple(_positive(index[..., i], x.shape[i]) for i in range(depth))
    if reduction == "none":
        return torch.index_put(x, places, updates)
    if reduction == "add":
        return torch.index_put(x, places, updates, accumulate=True)
    row = torch.zeros_like(places[0])
    for place, size in zip(places, x.shape, strict=False):
        row = row * size + place
    flat = x.reshape(prod(x.shape[:depth]), -1)
    values = updates.reshape(row.numel(), -1)
    at = row.reshape(-1, 1).expand(-1, flat.shape[1])
    return torch.scatter_reduce(flat, 0, at, values, MODES[reduction]).reshape(x.shape)


@runs("TensorScatter")
def tensor_scatter(
    cache: Tensor, update: Tensor, start: Tensor | None = None, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """A cache with `update` written from start[example] on along an axis; circular: the begin is behind the end."""
    y = cache.movedim(axis, 1) if cache.dim() > 1 else cache
    new = update.movedim(axis, 1)
    start = torch.zeros(cache.shape[0], dtype=torch.int64) if start is None else start
    place = start[:, None] + torch.arange(new.shape[1])[None]
    place = torch.remainder(place, y.shape[1]) if mode == "circular" else place
    return torch.index_put(y, (torch.arange(y.shape[0])[:, None], place), new).movedim(1, axis)


@runs("OneHot")
def one_hot(index: Tensor, depth: Tensor, values: Tensor, axis: int = -1) -> Tensor:
    """values[1] at index, else values[0], on a new axis of size depth; out of range nothing is on."""
    count = int(depth.reshape(()).item())
    axis = axis + index.dim() + 1 if axis < 0 else axis
    index = index.to(torch.int64)
    index = torch.where(index < 0, index + count, index).unsqueeze(axis)
    steps = torch.arange(count).reshape([-1 if i == axis else 1 for i in range(index.dim())])
    return torch.where(index == steps, values[1], values[0])


@runs("NonZero")
def nonzero(x: Tensor) -> Tensor:
    """Coordinates [rank, count] of what is not zero."""
    return torch.nonzero(x).t()


@runs("Compress")
def compress(x: Tensor, condition: Tensor, axis: int | None = None) -> Tensor:
    """Slices of x where the condition holds."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return torch.index_select(x, axis, torch.nonzero(condition).reshape(-1))


@runs("Unique")
def unique(x: Tensor, axis: int | None = None, sorted: int = 1, outputs: int = 1) -> tuple[Tensor, ...]:
    """The different values (or slices), where each is first, which one each place has, and how often each is."""
    y, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.reshape(-1)
    first = torch.full((counts.numel(),), inverse.numel()).scatter_reduce(
        0, inverse, torch.arange(inverse.numel()), "amin"
    )
    if not sorted:
        order = torch.argsort(first)
        rank = torch.argsort(order)
        y = torch.index_select(y, axis or 0, order)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    return (y, first, inverse, counts)[:outputs]


@runs("NonMaxSuppression")
def suppress(
    boxes: Tensor, scores: Tensor, most: Tensor | None = None, overlap: Tensor | None = None,
    least: Tensor | None = None, center_point_box: int = 0,
) -> Tensor:  # fmt: skip
    """Rows (batch, class, box): greedily the best boxes [n, k, 4] by scores [n, classes, k] that overlap little."""
    if center_point_box:
        x, y, w, h = boxes.unbind(-1)
        top, left, bottom, right = y - h / 2, x - w / 2, y + h / 2, x + w / 2
    else:
        a, b, c, d = boxes.unbind(-1)
        top, bottom = torch.minimum(a, c), torch.maximum(a, c)
        left, right = torch.minimum(b, d), torch.maximum(b, d)
    area = (bottom - top) * (right - left)
    count = int(most.item()) if most is not None else 0
    limit = float(overlap.item()) if overlap is not None else 0.0
    rows = []
    for i in range(boxes.shape[0]):
        for label in range(scores.shape[1]):
            order = torch.argsort(scores[i, label], descending=True, stable=True).tolist()
            kept: list[int] = []
            for j in order:
                if len(kept) >= count or least is not None and scores[i, label, j] <= least.reshape(()):
                    break
                k = torch.tensor(kept, dtype=torch.int64)
                height = torch.minimum(bottom[i, j], bottom[i, k]) - torch.maximum(top[i, j], top[i, k])
                width = torch.minimum(right[i, j], right[i, k]) - torch.maximum(left[i, j], left[i, k])
                both = height.clamp(min=0) * width.clamp(min=0)
                if not bool((both / (area[i, j] + area[i, k] - both) > limit).any()):
                    kept.append(j)
            rows += [[i, label, j] for j in kept]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
