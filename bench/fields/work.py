"""How many multiplications a graph does for one input: those of Conv, Gemm and MatMul, from the shapes of one run.

Two operations each, they say what share of a machine's int8 peak a latency is. Embeddings, norms, softmax are left out;
so are LSTM's and GRU's. Cost: one run with the edges before and after each product as outputs.
"""

from pathlib import Path

import numpy as np
from field import Feeds

PRODUCTS = ("Conv", "Gemm", "MatMul")


def multiplications(file: Path, feeds: Feeds) -> int:
    """Of a float graph and its inputs."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    nodes = [node for node in model.graph.node if node.op_type in PRODUCTS]
    stored = {t.name: list(t.dims) for t in model.graph.initializer}
    given = {i.name for i in model.graph.input}
    wanted = {name for node in nodes for name in (*node.input[:2], node.output[0])} - set(stored) - given
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - have))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    shapes = stored | {name: list(value.shape) for name, value in zip(names, values, strict=True)}
    shapes |= {name: list(value.shape) for name, value in feeds.items()}
    total = 0
    for node in nodes:
        left, right, out = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        if node.op_type == "Conv":
            each = np.prod(right[1:])
        elif node.op_type == "Gemm":
            each = left[0 if any(a.name == "transA" and a.i for a in node.attribute) else 1]
        else:
            each = left[-1]
        total += int(np.prod(out) * each)
    return total
