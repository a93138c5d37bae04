"""Draw: put QuantizeLinear and DequantizeLinear into a graph where the plan and the places say.

    static    x -> Q -> DQ -> layer(., DQ(codes), DQ(int32 bias)) -> [Relu] -> Q -> DQ
    dynamic   x / scales of its tokens -> Q -> DQ -> MatMul(., DQ(codes)) -> times these scales -> Add(bias)
    weights   layer(x, float(codes) * scales), MatMulNBits for blocks; tables: Gather(codes) * Gather(scales)

Activations are uint8 with a zero (what ONNX Runtime has kernels for), weights int8, symmetric, a scale per output.
Source: the ONNX specification of these operators; Jacob et al. 2018 for the int32 bias at the product of scales.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from wherry.engine.graph.place import Places
from wherry.graph import edit, tidy
from wherry.graph.blocks import blocks
from wherry.graph.source import Layer, extents
from wherry.scheme import Group, QTensor

BIAS_MOST = 2.0**30
OPSET, OPSET_INT2, IR_INT2 = 21, 25, 13  # what QDQ per block, and integers of 2 bits, came with
SMALL = {2: ir.DataType.INT2}
Tokens = dict[ir.Value, tuple[ir.Value, ir.Value]]


def step(low: float, high: float) -> tuple[float, int]:
    """Scale and zero of the 256 codes from low <= 0 to high >= 0."""
    scale = max((high - low) / 255, 1e-12)
    return float(np.float32(scale)), int(np.clip(round(-low / scale), 0, 255))


def activations(graph: ir.Graph, places: Places, ranges: dict[str, tuple[float, float]]) -> dict[ir.Value, float]:
    """Round every placed edge. Returns the scale of each."""
    scales: dict[ir.Value, float] = {}
    for value, source in places.edges.items():
        scale, zero = step(*ranges[str(source.name)])
        scales[value] = scale
        users = [use for use in value.uses() if rounded_for(use.node, value, places)]
        was_output = value.is_graph_output()
        name = str(value.name)
        inputs = [value, edit.constant(graph, f"{name}.scale", np.array(scale, np.float32)),
                  edit.constant(graph, f"{name}.zero", np.array(zero, np.uint8))]  # fmt: skip
        q = ir.node("QuantizeLinear", inputs, name=f"{name}/quantize")
        dq = ir.node("DequantizeLinear", [q.outputs[0], *inputs[1:]], name=f"{name}/dequantize")
        q.outputs[0].name, dq.outputs[0].name = f"{name}.codes", f"{name}.rounded"
        dq.outputs[0].shape, dq.outputs[0].type = value.shape, value.type
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, [q, dq])
        elif graph.num_nodes():
            graph.insert_before(graph[0], [q, dq])
        for use in users:
            use.node.replace_input_with(use.idx, dq.outputs[0])
        if was_output and producer in places.nodes:
            for i, output in enumerate(graph.outputs):
                if output is value:
                    dq.outputs[0].name, value.name = name, f"{name}.float"
                    graph.outputs[i] = dq.outputs[0]
    pads(graph, places)
    return scales


def pads(graph: ir.Graph, places: Places) -> None:
    """Let a Pad between integers pad with codes: ONNX Runtime has no pattern that would bring it there."""
    for node in places.nodes:
        if node.op_type != "Pad" or node.inputs[0] is None:
            continue
        dequantize = node.inputs[0].producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        behind = next((use.node for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"), None)
        if behind is None:
            continue
        node.replace_input_with(0, dequantize.inputs[0])
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, dequantize.inputs[2])
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        behind.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove(behind, safe=True)


def rounded_for(node: ir.Node, value: ir.Value, places: Places) -> bool:
    """Whether a reader takes the rounded value: integer nodes do, and all others where an integer node made it."""
    producer = value.producer()
    made = producer is not None and (producer in places.nodes or producer.op_type in ("Relu", "Clip") and any(
        v in places.folded for v in producer.inputs))  # fmt: skip
    return made or node in places.nodes


def weight(graph: ir.Graph, name: str, layer: Layer, q: QTensor) -> ir.Value:
    """Codes of one weight and their DequantizeLinear, in the place of the float weight. Returns the scales."""
    codes = layer.stored(q.code.numpy().astype(np.int8), extents(layer.value))
    scales = q.scale.float().numpy().reshape(-1)
    users = list(layer.value.uses())
    detach(graph, layer.value)
    value = edit.constant(graph, name + edit.CODES, codes)
    scale = edit.constant(graph, name + edit.SCALES, scales)
    zeros = np.zeros(len(scales), np.int8) if q.zero is None else q.zero.numpy().reshape(-1)
    dq = ir.node(
        "DequantizeLinear", [value, scale, edit.constant(graph, name + edit.ZEROS, zeros)], {"axis": layer.axis},
        name=f"{name}/dequantize",
    )  # fmt: skip
    dq.outputs[0].name = f"{name}.decoded"
    graph.insert_before(first(graph, users), dq)
    for use in users:
        use.node.replace_input_with(use.idx, dq.outputs[0])
    return scale


def folded(graph: ir.Graph, name: str, layer: Layer, q: QTensor, users: list[Any]) -> None:
    """Codes of a weight whose product is computed in float: times their scales, which runtimes fold when they load.

    A DequantizeLinear would be kept for fusions that never come, and run at every call.
    """
    shape = extents(layer.value)
    kind = SMALL.get(q.scheme.bits, ir.DataType.INT8)
    codes = layer.stored(q.code.numpy().astype(np.int8), shape).astype(kind.numpy())
    scales = np.ones([shape[axis] if i < layer.rows else 1 for i, axis in enumerate(layer.order)], np.float32)
    scales = np.transpose(scales * q.scale.float().numpy().reshape(scales.shape), np.argsort(layer.order))
    inputs = [edit.constant(graph, name + edit.CODES, codes), edit.constant(graph, name + edit.SCALES, scales)]
    before = first(graph, users)
    floats = edit.call(before, "Cast", inputs[:1], f"{name}/float", to=ir.DataType.FLOAT)
    whole = edit.call(before, "Mul", [floats, inputs[1]], f"{name}/dequantize")
    for use in users:
        use.node.replace_input_with(use.idx, whole)


def table(graph: ir.Graph, name: str, layer: Layer, q: QTensor) -> str:
    """An embedding: rows of codes times their scales. Returns a remark where others read it whole (a tied head)."""
    users = [use for use in layer.value.uses() if not (use.node.op_type == "Gather" and use.idx == 0)]
    if users:  # these get all rows decoded, once, when the runtime loads the file
        folded(graph, name, layer, q, users)
    else:
        edit.constant(graph, name + edit.CODES, q.code.numpy())
        edit.constant(graph, name + edit.SCALES, q.scale.float().numpy().reshape(len(q.code), -1))
    codes, scales = (graph.initializers[name + part] for part in (edit.CODES, edit.SCALES))
    for use in list(layer.value.uses()):
        node, out = use.node, str(use.node.outputs[0].name)
        rows = edit.call(node, "Gather", [codes, node.inputs[1]], f"{out}/codes", axis=0)
        steps = edit.call(node, "Gather", [scales, node.inputs[1]], f"{out}/scales", axis=0)
        floats = edit.call(node, "Cast", [rows], f"{out}/float", to=ir.DataType.FLOAT)
        tidy.swap(graph, node, edit.call(node, "Mul", [floats, steps], f"{out}/table"), out)
    detach(graph, layer.value)
    return "the head that shares it is computed in float, from the same codes" if users else ""


def biases(graph: ir.Graph, node: ir.Node, x_scale: float, w_scale: np.ndarray) -> str:
    """The bias of a Conv or Gemm as int32 at the product of scales. Returns a remark where it must stay float."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    array = tidy.constant(value)
    if value is None or array is None:
        return "" if value is None else "its bias is not a constant and stays float"
    scale = (np.float64(x_scale) * w_scale.astype(np.float64)).astype(np.float32)
    flat = np.broadcast_to(array.reshape(-1), scale.shape).astype(np.float64)
    codes = np.rint(flat / np.maximum(scale.astype(np.float64), 1e-38))
    if np.abs(codes).max(initial=0) > BIAS_MOST:
        return "its bias is too large for int32 at these scales and stays float"
    name = str(value.name)
    inputs = [edit.constant(graph, f"{name}{edit.CODES}@{node.name}", codes.astype(np.int32)),
              edit.constant(graph, f"{name}{edit.SCALES}@{node.name}", scale)]  # fmt: skip
    node.replace_input_with(2, None)
    tidy.forget(graph, value)
    node.replace_input_with(2, edit.call(node, "DequantizeLinear", inputs, f"{name}/dequantize@{node.name}", axis=0))
    return ""


def dynamic(graph: ir.Graph, name: str, layer: Layer, q: QTensor, tokens: Tokens) -> None:
    """Linear layers whose input's scale is found when they run, one for each token (row) of the input.

    ONNX's DynamicQuantizeLinear takes one for the whole input: then an answer depends on what else is in the batch.
    tokens: rounded inputs that were drawn already; layers that read the same one share it.
    """
    users = list(layer.value.uses())
    stored = layer.stored(q.code.numpy(), extents(layer.value))
    detach(graph, layer.value)
    turned = layer.order == (0, 1)  # MatMul reads [k, n]
    scales = q.scale.float().numpy().reshape(-1)
    inputs = [edit.constant(graph, name + edit.CODES, stored.T.copy() if turned else stored),
              edit.constant(graph, name + edit.SCALES, scales),
              edit.constant(graph, name + edit.ZEROS, np.zeros(len(scales), np.int8))]  # fmt: skip
    decoded = edit.call(first(graph, users), "DequantizeLinear", inputs, f"{name}/dequantize", axis=1)
    for use in users:
        node, out = use.node, str(use.node.outputs[0].name)
        assert node.inputs[0] is not None
        if node.inputs[0] not in tokens:
            tokens[node.inputs[0]] = token(graph, node, node.inputs[0])
        x, step = tokens[node.inputs[0]]
        y = edit.call(node, "Mul", [edit.call(node, "MatMul", [x, decoded], f"{out}/product"), step], f"{out}/scaled")
        biased(graph, node, y)


def token(graph: ir.Graph, node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The input divided by each token's scale and rounded, and these scales; drawn in front of a node.

    A token's largest value gets code 127.
    """
    name = f"{x.name}/tokens"
    largest = edit.call(
        node, "ReduceMax", [edit.call(node, "Abs", [x], f"{name}/abs"), edit.integers(graph, -1)], f"{name}/max"
    )
    step = edit.call(node, "Mul", [largest, edit.scalar(graph, 1 / 127)], f"{name}/step")
    step = edit.call(node, "Max", [step, edit.scalar(graph, 1e-30)], f"{name}/positive")
    scaled = edit.call(node, "Div", [x, step], f"{name}/scaled")
    one = [edit.scalar(graph, 1.0), edit.constant(graph, "uint8_128", np.array(128, np.uint8))]
    codes = edit.call(node, "QuantizeLinear", [scaled, *one], f"{name}/quantize")
    return edit.call(node, "DequantizeLinear", [codes, *one], f"{name}/dequantize"), step


def blocked(graph: ir.Graph, name: str, layer: Layer, q: QTensor) -> None:
    """A linear layer with blocked codes and float activations: MatMulNBits."""
    assert isinstance(q.scheme.grain, Group)
    users = list(layer.value.uses())
    detach(graph, layer.value)
    packed = blocks(q)
    for use in users:
        x = use.node.inputs[0]
        assert x is not None
        biased(graph, use.node, edit.linear(use.node, x, name, packed, 0))


def biased(graph: ir.Graph, node: ir.Node, product: ir.Value) -> None:
    """Put a product in the place of a layer, with the layer's bias if it has one."""
    out, bias = str(node.outputs[0].name), node.inputs[2] if len(node.inputs) > 2 else None
    y = product if bias is None else edit.call(node, "Add", [product, bias], f"{out}/biased")
    tidy.swap(graph, node, y, out)


def detach(graph: ir.Graph, value: ir.Value) -> None:
    """Take a float weight out of the graph's initializers; its readers still hold it."""
    graph.initializers.pop(str(value.name), None)


def first(graph: ir.Graph, users: list[Any]) -> ir.Node:
    """The reader that comes first in the graph."""
    nodes = {use.node for use in users}
    return next(node for node in graph if node in nodes)
