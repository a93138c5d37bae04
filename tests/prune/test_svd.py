"""Low rank: against the closed form, and on a graph whose weights have a low rank or none."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import wherry
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.ops.solve import Hessian
from wherry.prune.svd import factors
from wherry.recipe import Recipe


def test_no_rank_r_matrix_is_nearer() -> None:
    """Eckart-Young in the inputs' metric: the error is the tail of the spectrum; ALS finds no better."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(12, 16, generator=g), torch.randn(400, 16, generator=g) @ torch.randn(16, 16, generator=g)
    H = (x.T @ x / 400).double()
    H += 0.01 * H.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    A, B, error, _ = factors(w, Hessian(x.T @ x, 400), 4, 0.01)
    gap = w.double() - B.double() @ A.double()
    assert float(((gap @ H) * gap).sum()) == pytest.approx(error, rel=1e-4)
    for seed in range(3):
        b = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)).double()
        for _ in range(200):
            a = torch.linalg.lstsq(b, w.double()).solution
            b = torch.linalg.solve(a @ H @ a.T, a @ H @ w.double().T).T
        rest = w.double() - b @ a
        assert float(((rest @ H) * rest).sum()) > error * (1 - 1e-3)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    linear = torch.nn.Linear
    net = torch.nn.Sequential(linear(48, 64), torch.nn.ReLU(), linear(64, 40), linear(40, 40))
    with torch.no_grad():  # the first has rank 6, the last is an exact diagonal: full rank, and nothing but zeros
        net[0].weight.copy_(torch.randn(64, 6) @ torch.randn(6, 48))
        net[3].weight.copy_(torch.diag(torch.rand(40) + 0.5))
    top = tmp_path_factory.mktemp("svd")
    wherry.capture(net, top / "net", torch.randn(2, 48))
    x = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    np.savez(top / "data.npz", input=x)
    return top / "net"


def run(folder: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_it_is_chosen_where_it_beats_pruning(graph: Path, tmp_path: Path) -> None:
    data = graph.parent / "data.npz"
    report = wherry.compress(graph, tmp_path / "out", "svd:keep=0.5", data_file=data, evaluation=data)
    assert report.get("verdict").value == "PASS", report.get("verdict").note
    made, dense = Checkpoint.open(tmp_path / "out"), Checkpoint.open(graph)
    shapes = {made.shape(name) for name in made.names() if len(made.shape(name)) == 2}
    assert (13, 48) in shapes  # 0.5 * 48 * 64 / 112
    assert (40, 40) in shapes  # the diagonal stays whole
    assert made.params < dense.params
    x = np.load(data)["input"]
    assert np.abs(run(tmp_path / "out", x) - run(graph, x)).max() < 0.2 * np.abs(run(graph, x)).max()


def test_factors_are_quantized_like_layers(graph: Path, tmp_path: Path) -> None:
    data = graph.parent / "data.npz"
    recipe = "svd:keep=0.4,always=true | rtn:scheme=W8A16,group_size=-1"
    report = wherry.compress(graph, tmp_path / "out", recipe, data_file=data, evaluation=data)
    assert not [row.what for row in report if row.value is False and "near" not in row.what]
    assert sum(bool(row["scheme"]) for row in Checkpoint.open(tmp_path / "out").plan) == 6


def test_what_cannot_be_is_refused(graph: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no place for two factors"):
        Recipe.parse("svd").plan(Checkpoint.open(tiny_llama))
    with pytest.raises(BadInput, match="not a share"):
        Recipe.parse("svd:keep=1")
    with pytest.raises(BadInput, match="no float linear layer"):
        Recipe.parse("svd:keep=0.001").plan(Checkpoint.open(graph))
    data = graph.parent / "data.npz"
    with pytest.raises(BadInput, match="beats pruning in none"):
        wherry.compress(graph, tmp_path / "out", "svd:targets=3", data_file=data)
    assert not list(tmp_path.iterdir())
