"""What a name of an ONNX graph stands for while the torch graph is built, and the parts of a node.

A value is one of
    fx.Node      computed when the module runs
    Constant     known now, and where it comes from
    Ints         int64 numbers as Python ints, each known now or an fx.Node (a size): shapes, axes, counts
    None         an optional input that is left out
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from wherry.errors import Corrupt, Unsupported

T = TensorProto
DTYPES: dict[int, torch.dtype] = {
    T.FLOAT: torch.float32, T.DOUBLE: torch.float64, T.FLOAT16: torch.float16, T.BFLOAT16: torch.bfloat16,
    T.INT8: torch.int8, T.INT16: torch.int16, T.INT32: torch.int32, T.INT64: torch.int64, T.UINT8: torch.uint8,
    T.UINT16: torch.uint16, T.UINT32: torch.uint32, T.UINT64: torch.uint64, T.BOOL: torch.bool,
    T.COMPLEX64: torch.complex64, T.COMPLEX128: torch.complex128, T.FLOAT8E4M3FN: torch.float8_e4m3fn,
    T.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz, T.FLOAT8E5M2: torch.float8_e5m2, T.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    T.INT4: torch.int8, T.UINT4: torch.uint8, T.INT2: torch.int8, T.UINT2: torch.uint8,
}  # fmt: skip
NARROW: dict[int, tuple[int, int]] = {
    T.INT4: (-8, 7),
    T.UINT4: (0, 15),
    T.INT2: (-2, 1),
    T.UINT2: (0, 3),
}  # held in bytes


NUMPY = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {
    "float16", "float32", "float64", "bool", "complex64", "complex128",
}  # fmt: skip


@dataclass(eq=False)
class Constant:
    """A tensor known now.

    name: of the initializer; flipped: its two axes were swapped on the way; derived: it was computed from the
    initializer (dequantized, say) and is not the same numbers.
    """

    tensor: Tensor
    name: str = ""
    flipped: bool = False
    derived: bool = False


@dataclass(eq=False)
class Ints:
    """int64 numbers, a vector or one scalar; each an int or an fx.Node that gives an int."""

    items: list[Any]
    scalar: bool = False

    @property
    def known(self) -> bool:
        """Whether all are ints."""
        return all(isinstance(item, int) for item in self.items)


Value = fx.Node | Constant | Ints | None


@dataclass
class Node:
    """One ONNX node: its attributes as Python values (tensors as torch tensors, graphs as GraphProto)."""

    kind: str
    domain: str
    name: str
    inputs: list[str]
    outputs: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        domain = f"{self.domain}::" if self.domain else ""
        return f"{domain}{self.kind} (node {self.name or '-> ' + ', '.join(self.outputs)!r})"


def dtype_of(number: int, who: object = "a tensor") -> torch.dtype:
    """The torch dtype of ONNX's element type. Raises Unsupported for texts and others that torch lacks."""
    if number not in DTYPES:
        known = number in T.DataType.values()
        name = T.DataType.Name(number) if known else str(number)
        raise Unsupported(f"{who} has elements of type {name}, which torch has not")
    return DTYPES[number]


def tensor_of(proto: TensorProto) -> Tensor:
    """The torch tensor of an ONNX tensor; 2- and 4-bit integers become bytes.

    Raises Corrupt when its bytes do not match its shape, Unsupported for texts.
    """
    dtype = dtype_of(proto.data_type, f"tensor {proto.name!r}")
    try:
        array = numpy_helper.to_array(proto)
    except (ValueError, TypeError, OverflowError, MemoryError, onnx.checker.ValidationError) as error:
        raise Corrupt(
            f"tensor {proto.name!r} does not hold the {list(proto.dims)} elements that it claims: {str(error)[:120]}"
        ) from error
    if list(array.shape) != list(proto.dims):
        raise Corrupt(f"tensor {proto.name!r} holds {list(array.shape)} elements and claims {list(proto.dims)}")
    return from_array(array, dtype)


def from_array(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A torch tensor of a numpy array, bit for bit, also of types that numpy itself has not."""
    array = np.array(array, copy=True, order="C")
    if array.dtype.name in NUMPY:
        return torch.from_numpy(array).to(dtype)
    if dtype in (torch.int8, torch.uint8):
        return torch.from_numpy(array.astype(np.int8 if dtype == torch.int8 else np.uint8))
    raw = array.view(np.uint8 if array.dtype.itemsize == 1 else np.int16)
    return torch.from_numpy(raw).view(dtype)


def node_of(proto: onnx.NodeProto) -> Node:
    """The parts of a node. Raises Corrupt for an attribute that cannot be read."""
    facts: dict[str, Any] = {}
    for attribute in proto.attribute:
        try:
            value = helper.get_attribute_value(attribute)
        except ValueError as error:
            raise Corrupt(f"attribute {attribute.name!r} of node {proto.name!r} cannot be read: {error}") from error
        facts[attribute.name] = _plain(value, proto)
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    return Node(proto.op_type, domain, proto.name, list(proto.input), list(proto.output), facts)


def _plain(value: Any, proto: onnx.NodeProto) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf8", "replace")
    if isinstance(value, TensorProto):
        return tensor_of(value)
    if isinstance(value, onnx.TypeProto):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v, proto) for v in value]
    return value
