"""Lists of tensors and values that may be missing: in the torch graph they are Python lists and None."""

from typing import Any

import torch
from torch import Tensor

from wherry.formats.onnx.torch_module.table import runs


@runs("SequenceConstruct", fold=False)
def sequence(*xs: Tensor) -> list:
    """A list of the inputs."""
    return list(xs)


@runs("SequenceEmpty", fold=False)
def empty(dtype: int = 1) -> list:
    """An empty list."""
    return []


@runs("SequenceInsert", ints=(2,), fold=False)
def insert(xs: list, x: Tensor, at: Any = None) -> list:
    """The list with one more, at the end or before `at`."""
    out, at = list(xs), at[0] if isinstance(at, list) else at
    out.insert(len(out) if at is None else at + len(out) if at < 0 else at, x)
    return out


@runs("SequenceErase", ints=(1,), fold=False)
def erase(xs: list, at: Any = None) -> list:
    """The list without one."""
    out, at = list(xs), at[0] if isinstance(at, list) else at
    del out[-1 if at is None else at]
    return out


@runs("SequenceAt", ints=(1,), fold=False)
def item(xs: list, at: Any) -> Any:
    """One of the list."""
    return xs[at[0] if isinstance(at, list) else at]


@runs("SequenceLength", fold=False)
def length(xs: list) -> Tensor:
    """How many the list has."""
    return torch.tensor(len(xs))


@runs("ConcatFromSequence", fold=False)
def concat_sequence(xs: list, axis: int, new_axis: int = 0) -> Tensor:
    """All of the list joined along an axis, or along a new one."""
    return torch.stack(xs, axis) if new_axis else torch.cat(xs, axis)


@runs("SplitToSequence", ints=(1,), fold=False)
def split_sequence(x: Tensor, split: Any = None, axis: int = 0, keepdims: int = 1) -> list:
    """X cut along an axis: in ones, in parts of one size, or of several."""
    parts = torch.split(x, 1 if split is None else split, axis)
    return [p.squeeze(axis) for p in parts] if split is None and not keepdims else list(parts)


@runs("Optional", fold=False)
def optional(x: Any = None, type: Any = None) -> Any:
    """The value, or None."""
    return x


@runs("OptionalGetElement", fold=False)
def optional_value(x: Any) -> Any:
    """The value."""
    return x


@runs("OptionalHasElement", fold=False)
def optional_has(x: Any = None) -> Tensor:
    """Whether there is a value."""
    return torch.tensor(x is not None)
