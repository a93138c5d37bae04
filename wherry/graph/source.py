"""An ONNX file as a Checkpoint: weights under their own names, one row per output, found from the nodes that read them.

    Conv [o, i/g, ...]           -> [o, i/g * ...]      ConvTranspose [i, o, ...] -> [o, i * ...]
    Gemm, MatMul [k, n]          -> [n, k]              Gather of a constant      -> [rows, width], an embedding
    LSTM, GRU, RNN [d, g * h, k] -> [d * g * h, k]

A float graph is made plain first (tidy.py), so these are the weights after batch norms were folded. A quantized one
(DequantizeLinear of an initializer) gives its integers as QTensors.
Errors come before anything is loaded: a file that is cut off, data that lie outside of the folder or are missing, an
operator set that is too old.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from wherry.artifact import MANIFEST, Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import Corrupt, Missing, Unsupported
from wherry.graph import tidy
from wherry.graph.blocks import unpack
from wherry.graph.edit import CODES, SCALES
from wherry.graph.proto import bytes_of, every_graph, located
from wherry.locate import license_of
from wherry.report import read_object
from wherry.scheme import Group, QTensor, Row, Scheme
from wherry.task import Task

LEAST_OPSET, MOST_OPSET = 13, 25
QUANTIZED = ("DequantizeLinear", "MatMulNBits", "MatMulInteger", "ConvInteger")
RECURRENT = ("LSTM", "GRU", "RNN")
MAIN = "model.onnx"
DRAWN = (".scale", ".zero", SCALES)  # what quantizing adds beside codes
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def load(path: Path) -> Checkpoint:
    """Open `model.onnx` (or the folder that holds it) with the task.json beside it, if there is one.

    Raises:
        Missing, Corrupt: no such file, data files that are missing, cut off, or outside of the folder.
        Unsupported: an operator set that is not read.
    """
    file = path / MAIN if path.is_dir() else path
    proto = read(file)
    try:
        graph = Graph(file, ir.from_proto(proto))
    except ir.serde.SerdeError as error:
        raise Corrupt(f"{file} is not a valid graph: {' '.join(str(error).split())[:200]}") from error
    task = file.parent / "task.json"
    if task.exists():
        found = Task.from_dict(read_object(task), file.parent)
    else:
        inputs = tuple(str(value.name) for value in graph.model.graph.inputs)
        outputs = tuple(str(value.name) for value in graph.model.graph.outputs)
        found = Task("feature-extraction", file.parent, inputs=inputs, outputs=outputs)
    config = {"architectures": ["onnx"], "opset": graph.opset}
    own = Artifact.open(file.parent).manifest if (file.parent / MANIFEST).exists() else {}
    name = own.get("model") or (file.parent.resolve().name if file.name == MAIN else file.stem)
    return Checkpoint(
        file.parent, config, found, graph, name, own.get("license") or license_of(file.parent),
        origin=own.get("source", ""), plan=own.get("plan", []), recipe=own.get("recipe", ""), graph=graph,
    )  # fmt: skip


def read(file: Path) -> onnx.ModelProto:
    """The graph of a file, with every claim about data outside of it checked; the data stay on disk.

    Raises: see `load`.
    """
    if not file.is_file():
        raise Missing(f"no such file: {file}")
    try:
        proto = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's own kinds of error
        raise Corrupt(f"{file} is not an ONNX file: {' '.join(str(error).split())[:120]}") from error
    if not proto.graph.node or not proto.opset_import:
        raise Corrupt(f"{file} holds no ONNX graph: it has {len(proto.graph.node)} nodes")
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not LEAST_OPSET <= opset <= MOST_OPSET:
        raise Unsupported(
            f"{file} uses operator set {opset}; {LEAST_OPSET} to {MOST_OPSET} are read.\n"
            f"Convert it: onnx.version_converter.convert_version(model, 21)"
        )
    for tensor in [t for graph in every_graph(proto.graph) for t in graph.initializer]:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            located(tensor, file.parent)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != bytes_of(tensor):
            raise Corrupt(f"{file}: {tensor.name} has {len(tensor.raw_data):,} bytes for shape {list(tensor.dims)}")
    try:
        onnx.checker.check_model(str(file))
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:  # its message may quote the file's bytes
        raise Corrupt(f"{file} is not a valid graph: {' '.join(str(error).split())[:200]}") from error
    return proto


def stored_at(node: ir.Node, i: int, value: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """(weight or codes, scales, zeros) behind input i of a node; scales None for a float weight."""
    source = value.producer()
    if source is not None and source.op_type == "Mul" and source.inputs[0] is not None:  # a weight computed in float
        inner = source.inputs[0].producer()
        codes = inner.inputs[0] if inner is not None and inner.op_type == "Cast" else None
        if codes is not None and str(codes.name).endswith(CODES):
            return codes, source.inputs[1], None
    if source is not None and source.op_type == "DequantizeLinear" and not tidy.attribute(source, "block_size", 0):
        codes, scales, *zeros = source.inputs
        if codes is not None and tidy.constant(codes) is not None:
            return codes, scales, zeros[0] if zeros else None
    if node.op_type == "MatMulNBits" and i == 1:
        return value, node.inputs[2], node.inputs[3] if len(node.inputs) > 3 else None
    name = str(value.name)
    if name.endswith(CODES) and value.graph is not None:
        return value, value.graph.initializers.get(name.removesuffix(CODES) + SCALES), None
    return value, None, None


def constant(value: ir.Value | None) -> np.ndarray:
    """The array of an initializer that is there."""
    assert value is not None and value.const_value is not None  # noqa: PT018
    return value.const_value.numpy()


def extents(value: ir.Value) -> tuple[int, ...]:
    """Shape of an initializer."""
    assert value.const_value is not None
    return tuple(int(n) for n in value.const_value.shape)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layer:
    """A weight as a matrix of one row per output.

    role: "linear", "convolution", "recurrent" or "embedding". node: the first that reads it. value: floats, or codes.
    order: axes of the stored weight that bring the outputs first. rows: how many of them count rows.
    scales, zeros: of a quantized weight, else None.
    """

    role: str
    node: ir.Node
    value: ir.Value
    order: tuple[int, ...]
    rows: int = 1
    scales: ir.Value | None = None
    zeros: ir.Value | None = None

    def matrix(self, array: np.ndarray) -> np.ndarray:
        """Stored weight to [n, k]."""
        turned = np.transpose(array, self.order)
        return turned.reshape(int(np.prod(turned.shape[: self.rows])), -1).copy(order="C")

    def stored(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """[n, k] to the stored weight of that shape."""
        turned = matrix.reshape([shape[axis] for axis in self.order])
        return np.ascontiguousarray(np.transpose(turned, np.argsort(self.order)))

    @property
    def axis(self) -> int:
        """Axis of the stored weight that counts outputs."""
        return self.order[0]


class Graph:
    """A Source over a graph; `model` is the plain graph in memory, its large weights read when they are asked for."""

    def __init__(self, path: Path, model: ir.Model, plain: bool = False) -> None:
        """A graph of that file. plain: it was made plain before."""
        self.path, self.model = path, model
        for tensor in model.graph.initializers.values():
            if isinstance(tensor.const_value, ir.ExternalTensor):
                tensor.const_value = ir.ExternalTensor(
                    tensor.const_value.location, tensor.const_value.offset, tensor.const_value.length,
                    tensor.const_value.dtype, shape=tensor.const_value.shape, name=tensor.const_value.name,
                    base_dir=path.parent,
                )  # fmt: skip
        self.opset = int(model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0)))
        coded = any(name.endswith(CODES) for name in model.graph.initializers)
        self.quantized = coded or any(node.op_type in QUANTIZED for node in model.graph)
        if not self.quantized and not plain:
            tidy.tidy(model)
        self.find()

    def copy(self) -> "Graph":
        """The same graph, to be changed."""
        return Graph(self.path, ir.from_proto(ir.to_proto(self.model)), plain=True)

    def find(self) -> None:
        """Find the layers and the other tensors; again after the graph was changed."""
        self.layers: dict[str, Layer] = {}
        self.others: dict[str, ir.Value] = {}
        self.reasons: dict[str, str] = {}
        parts: set[str] = set()
        for node in self.model.graph:
            for i, value in enumerate(node.inputs):
                layer = self._layer(node, i, value) if value is not None else None
                if layer is None:
                    continue
                if (axes := len(extents(layer.value))) != len(layer.order) or axes < 2:
                    raise Corrupt(f"{self.path}: {layer.value.name} has {axes} axes, not what {node.op_type} takes")
                self.layers.setdefault(str(layer.value.name).removesuffix(CODES), layer)
                parts |= {str(v.name) for v in (layer.scales, layer.zeros) if v is not None}
        for name, value in self.model.graph.initializers.items():
            kind = value.const_value.dtype if value.const_value is not None else None
            if name not in self.layers and name not in parts and kind in FLOATS and not name.endswith(DRAWN):
                self.others[name] = value

    def _layer(self, node: ir.Node, i: int, value: ir.Value) -> Layer | None:
        """The layer whose weight is input i of a node, or None."""
        codes, scales, zeros = stored_at(node, i, value)
        if codes.const_value is None or codes.is_graph_input():
            return None
        rank, kind = len(codes.const_value.shape), node.op_type
        if scales is None and codes.const_value.dtype not in FLOATS:
            return None
        name = str(codes.name)
        if kind == "Conv" and i == 1:
            return Layer("convolution", node, codes, tuple(range(rank)), 1, scales, zeros)
        if kind == "ConvTranspose" and i == 1:
            if tidy.output_axis(node) is not None:
                return Layer("convolution", node, codes, (1, 0, *range(2, rank)), 1, scales, zeros)
            self.reasons[name] = "a grouped ConvTranspose has no one axis of outputs"
        if kind == "Gemm" and i == 1:
            order = (0, 1) if tidy.attribute(node, "transB", 0) else (1, 0)
            return Layer("linear", node, codes, order, 1, scales, zeros)
        if kind == "MatMul" and i == 1:
            if rank == 2:
                return Layer("linear", node, codes, (1, 0), 1, scales, zeros)
            self.reasons[name] = f"a constant of {rank} axes in MatMul: only matrices are layers"
        if kind == "MatMulNBits" and i == 1:
            return Layer("linear", node, codes, (0, 1, 2), 1, scales, zeros)
        if kind in RECURRENT and i in (1, 2):
            return Layer("recurrent", node, codes, (0, 1, 2), 2, scales, zeros)
        if kind == "Gather" and i == 0 and rank == 2 and tidy.attribute(node, "axis", 0) == 0:
            return Layer("embedding", node, codes, (0, 1), 1, scales, zeros)
        return None

    def roles(self) -> list[tuple[str, str, str]]:
        """(name, role, reason to leave it alone or "") of every float tensor, layers first."""
        out = [(name, layer.role, "") for name, layer in self.layers.items()]
        for name, value in self.others.items():
            assert value.const_value is not None
            role = "bias" if len(value.const_value.shape) <= 1 else "other"
            reason = self.reasons.get(name, "biases and norms stay float" if role == "bias" else "not a layer's weight")
            out.append((name, role, reason))
        return out

    def names(self) -> list[str]:
        """All float tensors and quantized weights."""
        return [*self.layers, *self.others]

    def shape(self, name: str) -> tuple[int, ...]:
        """[n, k] of a layer's weight; the stored shape of anything else."""
        if name not in self.layers:
            return extents(self.others[name])
        layer = self.layers[name]
        if layer.node.op_type == "MatMulNBits":
            return int(layer.node.attributes["N"].as_int()), int(layer.node.attributes["K"].as_int())
        turned = [extents(layer.value)[axis] for axis in layer.order]
        return int(np.prod(turned[: layer.rows])), int(np.prod(turned[layer.rows :]))

    def dtype(self, name: str) -> torch.dtype:
        """Float dtype; of a quantized weight that of its scales."""
        layer = self.layers.get(name)
        value = self.others[name] if layer is None else layer.scales or layer.value
        half = value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16
        return torch.float16 if half else torch.float32

    def scheme(self, name: str) -> Scheme | None:
        """How a weight is stored; None for a float."""
        layer = self.layers.get(name)
        if layer is None or layer.scales is None:
            return None
        if layer.node.op_type == "MatMulNBits":
            bits, size = (int(layer.node.attributes[key].as_int()) for key in ("bits", "block_size"))
            return Scheme(bits, grain=Group(size), symmetric=layer.zeros is None)
        codes = layer.value.const_value
        assert codes is not None
        zero = tidy.constant(layer.zeros)
        unsigned = codes.dtype in (ir.DataType.UINT8, ir.DataType.UINT4)
        return Scheme(
            int(codes.dtype.bitwidth), grain=Row(), symmetric=not unsigned and (zero is None or not zero.any())
        )

    def read(self, name: str) -> torch.Tensor | QTensor:
        """One tensor; a layer's weight as [n, k]."""
        scheme = self.scheme(name)
        if name in self.others:
            return torch.from_numpy(np.array(constant(self.others[name])))
        layer = self.layers[name]
        array = constant(layer.value)
        if scheme is None:
            return torch.from_numpy(layer.matrix(array))
        n, k = self.shape(name)
        shift = 1 << (scheme.bits - 1)
        scale = constant(layer.scales).astype(np.float32)
        if layer.node.op_type == "MatMulNBits":
            codes = unpack(array, scheme.bits).reshape(n, k).astype(np.int16) - shift
            zeros = None
            if layer.zeros is not None:
                found = unpack(constant(layer.zeros).reshape(n, -1), scheme.bits)
                zeros = found[:, : scale.size // n].astype(np.int16) - shift
        else:
            shift = shift if str(array.dtype).startswith("uint") else 0
            codes = layer.matrix(array.astype(np.int16) - shift)
            zeros = None
            if not scheme.symmetric and layer.zeros is not None:
                zeros = np.broadcast_to((constant(layer.zeros).astype(np.int16) - shift).reshape(-1, 1), (n, 1))
        zero = None if zeros is None else torch.from_numpy(np.array(zeros, np.int8))
        groups = scale.reshape(n, -1) if scale.size >= n else np.broadcast_to(scale.reshape(-1, 1), (n, 1))
        return QTensor(scheme, torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(np.array(groups)), zero)

    def fingerprint(self) -> str:
        """Names, sizes and times of change of the file and its data."""
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files()]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def files(self) -> list[Path]:
        """The graph's file and those that hold its data."""
        data = {t.const_value.location for t in self.model.graph.initializers.values()
                if isinstance(t.const_value, ir.ExternalTensor)}  # fmt: skip
        return [self.path, *sorted(self.path.parent / str(name) for name in data)]

    def bytes(self) -> int:
        """Size of these files."""
        return sum(file.stat().st_size for file in self.files())


__all__ = ["Graph", "Layer", "load", "read"]
