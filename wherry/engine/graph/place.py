"""Place: which edges of a graph are rounded to 8 bits, so that what runs between them is integer arithmetic.

Idea:   a layer (Conv, Gemm, MatMul) of the plan wants its input rounded. A Conv is integer only if its output is too.
        What merely carries numbers (Add, Concat, pools, Reshape ...) stays integer when all that goes in is, and
        something integer reads what comes out: so residual streams of a CNN stay in 8 bits, and those of a
        transformer, whose norms are float, stay float.
        A ReLU or Clip behind a layer is part of its rounding: the edge behind it is rounded, not the one before.
        Edges that hold the same numbers (Reshape, MaxPool, Slice ...) share one scale, and cost nothing.
Source: the kernels of ONNX Runtime 1.31 and OpenVINO 2026 on CPUs; which pattern becomes which is measured on
        every export (int8 claimed must be int8 run).
Cost:   one pass over the nodes each way.
"""

from dataclasses import dataclass, field

import onnx_ir as ir

from wherry.graph import tidy

PRODUCTS = ("Conv", "Gemm", "MatMul")
MIXES = ("Add", "Mul", "Sub", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
SAME = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Gather",
    "DepthToSpace", "SpaceToDepth", "Identity", "Resize",
)  # fmt: skip
GATES = ("Relu", "Clip")


@dataclass
class Places:
    """What will be rounded.

    edges: value -> the value whose range it shares (itself, mostly). nodes: those that run on rounded inputs.
    folded: values between a node and its ReLU or Clip, which are not rounded. layers: nodes with an integer product.
    """

    edges: dict[ir.Value, ir.Value] = field(default_factory=dict)
    nodes: set[ir.Node] = field(default_factory=set)
    folded: set[ir.Value] = field(default_factory=set)
    layers: set[ir.Node] = field(default_factory=set)

    def names(self) -> list[str]:
        """Names of the edges whose ranges are needed."""
        return list(dict.fromkeys(str(value.name) for value in self.edges.values()))


def place(graph: ir.Graph, layers: set[ir.Node], attention: bool = False) -> Places:
    """Decide for one graph.

    Args:
        graph: plain and float (tidy.py).
        layers: nodes whose weight the plan stores in 8 bits with 8-bit static activations.
        attention: also round the inputs of products of two activations (queries by keys, weights by values).
    """
    wanted = set(layers)
    if attention:
        wanted |= {n for n in graph if n.op_type == "MatMul" and all(tidy.constant(v) is None for v in n.inputs)}
    able = carriers(graph, wanted)
    useful = reached(graph, wanted, able)
    places = Places(layers=wanted)
    for node in graph:
        if node in wanted or node in useful:
            places.nodes.add(node)
            for value in inputs_of(node):
                places.edges.setdefault(value, value)
            out = behind(node.outputs[0])
            if node.op_type == "Conv" or node in useful or read_by(out, wanted | useful):
                if out is not node.outputs[0]:
                    places.folded.add(node.outputs[0])
                places.edges.setdefault(out, out)
                if node.op_type in SAME and node.inputs[0] is not None:  # one range for all that hold the same numbers
                    source = places.edges.get(node.inputs[0], node.inputs[0])
                    places.edges.update(dict.fromkeys(node.outputs, source))
    return places


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Inputs of a node that are activations: not weights, shapes or bounds."""
    candidates = [node.inputs[0]] if node.op_type in ("Conv", "Gemm", *SAME) else list(node.inputs)
    return [v for v in candidates if v is not None and tidy.constant(v) is None]


def behind(value: ir.Value) -> ir.Value:
    """The value behind a ReLU or Clip that alone reads this one; else this one."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return value
    node = uses[0].node
    if node.op_type == "Relu" or node.op_type == "Clip" and all(tidy.constant(v) is not None for v in node.inputs[1:]):
        return node.outputs[0]
    return value


def read_by(value: ir.Value, nodes: set[ir.Node]) -> bool:
    """Whether one of these nodes reads the value."""
    return any(use.node in nodes for use in value.uses())


def carriers(graph: ir.Graph, layers: set[ir.Node]) -> set[ir.Node]:
    """Nodes that carry numbers and get only what is rounded: found forwards."""
    rounded: set[ir.Value] = {value for node in layers for value in inputs_of(node)}
    found: set[ir.Node] = set()
    for node in graph:
        if node in layers:
            if node.op_type == "Conv":
                rounded |= {node.outputs[0], behind(node.outputs[0])}
            continue
        if node.op_type not in MIXES + SAME + GATES or node.op_type == "Resize" and not nearest(node):
            continue
        sources = inputs_of(node)
        if sources and all(value in rounded for value in sources) and not odd(node):
            found.add(node)
            rounded |= set(node.outputs) | {behind(node.outputs[0])}
    return {node for node in found if node.op_type not in GATES or not hidden(node, layers | found)}


def hidden(node: ir.Node, nodes: set[ir.Node]) -> bool:
    """Whether a ReLU or Clip is part of the rounding of the node before it."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    return source is not None and source in nodes and behind(source.outputs[0]) is node.outputs[0]


def nearest(node: ir.Node) -> bool:
    """Whether a Resize only repeats numbers."""
    return tidy.attribute(node, "mode", "nearest") == "nearest"


def odd(node: ir.Node) -> bool:
    """Carriers that would need more than their numbers: constants that are no floats, a Pad with another value."""
    if node.op_type == "Pad":
        value = tidy.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0
        return tidy.attribute(node, "mode", "constant") != "constant" or value is None or bool(value != 0)
    if node.op_type in ("Add", "Mul", "Sub"):
        constants = [tidy.constant(v) for v in node.inputs if v is not None]
        return any(c is not None and (c.dtype.kind != "f" or c.size > 1) for c in constants)
    return False


def reached(graph: ir.Graph, layers: set[ir.Node], able: set[ir.Node]) -> set[ir.Node]:
    """Those of the carriers from which integers go on to a layer: found backwards."""
    useful: set[ir.Node] = set()
    for node in reversed(list(graph)):
        if node not in able:
            continue
        out = [behind(node.outputs[0]), *node.outputs]
        if any(read_by(value, layers | useful) for value in out):
            useful.add(node)
    return useful
