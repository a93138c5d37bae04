"""200 seeded random graphs against ONNX Runtime, each at two batches, with a named batch and with a frozen one."""

import numpy as np
import onnxruntime
import pytest
import torch

from tests.formats.torch_module.random_graphs import Graph
from wherry.formats.onnx.torch_module import module

# 100 seeds, each twice: the batch named, the batch frozen
SEEDS = [*range(25), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(25, 100))]
TOLERANCE = 2e-5  # of the largest output


def run(proto: object, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    # not optimized: ONNX Runtime 1.31 fuses a Pad of zeros into MaxPool, whose margin is minus infinity
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0]  # type: ignore[attr-defined]


def gap(net: torch.nn.Module, x: np.ndarray, wanted: np.ndarray) -> float:
    with torch.no_grad():
        got = net(torch.from_numpy(x)).numpy()
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-3))


@pytest.mark.parametrize("seed", SEEDS)
def test_named_batch(seed: int) -> None:
    proto = Graph(seed, "batch").model()
    net = module(proto)
    random = np.random.default_rng(seed)
    for batch in (1, 3):
        x = random.standard_normal((batch, 8, 12, 12)).astype(np.float32)
        assert gap(net, x, run(proto, x)) < TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_frozen_batch_is_free_again(seed: int) -> None:
    first = 1 + seed % 3
    net = module(Graph(seed, first).model())
    assert net.meta["batch"].startswith("free"), net.meta["batch"]
    random = np.random.default_rng(seed)
    for batch in (first, 5):
        x = random.standard_normal((batch, 8, 12, 12)).astype(np.float32)
        assert gap(net, x, run(Graph(seed, batch).model(), x)) < TOLERANCE
