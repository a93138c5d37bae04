"""What an ONNX file claims, checked before it is believed: graphs inside of nodes, data that lie in other files."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from wherry.errors import Corrupt, Missing


def every_graph(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graph and all that stand inside of its nodes."""
    out = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                if inner.node or inner.output:
                    out += every_graph(inner)
    return out


def bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor of its shape and type takes. Raises Corrupt for a type that there is not."""
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise Corrupt(f"tensor {tensor.name!r} is of type {tensor.data_type}, which has no fixed size") from error
    if any(extent < 0 for extent in tensor.dims):
        raise Corrupt(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}")
    return int(-(-int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8))


def located(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """(file, first byte, bytes) of a tensor whose data lie in another file of the same folder.

    Raises Missing when there is no such file, Corrupt when it lies elsewhere, is a link out, or is too short.
    """
    facts = {entry.key: entry.value for entry in tensor.external_data}
    place = facts.get("location", "")
    file = (folder / place).resolve()
    if not place or Path(place).is_absolute() or not file.is_relative_to(folder.resolve()):
        raise Corrupt(f"tensor {tensor.name!r} points outside of the folder of its model: {place!r}; it was not read")
    if not file.is_file():
        raise Missing(f"{file} is not there; tensor {tensor.name!r} of the model lies in it: copy it beside the model")
    need = bytes_of(tensor)
    try:
        begin, length = int(facts.get("offset", 0)), int(facts.get("length", need))
    except ValueError as error:
        raise Corrupt(f"tensor {tensor.name!r}: its place in {place} cannot be read: {error}") from error
    if begin < 0 or length != need or begin + need > file.stat().st_size:
        wants = f"tensor {tensor.name!r} wants {need:,} bytes at {begin:,}"
        raise Corrupt(f"{file} is cut off or of another model: {wants}")
    return file, begin, need
