"""Pruning on ONNX graphs: zeros where the plan says, everything else as it was; then quantized, proven and exported."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import wherry
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput


class Net(torch.nn.Module):
    """Residual, depthwise, transposed, concatenated and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.deep = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = torch.nn.Conv2d(16, 16, 1)
        self.up = torch.nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = torch.nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.cat([torch.relu(self.deep(x)) + x, x], 1)
        x = torch.relu(self.point(torch.nn.functional.max_pool2d(x, 2)))
        return self.head(self.up(x).mean((2, 3)))


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph") / "net"
    wherry.capture(Net(), folder, torch.from_numpy(images(2, 0)))
    np.savez(folder.parent / "data.npz", image=images(32, 1))
    return folder


def compress(graph: Path, out: Path, recipe: str, **options: Any) -> Any:
    data = graph.parent / "data.npz"
    return wherry.compress(graph, out, recipe, data_file=data, evaluation=data, **options)


def weights(file: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}


def test_a_pruned_graph_is_a_plain_graph(graph: Path, tmp_path: Path) -> None:
    report = compress(graph, tmp_path / "out", "magnitude:sparsity=0.5")
    assert report.get("verdict").value == "PASS", report.get("verdict").note
    found, original = weights(tmp_path / "out" / "model.onnx"), Checkpoint.open(graph)
    assert not any(node.op_type == "DequantizeLinear" for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
    for name, layer in original.graph.layers.items():
        a, b = original.graph.read(name).numpy(), layer.matrix(found[name])
        assert (b == 0).sum() == a.size // 2, name
        assert np.array_equal(np.where(b == 0, a, b), a)
    x = images(4, 5)
    y = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")).run(None, {"image": x})[0]
    assert np.isfinite(y).all()


def test_width_of_a_graph_that_takes_arrays(graph: Path, tmp_path: Path) -> None:
    """Nothing is known of its inputs but what the graph declares."""
    compress(graph, tmp_path / "out", "width:channels=4,multiple=1")
    found, original = weights(tmp_path / "out" / "model.onnx"), weights(graph / "model.onnx")
    assert sum(w.size for w in found.values()) < 0.5 * sum(w.size for w in original.values())
    x = images(4, 5)
    y = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")).run(None, {"image": x})[0]
    assert y.shape == (4, 5)
    assert np.isfinite(y).all()


def test_pruned_then_quantized(graph: Path, tmp_path: Path) -> None:
    recipe = "magnitude:sparsity=0.5 | rtn:scheme=W8A16,group_size=-1"
    report = compress(graph, tmp_path / "out", recipe, formats=("openvino",))
    assert report.get("verdict").value == "PASS", report.get("verdict").note
    made = Checkpoint.open(tmp_path / "out")
    for row in made.plan:
        if row["role"] in ("convolution", "linear"):
            assert row["sparsity"] == 0.5
            share = float((made.weight(row["name"]) == 0).float().mean())
            assert share >= 0.5


def test_bad_input_on_graphs(graph: Path, tmp_path: Path) -> None:
    for recipe, wanted in (
        ("magnitude:pattern=2:4", "does not divide its 27 inputs"),
        ("magnitude:threshold=99", "leaves nothing of"),
        ("magnitude:sparsity=0.5 | rtn:scheme=W8A16,group_size=-1 | magnitude", "works on float weights"),
    ):
        with pytest.raises(BadInput, match=wanted):
            compress(graph, tmp_path / "out", recipe)
        assert not list(tmp_path.iterdir())


def test_openvino_is_told_of_zeros(graph: Path, tmp_path: Path) -> None:
    from wherry import shelf
    from wherry.artifact import Artifact

    recipe = "magnitude:sparsity=0.8 | rtn:scheme=W8A8_STATIC"
    compress(graph, tmp_path / "out", recipe, formats=("openvino",))
    load = shelf.find("runtimes", "openvino").load
    sparse = load(Artifact.open(tmp_path / "out" / "openvino"))
    assert "70% zeros" in sparse.facts["sparse weights"]
    manifest = Artifact.open(tmp_path / "out" / "openvino").manifest
    dense = load(Artifact(tmp_path / "out" / "openvino", manifest | {"plan": []}))
    assert "sparse weights" not in dense.facts
    x = images(3, 9)
    a, b = (next(iter(session.predict({"image": x}).values())) for session in (sparse, dense))
    assert np.allclose(a, b, atol=1e-5)
