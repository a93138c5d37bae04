"""Shapes of all values of a graph, by ONNX's own inference, with the operators that it does not know added.

They are what the importer knows of ranks, and of the sizes that constants of Reshape follow.
"""

import onnx

from wherry.errors import BadInput

ROUNDS = 64
INLINE_BYTES = 4096  # larger initializers do not travel through the inference: no shape hangs on what they hold
# operators whose first output has the shape of the first input
SAME_SHAPE = {
    "GroupNormalization", "RMSNormalization", "InstanceNormalization", "LayerNormalization",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Gelu",
    "FastGelu", "BiasGelu", "FusedGelu", "QuickGelu", "RotaryEmbedding", "QLinearSigmoid",
    "MultiHeadAttention", "HardSwish", "Mish", "Swish", "PRelu", "Celu", "ThresholdedRelu", "MeanVarianceNormalization",
}  # fmt: skip


def infer(model: onnx.ModelProto) -> None:
    """Write the shapes that follow from the inputs into the model. Raises BadInput where they contradict."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if len(tensor.raw_data) > INLINE_BYTES:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="left-out")
    for _ in range(ROUNDS):
        try:
            light = onnx.shape_inference.infer_shapes(light, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
            raise BadInput(f"the shapes of the graph contradict one another: {str(error)[:300]}") from error
        if not added(light.graph):
            break
    adopt(model.graph, light.graph)


def added(graph: onnx.GraphProto) -> int:
    """Give outputs without a shape the one that their operator implies. Returns how many."""
    known = {v.name: v.type.tensor_type for v in [*graph.input, *graph.value_info, *graph.output]}
    known = {name: kind for name, kind in known.items() if kind.HasField("shape") and kind.elem_type}
    count = 0
    for node in graph.node:
        if not node.output or node.output[0] in known or not node.input or node.input[0] not in known:
            continue
        kind = onnx.TypeProto.Tensor()
        kind.CopyFrom(known[node.input[0]])
        if node.op_type == "MatMulNBits":
            size = next(a.i for a in node.attribute if a.name == "N")
            kind.shape.dim[-1].CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=size))
        elif node.op_type not in SAME_SHAPE:
            continue
        value = graph.value_info.add(name=node.output[0])
        value.type.tensor_type.CopyFrom(kind)
        known[node.output[0]] = kind
        count += 1
    return count


def adopt(graph: onnx.GraphProto, inferred: onnx.GraphProto) -> None:
    """Take over what was inferred, also in inner graphs."""
    for name in ("value_info", "output"):
        del getattr(graph, name)[:]
        getattr(graph, name).extend(getattr(inferred, name))
    for node, other in zip(graph.node, inferred.node, strict=True):
        for mine, theirs in zip(node.attribute, other.attribute, strict=True):
            if mine.HasField("g"):
                adopt(mine.g, theirs.g)
