"""Bias correction: take the mean of what rounding the weights adds to a layer's output from its bias.

    b' = b - (Wq - W) E[x]

Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv:1906.04721,
    section 4.2; here with the measured mean of each input channel.
Shapes: W [n, k], of a Conv k = channels * kernel; E[x] [channels]. Padding is not counted.
Cost:   a product of each weight with a vector.
"""

import numpy as np
import onnx_ir as ir
import torch

from wherry.engine.graph import observe
from wherry.graph import tidy
from wherry.graph.source import Graph
from wherry.scheme import QTensor


def correct(source: Graph, static: set[ir.Node], results: dict[str, QTensor], seen: observe.Seen) -> None:
    """Correct the biases of all layers with static ranges, in place; `seen` holds the mean of each input channel."""
    for name, q in results.items():
        layer = source.layers[name]
        node = layer.node
        assert node.inputs[0] is not None
        edge = str(node.inputs[0].name)
        if node not in static or node.op_type == "MatMul" or edge not in seen.sums or len(list(layer.value.uses())) > 1:
            continue
        w = source.read(name)
        assert isinstance(w, torch.Tensor)
        mean = seen.sums[edge] / seen.tokens[edge]
        delta = (q.decode() - w.float()).numpy().astype(np.float64)
        n = len(delta)
        if node.op_type == "Conv":
            groups = int(tidy.attribute(node, "group", 1))
            per = len(mean) // groups
            delta = delta.reshape(n, per, -1).sum(-1)
            shift = (delta * mean.reshape(groups, 1, per).repeat(n // groups, 1).reshape(n, per)).sum(1)
        else:
            shift = delta @ mean
        old = node.inputs[2] if len(node.inputs) > 2 else None
        array = tidy.constant(old)
        if old is not None and array is None:
            continue
        base = np.zeros(n) if array is None else array.reshape(-1)
        bias_name = f"{name}.bias" if old is None else str(old.name)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, None)
        tidy.forget(source.model.graph, old)
        node.replace_input_with(2, tidy.initializer(source.model.graph, bias_name, (base - shift).astype(np.float32)))
