"""The weights of an exported graph as ONNX Runtime itself decodes them. No torch; none of the packing code is used.

Idea:   a graph of one node. MatMulNBits times the identity is the weight, transposed; so that a weight [n, k] costs
        n * k * size products and not n * k * k, its blocks are taken as rows of a weight [n * g, size]: the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from wherry.errors import Corrupt

CODES, TRANSPOSED, LEFT, RIGHT = ".codes", ".transposed", ".left", ".right"
ROWS = 1 << 16  # blocks that are decoded at once


def decode(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight of the graph as (Hugging Face name, float32 [n, k]), one at a time; codes go through ONNX Runtime.

    Raises Corrupt when the file cannot be read, or codes hang on a node that is not known to decode them.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own kinds of error
        raise Corrupt(f"{path} is not an ONNX file: {str(error)[:120]}") from error
    tensors = {t.name: t for t in model.graph.initializer}

    def read(name: str) -> np.ndarray:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(tensors[name])
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            try:
                load_external_data_for_tensor(tensor, str(path.parent))
                tensor.data_location = onnx.TensorProto.DEFAULT
                return numpy_helper.to_array(tensor)
            except (OSError, ValueError, onnx.checker.ValidationError) as error:
                raise Corrupt(f"{path}: tensor {name} cannot be read: {str(error)[:120]}") from error
        return numpy_helper.to_array(tensor)

    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Unsqueeze"}
    done = set()
    for node in model.graph.node:
        for name in node.input:
            if name in done or name not in tensors:
                continue
            done.add(name)
            if name.endswith(CODES):
                facts = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                value = weight(node, facts, lambda name: read(str(sources.get(name, name))), path)
                stem = name.removesuffix(CODES)
                if stem + LEFT in tensors:  # [rank, n] and [k, rank]
                    left, right = (read(stem + side).astype(np.float64) for side in (LEFT, RIGHT))
                    value = (value + (right @ left).T).astype(np.float32)
                yield stem, value
            elif name.endswith((".weight", ".bias")):
                yield name, read(name).astype(np.float32)
            elif name.endswith(TRANSPOSED):
                yield name.removesuffix(TRANSPOSED), np.ascontiguousarray(read(name).T.astype(np.float32))


def weight(node: onnx.NodeProto, facts: dict[str, Any], read: Any, path: Path) -> np.ndarray:
    """The weight [n, k] of one node that reads codes."""
    if node.op_type == "MatMulNBits":
        codes, scales = read(node.input[1]), read(node.input[2])
        zeros = read(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        if zeros is not None and facts["bits"] < 8:
            zeros = unpacked(zeros, facts["bits"], scales.shape[1])
    elif node.op_type == "GatherBlockQuantized":
        codes, scales = read(node.input[0]), read(node.input[2])
        zeros = read(node.input[3])[..., 0] if len(node.input) > 3 and node.input[3] else None
        scales = scales.reshape(codes.shape[:2])
    elif node.op_type == "DequantizeLinear":
        return linear(*(read(name) for name in node.input)).T.copy()
    else:
        raise Corrupt(f"{path}: codes {node.input} hang on {node.op_type}, which does not decode them")
    return blocked(codes, scales, zeros, facts["bits"], facts["block_size"])


def unpacked(zeros: np.ndarray, bits: int, groups: int) -> np.ndarray:
    """Packed zeros uint8 [n, bytes] to [n, groups], by onnx's own reading of a tensor of that width."""
    kind = {2: onnx.TensorProto.UINT2, 4: onnx.TensorProto.UINT4}[bits]
    tensor = onnx.TensorProto(
        data_type=kind, dims=[zeros.shape[0], zeros.shape[1] * 8 // bits], raw_data=zeros.tobytes()
    )
    return numpy_helper.to_array(tensor).astype(np.uint8)[:, :groups]


def blocked(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, size: int) -> np.ndarray:
    """Run MatMulNBits on the identity: codes uint8 [n, g, size * bits / 8], scales, zeros [n, g] to [n, g * size]."""
    n, g = scales.shape
    flat, steps = codes.reshape(n * g, 1, -1), scales.reshape(n * g, 1).astype(np.float32)
    out = np.empty((n * g, size), np.float32)
    for begin in range(0, n * g, ROWS):
        part = slice(begin, begin + ROWS)
        feeds = {"codes": flat[part], "scales": steps[part]}
        if zeros is not None:
            feeds["zeros"] = np.ascontiguousarray(zeros.reshape(n * g, 1)[part])
        rows = len(feeds["codes"])
        facts: dict[str, Any] = {"K": size, "N": rows, "bits": bits, "block_size": size, "accuracy_level": 0}
        node = helper.make_node("MatMulNBits", ["x", *feeds], ["y"], domain="com.microsoft", **facts)
        out[part] = run(node, feeds, np.eye(size, dtype=np.float32)).T
    return out.reshape(n, g * size)


def linear(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Run DequantizeLinear over columns: codes int8 [k, n], scales and zeros [n]."""
    node = helper.make_node("DequantizeLinear", ["x", "scales", "zeros"], ["y"], axis=1)
    return run(node, {"scales": scales, "zeros": zeros}, codes)


def run(node: onnx.NodeProto, constants: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """A graph of this one node, run by ONNX Runtime without any optimization. Codes of 2 bits go in as int8."""
    import onnxruntime

    x, *others = (a.astype(np.int8) if a.dtype.name == "int2" else a for a in (x, *constants.values()))
    constants = dict(zip(constants, others, strict=True))
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info("x", kind, list(x.shape))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]
