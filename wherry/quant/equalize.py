"""Equalize: cross-layer equalization, channels of neighbouring convolutions brought to like ranges before rounding.

Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv:1906.04721,
    section 4.1, equations 7 to 11.
Idea:   f(s x) = s f(x) for ReLU, LeakyReLU, pools and no activation at all. So W1 / s, b1 / s and W2 s compute the
        same, and s = sqrt(r1 / r2), with r the ranges of each channel in both weights, makes both ranges sqrt(r1 r2).
Shapes: W1 [c, ...] of a Conv, s [c], W2 [o, c, ...] or, depthwise, [c, 1, ...].
Cost:   a few sweeps over the weights; no data.
Fails:  never; pairs with a Clip (ReLU6), a branch or another operator between them are left as they are.
Differs: it pays where weights have one scale per tensor or activations differ much between channels; with a scale per
        output channel, as here, less than in the paper.
"""

from dataclasses import dataclass
from dataclasses import replace as copy

import numpy as np
import onnx_ir as ir

from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.gait import Pass
from wherry.graph import tidy

HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")


@dataclass(frozen=True, kw_only=True)
class Equalize(Pass):
    """sweeps: at most so many passes over all pairs. A solver must come after it."""

    sweeps: int = 20

    def rewrite(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same graph with other weights. Raises Unsupported where there is no graph, BadInput where no pair is."""
        if checkpoint.graph is None:
            raise Unsupported(
                f"equalize works on ONNX graphs, and {checkpoint.name} is none; take smoothquant or awq there"
            )
        graph = checkpoint.graph.copy()
        found = pairs(graph.model.graph)
        if not found:
            raise BadInput(
                f"equalize finds no two convolutions of {checkpoint.name} with only a ReLU or pool between them"
            )
        for _ in range(self.sweeps):
            if max(equalize(graph.model.graph, *pair) for pair in found) < 1e-3:
                break
        graph.find()
        return copy(checkpoint, graph=graph, source=graph)


def pairs(graph: ir.Graph) -> list[tuple[ir.Node, ir.Node]]:
    """Neighbouring convolutions that can share scales, in order."""
    found = []
    for first in graph:
        if first.op_type != "Conv" or not own(first):
            continue
        node = first
        while True:
            uses = list(node.outputs[0].uses())
            if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0].idx != 0:
                break
            node = uses[0].node
            if node.op_type == "Conv":
                channels = tidy.constant(first.inputs[1]).shape[0]  # type: ignore[union-attr]
                if own(node) and int(tidy.attribute(node, "group", 1)) in (1, channels):
                    found.append((first, node))
                break
            if node.op_type not in HOMOGENEOUS:
                break
    return found


def own(node: ir.Node) -> bool:
    """Whether weight and bias are constants that this node alone reads."""
    values = [value for value in node.inputs[1:] if value is not None]
    return all(tidy.constant(value) is not None and len(list(value.uses())) == 1 for value in values)


def equalize(graph: ir.Graph, first: ir.Node, second: ir.Node) -> float:
    """Scale one pair. Returns how far the scales were from 1, as the largest |log|."""
    w1, w2 = tidy.constant(first.inputs[1]), tidy.constant(second.inputs[1])
    assert w1 is not None and w2 is not None  # noqa: PT018
    deep = int(tidy.attribute(second, "group", 1)) > 1
    r1 = np.abs(w1).reshape(len(w1), -1).max(1)
    r2 = np.abs(w2).reshape(len(w2), -1).max(1) if deep else np.abs(w2).max((0, *range(2, w2.ndim)))
    both = (r1 > 0) & (r2 > 0)
    s = np.where(both, np.sqrt(np.where(both, r1, 1.0) / np.where(both, r2, 1.0)), 1.0)
    put(graph, first, 1, w1 / s.reshape(-1, *[1] * (w1.ndim - 1)))
    bias = tidy.constant(first.inputs[2]) if len(first.inputs) > 2 else None
    if bias is not None:
        put(graph, first, 2, bias / s)
    axis = 0 if deep else 1
    put(graph, second, 1, w2 * s.reshape([-1 if i == axis else 1 for i in range(w2.ndim)]))
    return float(np.abs(np.log(s)).max())


def put(graph: ir.Graph, node: ir.Node, i: int, array: np.ndarray) -> None:
    """Another constant under the same name."""
    value = node.inputs[i]
    assert value is not None
    name = str(value.name)
    node.replace_input_with(i, None)
    tidy.forget(graph, value)
    node.replace_input_with(i, tidy.initializer(graph, name, array.astype(np.float32)))
