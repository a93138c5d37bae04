"""An ONNX file, read without trust: every claim is checked before it is used, nothing outside of its folder is read."""

import os
from pathlib import Path

import onnx
from onnx import TensorProto

from wherry.errors import BadInput, Corrupt, Missing, Unsupported
from wherry.formats.onnx.torch_module.values import dtype_of
from wherry.graph.proto import every_graph, located

OLDEST, NEWEST = 13, 28  # opsets of ONNX's own domain


def read(path: str | os.PathLike | onnx.ModelProto) -> onnx.ModelProto:
    """The model of a file (or one in memory), with its external tensors, nodes in an order that can be run.

    Raises:
        Missing: the file or its external data is not there.
        Corrupt: not an ONNX file, cut short, a circle of nodes, external data outside of the folder or too short.
        Unsupported: an opset that is not imported.
        BadInput: an input of the graph without a type.
    """
    folder = None
    if isinstance(path, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(path)
    else:
        file = Path(path)
        if not file.is_file():
            raise Missing(f"{file} is not a file; give the path of a model.onnx")
        folder = file.parent
        try:
            model = onnx.load(file, load_external_data=False)
        except Exception as error:  # protobuf's own kinds of error
            raise Corrupt(f"{file} is not an ONNX file, or is cut short: {str(error)[:120]}") from error
    if not model.HasField("graph") or not model.opset_import:
        raise Corrupt(f"{_name(path)} is not an ONNX model: it has no graph, or names no opset")
    graphs = every_graph(model.graph)
    for graph in graphs:
        texts(graph)
    check_opsets(model)
    for graph in graphs:
        order(graph)
    for value in model.graph.input:
        if not value.type.WhichOneof("value"):
            raise BadInput(f"input {value.name!r} of the graph has no type; write its element type into the file")
        if value.type.WhichOneof("value") == "tensor_type":
            dtype_of(value.type.tensor_type.elem_type, f"input {value.name!r}")
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            external(tensor, folder)
    return model


def _name(path: object) -> str:
    return "the model" if isinstance(path, onnx.ModelProto) else str(path)


def texts(graph: onnx.GraphProto) -> None:
    """Raise Corrupt for a name that is not text."""
    for node in graph.node:
        for name in [
            node.op_type,
            node.domain,
            node.name,
            *node.input,
            *node.output,
            *[a.name for a in node.attribute],
        ]:
            if not isinstance(name, str):
                raise Corrupt(f"a name in node {node.name!r} is not text: {name!r}")
    for value in [graph, *graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        if not isinstance(value.name, str):
            raise Corrupt(f"a name in the graph is not text: {value.name!r}")


def check_opsets(model: onnx.ModelProto) -> None:
    """Raise Unsupported for an opset that is not imported, with the way out."""
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            continue
        if entry.version > NEWEST:
            raise Unsupported(
                f"opset {entry.version} is not imported ({OLDEST} to {NEWEST} are); convert the file: "
                f"onnx.version_converter.convert_version(model, {NEWEST})"
            )
        if entry.version < OLDEST and (name := changed(model, entry.version)):
            raise Unsupported(
                f"{name} of opset {entry.version} is not imported ({OLDEST} to {NEWEST} are); convert the file: "
                f"onnx.version_converter.convert_version(model, 17)"
            )


def changed(model: onnx.ModelProto, version: int) -> str:
    """The first operator that meant something else, or was not there, at this old opset."""
    for graph in every_graph(model.graph):
        for node in graph.node:
            if node.domain not in ("", "ai.onnx"):
                continue
            try:
                old = onnx.defs.get_schema(node.op_type, version, "").since_version
                new = onnx.defs.get_schema(node.op_type, OLDEST, "").since_version
            except onnx.defs.SchemaError:
                return str(node.op_type)
            if old != new and not same_meaning(node.op_type, old):
                return str(node.op_type)
    return ""


def same_meaning(kind: str, old: int) -> bool:
    """Operators whose versions before 13 only lack types or broadcasting rules: what they could say means the same."""
    return old >= SAME_SINCE.get(kind, 100)


SAME_SINCE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Gemm", "And", "Or", "Xor", "Equal", "Greater", "Less"), 7),
    **dict.fromkeys(("Relu", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Abs", "Neg", "Floor", "Ceil", "Reciprocal"), 6),
    **dict.fromkeys(("Max", "Min", "Sum", "Mean"), 8),
    **dict.fromkeys(("MatMul", "Erf", "Where", "Expand", "Sign", "NonZero", "Not", "Mod", "Tile", "IsNaN", "Size"), 6),
    **dict.fromkeys(("Conv", "ConvTranspose", "Transpose", "Identity", "Shape", "GlobalAveragePool", "Flatten"), 1),
    **dict.fromkeys(("Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Reshape", "Constant"), 6),
    "ReduceSum": 1, "Split": 2,
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "Elu", "PRelu"), 6),
    **dict.fromkeys(("LeakyRelu", "Dropout", "ConstantOfShape", "InstanceNormalization", "DepthToSpace"), 6),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), 7), "Slice": 10, "BatchNormalization": 9, "Resize": 11, "Pad": 11,
    "MaxPool": 8, "AveragePool": 7, "QuantizeLinear": 10, "DequantizeLinear": 10, "TopK": 10, "Clip": 11, "If": 1,
    "Loop": 1, "Scan": 9, "Scatter": 9, "Upsample": 9, 
}  # fmt: skip


def tensors(model: onnx.ModelProto) -> list[TensorProto]:
    """All tensors of the file."""
    out = []
    for graph in every_graph(model.graph):
        out += list(graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                out += [t for t in [attribute.t, *attribute.tensors] if t.ByteSize()]
    return out


def order(graph: onnx.GraphProto) -> None:
    """Put each node behind those whose outputs it reads. Raises Corrupt for a circle, or two makers of one name."""
    makers: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in makers:
                raise Corrupt(f"two nodes make {name!r}: {graph.node[makers[name]].name!r} and {node.name!r}")
            makers[name] = i
    needs = []
    for node in graph.node:
        read = set(node.input)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                for each in every_graph(inner):
                    for n in each.node:
                        read |= set(n.input)
                    read |= {o.name for o in each.output}
        needs.append({makers[name] for name in read if name in makers})
    done: set[int] = set()
    ranked: list[int] = []
    waiting = list(range(len(needs)))
    readers: dict[int, list[int]] = {}
    left = [len(need) for need in needs]
    for i, need in enumerate(needs):
        for j in need:
            readers.setdefault(j, []).append(i)
    ready = [i for i in waiting if not left[i]][::-1]
    while ready:
        i = ready.pop()
        done.add(i)
        ranked.append(i)
        for j in readers.get(i, [])[::-1]:
            left[j] -= 1
            if not left[j]:
                ready.append(j)
    if len(ranked) < len(needs):
        names = [graph.node[i].name or graph.node[i].op_type for i in waiting if i not in done][:4]
        raise Corrupt(f"the graph runs in a circle through {', '.join(names)}")
    if ranked != waiting and any(j > i for i, need in enumerate(needs) for j in need):
        nodes = [graph.node[i] for i in ranked]
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def external(tensor: TensorProto, folder: Path | None) -> None:
    """Read the bytes of a tensor that lie in another file of the same folder. Raises: as `located`."""
    if folder is None:
        raise Missing(f"tensor {tensor.name!r} lies in another file; give the model's path, not the model")
    file, begin, length = located(tensor, folder)
    with open(file, "rb") as stream:
        stream.seek(begin)
        tensor.raw_data = stream.read(length)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT
