"""NNCF's post-training int8 of one ONNX graph, in an environment of its own; bench/fields/run.py starts it.

    python3.11 -m venv PEER && PEER/bin/pip install openvino==2026.4.1 nncf==3.4.0 onnx==1.23.2 onnxruntime==1.31.1
    PEER/bin/python bench/peers/nncf_ptq.py GRAPH.onnx FEEDS.npz OUT.onnx

FEEDS.npz holds arrays named "NUMBER/INPUT". Defaults of nncf.quantize; a graph with Softmax is a transformer.
"""

import os
import sys
from collections import defaultdict

os.environ["CI"] = "true"  # openvino-telemetry sends nothing where this is set


def main(graph: str, feeds: str, out: str) -> None:
    """Quantize and write."""
    import nncf
    import numpy as np
    import onnx

    given: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(feeds) as arrays:
        for key in arrays.files:
            number, name = key.split("/", 1)
            given[int(number)][name] = arrays[key]
    model = onnx.load(graph)
    transformer = any(node.op_type == "Softmax" for node in model.graph.node)
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    dataset = nncf.Dataset([given[i] for i in sorted(given)])
    onnx.save(nncf.quantize(model, dataset, model_type=kind, subset_size=len(given)), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
