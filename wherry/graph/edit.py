"""Small edits of an ONNX graph in memory, and its two files on disk. Uses onnx_ir, as ONNX's exporters do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from wherry.graph.blocks import Blocks, pack

MICROSOFT = "com.microsoft"
INLINE_BYTES = 1024  # smaller tensors stay in the model file: shape inference reads them
CODES, SCALES, ZEROS, TRANSPOSED = ".codes", ".scales", ".zeros", ".transposed"
LEFT, RIGHT = ".left", ".right"  # of a low-rank correction: float32 [rank, n] and [k, rank], as MatMul reads them


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of that name; made from the array when there is none yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(array.copy(order="C"), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def integers(graph: ir.Graph, *values: int) -> ir.Value:
    """A constant vector of int64."""
    return constant(graph, "int64_" + "_".join(map(str, values)), np.array(values, np.int64))


def scalar(graph: ir.Graph, value: float) -> ir.Value:
    """A constant float32."""
    return constant(graph, f"float_{value!r}", np.array(value, np.float32))


def call(before: ir.Node, operator: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
    """Insert a node with one output in front of another; the operator is `Add` or `com.microsoft::MatMulNBits`."""
    return calls(before, operator, inputs, name, 1, **attributes)[0]


def calls(
    before: ir.Node, operator: str, inputs: Sequence[ir.Value | None], name: str, outputs: int, **attributes: Any
) -> Sequence[ir.Value]:
    """The same for a node with several outputs."""
    domain, _, kind = operator.rpartition("::")
    node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
    for i, value in enumerate(node.outputs):
        value.name = f"{name}/output_{i}"
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs


def replace(node: ir.Node, value: ir.Value) -> None:
    """Let `value` take the place of a node's only output, the name of a graph output included; drop the node."""
    old, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    value.shape, value.type = old.shape, old.type
    for i, output in enumerate(graph.outputs):
        if output is old:
            old.name, value.name = f"{old.name}/replaced", old.name
            graph.outputs[i] = value
    ir.convenience.replace_all_uses_with(old, value)
    inputs = [i for i in node.inputs if i is not None]
    graph.remove(node, safe=True)
    for value in inputs:
        if value.name and value.name in graph.initializers and not value.uses() and not value.is_graph_input():
            del graph.initializers[value.name]


def linear(before: ir.Node, x: ir.Value, name: str, weight: Blocks, level: int) -> ir.Value:
    """X [..., k] times a blocked weight [n, k], transposed: one MatMulNBits. `name` is the weight's."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    inputs = [x, constant(graph, name + CODES, weight.codes), constant(graph, name + SCALES, weight.scales)]
    if weight.zeros is not None:
        inputs.append(constant(graph, name + ZEROS, pack(weight.zeros, weight.bits)))
    facts = {"K": weight.k, "N": weight.n, "bits": weight.bits, "block_size": weight.size, "accuracy_level": level}
    return call(before, f"{MICROSOFT}::MatMulNBits", inputs, f"{name}/MatMulNBits", **facts)


def corrected(before: ir.Node, x: ir.Value, y: ir.Value, name: str, left: np.ndarray, right: np.ndarray) -> ir.Value:
    """Y + (x right^T) left^T: a low-rank correction, left [n, rank], right [rank, k], as two plain MatMuls."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    thin = call(before, "MatMul", [x, constant(graph, name + RIGHT, right.T)], f"{name}/right/MatMul")
    more = call(before, "MatMul", [thin, constant(graph, name + LEFT, left.T)], f"{name}/left/MatMul")
    return call(before, "Add", [y, more], f"{name}/corrected")


def lookup(before: ir.Node, ids: ir.Value, name: str, weight: Blocks) -> ir.Value:
    """Rows of a blocked table [n, k] by id: GatherBlockQuantized over the very codes that MatMulNBits reads."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    codes, scales = constant(graph, name + CODES, weight.codes), constant(graph, name + SCALES, weight.scales)
    inputs = [codes, ids, call(before, "Unsqueeze", [scales, integers(graph, 2)], f"{name}/scales")]
    if weight.zeros is not None:  # this operator packs zeros along its last axis: one a byte
        inputs.append(constant(graph, f"{name}{ZEROS}.bytes", weight.zeros[:, :, None]))
    facts = {"bits": weight.bits, "block_size": weight.size, "gather_axis": 0, "quantize_axis": 2}
    rows = call(before, f"{MICROSOFT}::GatherBlockQuantized", inputs, f"{name}/GatherBlockQuantized", **facts)
    return call(before, "Reshape", [rows, integers(graph, 0, 0, weight.k)], f"{name}/Reshape")


def halve(graph: ir.Graph) -> int:
    """Give every 8-bit MatMulNBits activations of about 16 bits instead of 8. Returns how many there are.

    ONNX Runtime multiplies 8-bit blocks fast only with activations rounded to int8 (accuracy level 4), each block by
    its largest value / 127. So x = high + low, where high is exactly that rounding: its codes are whole, nothing is
    lost in it, and low is at most 1/254 of the block's largest value, so its own rounding is 254 times smaller.
    Both go through the weight as one batch of twice the size, and are added.
    """
    done: dict[tuple[ir.Value, int], ir.Value] = {}
    count = 0
    for node in [n for n in graph if n.op_type == "MatMulNBits" and n.attributes["bits"].as_int() == 8]:
        x, size = node.inputs[0], node.attributes["block_size"].as_int()
        assert x is not None
        assert x.shape is not None, f"{node.name}: the rank of its input is not known"
        same = [0] * (len(x.shape) - 1)
        name = f"{node.name}/halves"
        if (x, size) not in done:
            parts = call(node, "Reshape", [x, integers(graph, *same, -1, size)], f"{name}/blocks")
            largest = call(
                node, "ReduceMax", [call(node, "Abs", [parts], f"{name}/abs"), integers(graph, -1)], f"{name}/max"
            )
            step = call(node, "Mul", [largest, scalar(graph, 1 / 127)], f"{name}/step")
            step = call(node, "Max", [step, scalar(graph, 1e-30)], f"{name}/positive")
            whole = call(node, "Round", [call(node, "Div", [parts, step], f"{name}/div")], f"{name}/round")
            high = call(node, "Mul", [whole, step], f"{name}/high")
            low = call(node, "Sub", [parts, high], f"{name}/low")
            both = call(node, "Concat", [high, low], f"{name}/both", axis=0)
            done[x, size] = call(node, "Reshape", [both, integers(graph, *same, -1)], f"{name}/batch")
        inputs = [done[x, size], *node.inputs[1:]]
        facts = {k: v.value for k, v in node.attributes.items()} | {"accuracy_level": 4}
        y = call(node, f"{MICROSOFT}::MatMulNBits", inputs, f"{node.name}/int8", **facts)
        a, b = calls(node, "Split", [y], f"{name}/split", 2, axis=0, num_outputs=2)
        replace(node, call(node, "Add", [a, b], f"{name}/sum"))
        count += 1
    return count


def write(model: ir.Model, path: Path) -> None:
    """Write `path` and its tensors beside it in `path`.data; small ones stay inside."""
    from wherry import __version__

    model.producer_name, model.producer_version = "wherry", __version__
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    model.graph.sort()
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=INLINE_BYTES)
