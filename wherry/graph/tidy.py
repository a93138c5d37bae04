"""Make a float graph plain before it is quantized: constants folded, weights where layers read them, batch norms gone.

Nothing here changes what the graph computes, but for rounding in float32 (the export's own check measures that).
Source: folding a batch norm into the layer before it: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from wherry.graph import edit

FOLD_MOST = 1 << 22  # values of a constant that folding may make; larger ones stay operators
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def tidy(model: ir.Model) -> None:
    """All of it, in place. Every weight keeps its name. Cost: seconds; memory: the largest weight once more."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    turn_weights(model.graph)
    limits = {"input_size_limit": FOLD_MOST, "output_size_limit": FOLD_MOST}
    optimizer.fold_constants(model, **limits, should_fold=lambda node: False if copies(node) else None)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    drop(model.graph)
    fold_batch_norms(model.graph)
    pool_means(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # exporters' notes hold paths of the machine that wrote them


def copies(node: ir.Node) -> bool:
    """Whether folding would make a second copy of a weight: a tied head reads the table turned."""
    value = node.inputs[0] if node.op_type == "Transpose" else None
    return value is not None and value.const_value is not None and value.const_value.size > 64


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, or None when the value is found only when the graph runs."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer; a number is added to a name that is taken."""
    unique, count = name, 0
    while unique in graph.initializers:
        count += 1
        unique = f"{name}.{count}"
    return edit.constant(graph, unique, array)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Value of an attribute, or the default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def forget(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove an initializer that nothing reads any more."""
    if value is not None and value.name in graph.initializers and not value.uses() and not value.is_graph_output():
        del graph.initializers[str(value.name)]


def turn_weights(graph: ir.Graph) -> None:
    """Let Transpose(weight) be a weight that lies the other way, under the same name, where nothing else reads it."""
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
            continue
        weight = node.inputs[0]
        array = constant(weight)
        if array is None or weight is None or len(weight.uses()) > 1 or node.outputs[0].is_graph_output():
            continue
        turned = np.transpose(array, attribute(node, "perm", tuple(range(array.ndim))[::-1]))
        name = str(weight.name)
        node.replace_input_with(0, None)
        forget(graph, weight)
        node.outputs[0].replace_all_uses_with(initializer(graph, name, turned))
        graph.remove(node, safe=True)


def drop(graph: ir.Graph) -> None:
    """Remove Dropout: it does nothing when a model is used."""
    for node in list(graph):
        unused = len(node.outputs) < 2 or not node.outputs[1].uses()
        if node.op_type == "Dropout" and unused and constant(node.inputs[2] if len(node.inputs) > 2 else None) is None:
            source = node.inputs[0]
            assert source is not None
            if not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(source)
                graph.remove(node, safe=True)


def fold_batch_norms(graph: ir.Graph) -> int:
    """Multiply every BatchNormalization into the Conv, ConvTranspose or Gemm before it. Returns how many.

    y = g (Wx + b - m) / sqrt(v + eps) + c  is a layer with  W' = W g / sqrt(v + eps),  b' = (b - m) g / sqrt(..) + c.
    """
    count = 0
    for node in list(graph):
        layer = node.inputs[0].producer() if node.op_type == "BatchNormalization" and node.inputs[0] else None
        if layer is None or layer.op_type not in LAYERS[:3] or len(layer.outputs[0].uses()) != 1:
            continue
        if layer.outputs[0].is_graph_output() or attribute(node, "training_mode", 0):
            continue
        parts = [constant(value) for value in (*layer.inputs[1:3], *node.inputs[1:5])]
        bias = parts[1] if len(layer.inputs) > 2 and layer.inputs[2] is not None else None
        weight, (gain, shift, mean, variance) = parts[0], parts[-4:]
        had_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
        if any(p is None for p in (weight, gain, shift, mean, variance)) or (had_bias and bias is None):
            continue
        assert weight is not None and gain is not None and shift is not None  # noqa: PT018
        assert mean is not None and variance is not None  # noqa: PT018
        axis = output_axis(layer)
        if axis is None or weight.shape[axis] != len(gain):
            continue
        factor = (gain / np.sqrt(variance.astype(np.float64) + attribute(node, "epsilon", 1e-5))).astype(np.float64)
        shape = [1] * weight.ndim
        shape[axis] = -1
        old = (layer.inputs[1], layer.inputs[2] if had_bias else None, *node.inputs[1:5])
        own = str(layer.inputs[1].name)  # type: ignore[union-attr]
        names = (own, f"{own}.bias" if old[1] is None else str(old[1].name))
        new_weight = (weight * factor.reshape(shape)).astype(weight.dtype)
        new_bias = (((0 if bias is None else bias) - mean) * factor + shift).astype(weight.dtype)
        x = layer.inputs[0]
        layer.resize_inputs(3)
        for i in (1, 2):
            layer.replace_input_with(i, None)
        node.outputs[0].name, out = f"{node.outputs[0].name}.folded", node.outputs[0].name
        for i in range(len(node.inputs)):
            node.replace_input_with(i, None)
        for value in old:
            forget(graph, value)
        layer.replace_input_with(0, x)
        layer.replace_input_with(1, initializer(graph, names[0], new_weight))
        layer.replace_input_with(2, initializer(graph, names[1], new_bias))
        swap(graph, node, layer.outputs[0], str(out))
        count += 1
    return count


def pool_means(graph: ir.Graph) -> None:
    """Call a ReduceMean over the axes of a picture what it is, GlobalAveragePool: it has an integer kernel."""
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "ReduceMean" else None
        if x is None or x.shape is None or len(x.shape) != 4:
            continue
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes", None)
        if axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        out = node.outputs[0]
        pool = ir.node("GlobalAveragePool", [x], name=f"{node.name}/pool")
        pool.outputs[0].name = f"{out.name}.pooled"
        nodes = [pool]
        if not attribute(node, "keepdims", 1):
            nodes.append(ir.node("Flatten", [pool.outputs[0]], {"axis": 1}, name=f"{node.name}/flat"))
        graph.insert_before(node, nodes)
        swap(graph, node, nodes[-1].outputs[0], str(out.name))


def swap(graph: ir.Graph, node: ir.Node, value: ir.Value, name: str) -> None:
    """Let `value` take the place of a node's only output under `name`, a graph's output included; drop the node."""
    old = node.outputs[0]
    value.name = name
    value.shape, value.type = old.shape or value.shape, old.type or value.type
    for i, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[i] = value
    old.replace_all_uses_with(value)
    graph.remove(node, safe=True)


def output_axis(node: ir.Node) -> int | None:
    """Axis of a layer's weight that counts its outputs; None where one axis does not (grouped ConvTranspose)."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attribute(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if node.op_type == "MatMul" else None
