"""One ONNX graph becomes one torch.fx graph, node by node; see `table` for the operators.

Idea:   a node whose inputs are all known is computed now (constants are folded); int64 vectors that come from shapes
        are kept as Python ints; the rest is a call in the graph. Weights become layers under the names of the ONNX
        initializers, other constants buffers.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from wherry.errors import Corrupt, Unsupported
from wherry.formats.onnx.torch_module.names import buffer_name, clean, free_name, stem
from wherry.formats.onnx.torch_module.table import TABLE, arguments
from wherry.formats.onnx.torch_module.values import DTYPES, Constant, Ints, Node, Value, node_of, tensor_of

UNSIGNED = {onnx.TensorProto.UINT16, onnx.TensorProto.UINT32, onnx.TensorProto.UINT64}
COMPUTES = {  # in int64 instead, for torch cannot in these types
    "Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BitwiseNot",
    "Pow", "Clip", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "Sign", "Abs", "Neg",
}  # fmt: skip
SMALL = 64  # elements of an int64 vector that is taken as Python ints


def as_tensor(items: list[int], scalar: bool = False) -> Tensor:
    """Python ints, known when the module runs, as an int64 tensor [n], or [] when `scalar`."""
    parts = [torch.scalar_tensor(item, dtype=torch.int64) for item in items]
    return parts[0] if scalar else torch.stack(parts) if parts else torch.zeros(0, dtype=torch.int64)


def as_ints(x: Tensor) -> Any:
    """The numbers of an integer tensor [n] or [] as a list of Python ints, or one."""
    return x.tolist()


class Builder:
    """Builds the torch graph of one ONNX graph; `outer` is the builder of the graph around it (If, Loop)."""

    def __init__(
        self, graph: onnx.GraphProto, opsets: dict[str, int], outer: "Builder | None" = None, symbolic: bool = True
    ) -> None:
        self.opsets, self.outer = opsets, outer
        self.shapes: dict[str, list] = {}  # dimensions: ints, names, None
        self.types: dict[str, int] = {}
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.symbolic = symbolic
        self.batch: int | None = outer.batch if outer else None  # where the file fixes it
        self.env: dict[str, Value] = {}
        self.captured: list[str] = []  # names of the outer graph that came in as inputs
        self.done: set[str] = set()  # outputs that a fused layer has already given
        self.fused: dict[str, list[str]] = {}
        self.shared: dict[tuple, Any] = outer.shared if outer else {}
        self.buffers: dict[Constant, fx.Node] = {}  # by the object, which so stays alive
        self.symbols: dict[fx.Node, Any] = {}  # node that gives a size -> its dimension in the ONNX file
        self.sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.changed: Counter[str] = outer.changed if outer else Counter()
        self.read(graph)
        self.node: Node | None = None

    def read(self, graph: onnx.GraphProto) -> None:
        """Take the nodes of a graph as those to build."""
        self.proto = graph
        for value in [*graph.input, *graph.value_info, *graph.output]:
            kind = value.type.tensor_type
            self.types[value.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[value.name] = [dimension(d) for d in kind.shape.dim]
        self.types |= {t.name: t.data_type for t in graph.initializer}
        self.nodes = [node_of(n) for n in graph.node]
        self.uses = Counter(name for n in self.nodes for name in n.inputs)
        self.consumers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {o.name for o in graph.output}
        self.outputs |= {name for proto in graph.node for name in inner_names(proto)}  # kept whole for inner graphs

    def scope(self, graph: onnx.GraphProto) -> Any:
        """Go into an inner graph, whose nodes become nodes of this one; `restore` goes back."""
        saved = self.proto, self.nodes, self.uses, self.consumers, self.outputs, dict(self.env), dict(self.shapes)
        self.read(graph)
        self.outputs = self.outputs | saved[4]
        return saved

    def restore(self, saved: Any) -> None:
        """Come back from an inner graph."""
        self.proto, self.nodes, self.uses, self.consumers, self.outputs, self.env, self.shapes = saved

    # values

    def get(self, name: str) -> Any:
        """The value of a name; one of the outer graph becomes an input. Raises Corrupt when nothing makes it."""
        if not name:
            return None
        if name in self.env:
            return self.env[name]
        if self.outer is None:
            raise Corrupt(f"{self.node} reads {name!r}, which no node, input or initializer makes")
        value = self.outer.get(name)
        if isinstance(value, Ints) and not value.known:
            value = self.outer.tensor(value)
            self.outer.env[name] = value
        if isinstance(value, fx.Node):
            self.captured.append(name)
            value = self.graph.placeholder(clean(name))
        self.env[name] = value
        return value

    def peek(self, name: str) -> Value:
        """The value of a name when it is known already, without taking it in."""
        value = self.env.get(name)
        return self.outer.peek(name) if value is None and self.outer is not None else value

    def only_read_by(self, name: str, kind: str) -> bool:
        """Whether nodes of this kind alone read a name."""
        return name not in self.outputs and all(node.kind == kind for node in self.consumers.get(name, []))

    def follow(self, name: str, source: str) -> None:
        """`name` will have the value of `source`: the node that makes it is fused into that of `source`."""
        self.done.add(name)
        self.fused.setdefault(source, []).append(name)

    def inputs(self, node: Node) -> list[Any]:
        """The values of a node's inputs."""
        return [self.get(name) for name in node.inputs]

    def tensor(self, value: Value) -> Any:
        """The value as a tensor in the graph."""
        if isinstance(value, Constant):
            return self.buffer(value)
        if isinstance(value, Ints):
            if value.known:
                data = torch.tensor(value.items[0] if value.scalar else value.items, dtype=torch.int64)
                return self.buffer(Constant(data, "ints"))
            return self.call(as_tensor, value.items, scalar=value.scalar)
        return value

    def ints(self, value: Value) -> Any:
        """The value as Python ints: a list, an int, or an fx.Node that gives one of these."""
        if isinstance(value, Constant):
            return value.tensor.tolist()
        if isinstance(value, Ints):
            return value.items[0] if value.scalar else value.items
        return None if value is None else self.call(as_ints, value)

    def as_vector(self, value: Value) -> Ints | None:
        """The value as Ints when it is known to be a few int64 numbers."""
        if isinstance(value, Constant) and value.tensor.dtype == torch.int64 and value.tensor.dim() <= 1:
            if value.tensor.numel() <= SMALL:
                items = value.tensor.tolist()
                return Ints([items] if value.tensor.dim() == 0 else items, value.tensor.dim() == 0)
        return value if isinstance(value, Ints) else None

    def one_row(self, value: Any, rank: int | None) -> Any:
        """A constant that an exporter repeated for each example of a fixed batch, as one row, which broadcasts."""
        if not isinstance(value, Constant) or not self.symbolic or not self.batch or self.batch < 2:
            return value
        t = value.tensor
        if t.dim() < 2 or t.dim() != rank or t.shape[0] != self.batch or not bool((t == t[:1]).all()):
            return value
        self.changed["one row of a repeated constant"] += 1
        return Constant(t[:1].clone(), value.name, derived=True)

    def known(self, value: Value) -> Tensor | None:
        """The tensor of a value that is known now."""
        if isinstance(value, Constant):
            return value.tensor
        if isinstance(value, Ints) and value.known:
            return torch.tensor(value.items[0] if value.scalar else value.items, dtype=torch.int64)
        return None

    def shape(self, name: str) -> list | None:
        """Dimensions of a name as the file says: ints, names or None; None when not even the rank is known."""
        value = self.env.get(name)
        if isinstance(value, Constant):
            return list(value.tensor.shape)
        if name in self.shapes:
            return self.shapes[name]
        return self.outer.shape(name) if self.outer else None

    def size(self, x: fx.Node, axis: int, dimension: Any = None) -> fx.Node:
        """x.size(axis) in the graph, once."""
        if (x, axis) not in self.sizes:
            self.sizes[x, axis] = self.graph.call_method("size", (x, axis))
        self.symbols[self.sizes[x, axis]] = dimension
        return self.sizes[x, axis]

    def kind(self, name: str) -> int | None:
        """The ONNX element type of a name, when the file tells."""
        if name in self.types:
            return self.types[name]
        return self.outer.kind(name) if self.outer else None

    # calls and layers

    def call(self, function: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the graph."""
        return self.graph.call_function(function, args, kwargs)

    def items(self, value: fx.Node, count: int) -> list[fx.Node]:
        """The first `count` items of a tuple."""
        return [self.call(operator.getitem, value, i) for i in range(count)]

    def safe(self, name: str) -> str:
        """A name for an input of the graph that no other has."""
        return clean(name)

    def buffer(self, value: Constant) -> fx.Node:
        """A constant as a buffer of the module, once."""
        if value not in self.buffers:
            name = self.free(buffer_name(value.name))
            self.root.register_buffer(name, value.tensor)
            self.buffers[value] = self.graph.get_attr(name)
        return self.buffers[value]

    def layer(self, layer: nn.Module, name: str, *args: Any) -> fx.Node:
        """A call of `layer`, placed at the dotted place that `name` (an initializer's or a node's) says."""
        parts = [part if part.isdigit() else clean(part) for part in re.split(r"[./]|::", name) if part] or ["layer"]
        here = self.root
        for i, part in enumerate(parts[:-1]):
            there = getattr(here, part, None)
            if there is None:
                there = nn.Module()
                here.add_module(part, there)
            elif type(there) is not nn.Module:  # the place is taken by a layer or a buffer
                parts[i:] = ["_".join(parts[i:])]
                break
            here = there
        parts[-1] = free_name(here, parts[-1])
        here.add_module(parts[-1], layer)
        return self.graph.call_module(".".join(parts), args)

    def free(self, name: str) -> str:
        """`name`, or with a number behind it when the module has one of that name."""
        return free_name(self.root, name)

    def place(self, node: Node, *weights: Constant) -> str:
        """The name of a layer: of its first weight without `.weight`, else of the node."""
        return stem([w.name for w in weights], node.name, node.kind)

    def parameter(self, weight: Constant, change: str = "", make: Callable[[Tensor], Tensor] | None = None) -> Any:
        """The weight as a Parameter, one for all layers that read the same initializer in the same layout."""
        flipped = weight.flipped != (change == "t")
        key = (
            (weight.name, flipped, "" if change == "t" else change)
            if weight.name and not weight.derived
            else (weight, flipped, change)
        )
        if key not in self.shared:
            data = make(weight.tensor) if make else weight.tensor.t() if change == "t" else weight.tensor
            data = data.detach().contiguous()
            self.shared[key] = nn.Parameter(data, requires_grad=data.is_floating_point())
        return self.shared[key]

    # building

    def build(self) -> None:
        """All nodes in order. Raises Unsupported, Corrupt."""
        for node in self.nodes:
            if node.outputs and all(name in self.done for name in node.outputs):
                continue
            self.node = node
            results = self.operator(node)
            if not isinstance(results, list | tuple):
                results = [results]
            for name, value in zip(node.outputs, results, strict=False):
                if name:
                    self.env[name] = value
                    self.rename(value, name)
                for other in self.fused.get(name, []):
                    self.env[other] = value
            if missing := [n for n in node.outputs[len(results) :] if n]:
                raise Unsupported(f"{node}: its output {missing[0]!r} is not made by the importer")

    def rename(self, value: Value, name: str) -> None:
        """Remember what the file calls a call."""
        if isinstance(value, fx.Node) and "onnx" not in value.meta:
            value.meta["onnx"] = name
            if self.node is not None:
                value.meta["onnx_node"] = self.node.name

    def operator(self, node: Node) -> Any:
        """The values of the node's outputs."""
        entry = TABLE.get((node.domain, node.kind))
        opset = self.opsets.get(node.domain)
        if entry is None:
            raise Unsupported(
                f"{node} is not among the operators that are imported (domain {node.domain or 'ai.onnx'}, opset "
                f"{opset}).\nTake it out of the graph, or write it with others: docs/onnx-import.md lists them."
            )
        try:
            if entry.build is not None:
                result = entry.build(self, node)
                if result is not NotImplemented:
                    return result
            if entry.run is None:
                raise Unsupported(f"{node} (opset {opset}) is imported only where its inputs are constant")
            return self.generic(node)
        except (
            TypeError,
            ValueError,
            IndexError,
            RuntimeError,
            KeyError,
            AttributeError,
            NotImplementedError,
        ) as error:
            raise Unsupported(f"{node}, opset {opset}, cannot be built: {str(error)[:300]}") from error

    def generic(self, node: Node, function: Callable | None = None, values: Sequence[Value] | None = None) -> Any:
        """What runs, as a call, or computed now."""
        entry = TABLE[node.domain, node.kind]
        facts = arguments(entry, node)
        values = list(self.inputs(node) if values is None else values)
        function = function or entry.run
        assert function is not None
        known = {argument for argument, _ in entry.rename.values()} | (entry.accepts or set())
        if entry.accepts is not None and (unknown := facts.keys() - known):
            raise Unsupported(
                f"{node}, opset {self.opsets.get(node.domain)}: attribute {sorted(unknown)[0]!r} is not imported"
            )
        if "outputs" in (entry.accepts or ()):
            facts["outputs"] = len(node.outputs)
        if "opset" in (entry.accepts or ()):
            facts["opset"] = self.opsets.get(node.domain, 1)
        every = -1 in entry.ints
        wanted = [every or i in entry.ints for i in range(len(values))]
        tensors = [self.known(v) for v in values]
        if entry.fold and all(t is not None or v is None for t, v in zip(tensors, values, strict=True)):
            args: list[Any] = [t.tolist() if w and t is not None else t for t, w in zip(tensors, wanted, strict=True)]
            narrow = [i for i, v in enumerate(values) if node.kind in COMPUTES and v is not None
                      and tensors[i].dtype in (torch.uint16, torch.uint32, torch.uint64)]  # type: ignore[union-attr] # fmt: skip
            if narrow:
                dtype = args[narrow[0]].dtype
                args = [a.long() if i in narrow else a for i, a in enumerate(args)]
            with torch.no_grad():
                result = function(*args, **facts)
            if narrow and result.dtype == torch.int64:
                result = result.to(dtype)
            first = values[0].name if values and isinstance(values[0], Constant) else ""
            if isinstance(result, tuple | list):
                return [Constant(t, first, derived=True) for t in result]
            return Constant(result, first, derived=True)
        args = [self.ints(v) if w else self.tensor(v) for v, w in zip(values, wanted, strict=True)]
        facts = {k: self.buffer(Constant(v, k)) if isinstance(v, Tensor) else v for k, v in facts.items()}
        wide = [node.kind in COMPUTES and self.kind(name) in UNSIGNED for name in node.inputs]
        if any(wide):
            args = [self.graph.call_method("to", (a, torch.int64)) if w else a for a, w in zip(args, wide, strict=True)]
        result = self.call(function, *args, **facts)
        if any(wide) and self.kind(node.outputs[0]) in UNSIGNED:
            return self.graph.call_method("to", (result, DTYPES[self.kind(node.outputs[0])]))  # type: ignore[index]
        if entry.many:
            return [self.call(operator.getitem, result, i) if n else None for i, n in enumerate(node.outputs)]
        return result

    def constants(self) -> None:
        """Take in the initializers."""
        for proto in self.proto.initializer:
            self.env[proto.name] = Constant(tensor_of(proto), proto.name)
        for sparse in self.proto.sparse_initializer:
            raise Unsupported(f"initializer {sparse.values.name!r} is sparse; store it dense")

    def finish(self, names: list[str]) -> None:
        """The graph's outputs, as tensors."""
        values = [self.tensor(self.get(name)) for name in names]
        self.graph.output(values[0] if len(values) == 1 and self.outer is None else tuple(values))


def dimension(d: Any) -> Any:
    """A dimension as the file has it: an int, a name, or None."""
    return d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None


def inner_names(proto: onnx.NodeProto) -> set[str]:
    """All names that graphs inside of a node read."""
    found: set[str] = set()
    for attribute in proto.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for node in graph.node:
                found |= set(node.input) | inner_names(node)
            found |= {o.name for o in graph.output}
    return found
