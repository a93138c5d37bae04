"""Low-rank correction: the closed form, exact products, the walk; then llama.cpp with its adapter and ONNX Runtime."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_llama
from wherry import api, data, deliver, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Missing, Unsupported
from wherry.formats.gguf import adapter
from wherry.ops import layout
from wherry.prove import prove_folder
from wherry.quant.lowrank import fixed
from wherry.recipe import Recipe, build
from wherry.scheme import Scheme

RECIPE = "gptq:scheme=W3A16,group_size=32 | lowrank:rank=8"


def inputs(tokens: int, k: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(tokens, k // 2, generator=g) @ torch.randn(k // 2, k, generator=g)


@pytest.mark.parametrize(("n", "k"), [(24, 64), (64, 32)])
def test_what_is_left_is_the_tail_of_the_spectrum(n: int, k: int) -> None:
    """Against numpy's SVD of E R^1/2: the least error that any matrix of that rank leaves (Eckart and Young)."""
    torch.manual_seed(0)
    w, x = torch.randn(n, k), inputs(300, k)
    q = build("rtn", {"scheme": "W2A16", "group_size": 32}).solve(w)
    errors = {}
    for metric in ("exact", "diagonal", "none"):
        step = build("lowrank", {"rank": 4, "metric": metric})
        done = step.correct(w, q, step.observe(None, x), [])
        errors[metric] = float(((done.decode() - w) @ x.T).norm())
        assert torch.equal(done.code, q.code)
        assert torch.linalg.matrix_rank(done.decode().double() - q.decode().double(), rtol=1e-6) == 4
    e, r = (w - q.decode()).double().numpy(), (x.T @ x).double().numpy()
    values, vectors = np.linalg.eigh(r)
    spectrum = np.linalg.svd(e @ (vectors * np.sqrt(values.clip(0))) @ vectors.T, compute_uv=False)
    least = float(np.sqrt((spectrum[4:] ** 2).sum()))
    assert errors["exact"] == pytest.approx(least, rel=1e-3)
    assert errors["exact"] < 0.98 * errors["diagonal"]
    assert errors["exact"] < 0.98 * errors["none"]


def test_products_are_exact_in_any_order() -> None:
    """What lets every format decode to the same bits: fp16 holds both sides, float64 their product."""
    torch.manual_seed(1)
    B, A = torch.randn(40, 12).double() * torch.logspace(-6, 0, 12), torch.randn(12, 96).double() * 1e-3
    left, right = fixed(B, A)
    assert torch.equal(left.half().float(), left)
    assert torch.equal(right.half().float(), right)
    want = left.double() @ right.double()
    for _ in range(5):
        order = torch.randperm(12)
        assert torch.equal(left[:, order].double() @ right[order].double(), want)
    torch.testing.assert_close(want, B @ A, rtol=0, atol=2e-3 * float((B @ A).abs().max()))


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "Q4_K", "NF4", "NVFP4A16", "MXFP4A16", "W2A16_BINARY", "FP8A16"])
def test_it_lies_beside_every_grid(scheme: str) -> None:
    torch.manual_seed(2)
    w, x = torch.randn(16, 256), inputs(300, 256)
    step = build("lowrank", {"rank": 4})
    plain = build("rtn", {"scheme": scheme}).solve(w)
    q = step.correct(w, plain, step.observe(None, x), [])
    back = layout.whole(layout.parts(q), q.scheme)
    assert torch.equal(back.decode(), q.decode())
    assert not torch.equal(back.decode(), plain.decode())
    assert Scheme.parse(str(q.scheme)) == q.scheme
    held = sum(t.numel() * t.element_size() for t in layout.parts(q).values())
    assert q.scheme.bytes((16, 256)) - plain.scheme.bytes((16, 256)) == 2 * 4 * (16 + 256)
    assert held <= q.scheme.bytes((16, 256), 4) + 32


def compress(model: Path, out: Path, recipe: str, formats: tuple[str, ...] = ()) -> list[str]:
    """Deliver without measuring; every check of the structure must hold. Returns the notes of the first block's up."""
    checkpoint = Checkpoint.open(model)
    plan = Recipe.parse(recipe).plan(checkpoint, formats)
    batches = deliver.calibration(checkpoint, data.read(data.shipped("calibration")), 8, 64, 0)
    deliver.deliver(plan, out, formats, batches, {}, lambda result: None, api.quiet)
    report = prove_folder(out, checkpoint, None, False, (0.5, 1.5), api.quiet)
    assert report.rows[-1].value == "PASS", [row for row in report.rows if row.value is False]
    manifest = json.loads((out / "wherry.json").read_text())
    return next(row["notes"] for row in manifest["plan"] if row["name"] == "model.layers.0.mlp.up_proj.weight")


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama at 3 bits with a correction of rank 8, as checkpoint, GGUF and ONNX."""
    out = tmp_path_factory.mktemp("lowrank") / "out"
    notes = compress(tiny_llama, out, RECIPE, ("gguf", "onnx"))
    assert any(note.startswith("rank 8 leaves 0.") for note in notes)
    return out


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


TOKENS = np.random.default_rng(0).integers(3, 512, 100).tolist()


def logits(artifact: Artifact, runtime: str, **options: Any) -> np.ndarray:
    session = shelf.find("runtimes", runtime).load(artifact, threads=1, **options)
    score = session.score(TOKENS)
    session.close()
    assert score.logits is not None
    return score.logits


def test_llama_cpp_adds_its_adapter(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Artifact.open(made / "gguf")
    torch_logits = logits(Artifact.open(made), "torch")
    kl = divergence(torch_logits, logits(folder, "llamacpp"))
    alone = tmp_path / "alone" / folder.main.name  # the same file that does not name its adapter
    alone.parent.mkdir()
    alone.write_bytes(folder.main.read_bytes().replace(adapter.KEY.encode(), b"wherry.nothing"))
    without = divergence(torch_logits, logits(Artifact.open(alone), "llamacpp"))
    print(f"KL to the corrected torch model: {kl:.1e} with the adapter, {without:.1e} without")
    assert kl < 3e-4
    assert without > 20 * kl


def test_llama_cpp_server_adds_it_too(made: Path) -> None:
    """By the wheel's own interface for adapters."""
    session = shelf.find("runtimes", "llamacpp").load(Artifact.open(made / "gguf"), threads=1, api="server")
    found = session.score(TOKENS[:12])
    session.close()
    want = shelf.find("runtimes", "torch").load(Artifact.open(made), threads=1).score(TOKENS[:12])
    np.testing.assert_allclose(found.logprob, want.logprob, atol=0.1)


def test_onnx_runtime_multiplies_two_plain_matrices(made: Path) -> None:
    import onnx

    artifact = Artifact.open(made / "onnx")
    assert divergence(logits(Artifact.open(made), "torch"), logits(artifact, "onnxruntime")) < 1e-6
    graph = onnx.load(artifact.main, load_external_data=False).graph
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    assert shapes["model.layers.0.mlp.up_proj.weight.right"] == [64, 8]
    assert shapes["model.layers.0.mlp.up_proj.weight.left"] == [8, 128]


def test_a_model_without_its_adapter_is_not_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = next((made / "gguf").glob("*0.gguf"))
    shutil.copy(file, tmp_path / "alone.gguf")
    with pytest.raises(Missing, match=r"its correction llama-Q4_0-lora\.gguf|copy both"):
        shelf.find("runtimes", "llamacpp").load(Artifact.open(tmp_path / "alone.gguf"))
    both = Checkpoint.open(file)  # read back: decoded with the correction
    want = Checkpoint.open(made)
    name = "model.layers.1.self_attn.q_proj.weight"  # rows permuted in GGUF
    assert torch.equal(both.weight(name), want.weight(name))


@pytest.mark.parametrize("recipe", [
    "rtn:scheme=W3A16,group_size=32 | lowrank:rank=4 | rounding:iters=4",
    "gptaq:scheme=W2A16_ASYM,group_size=32 | rounding:iters=4 | lowrank:rank=4,metric=diagonal",
    "awq | gptq:scheme=W3A16,group_size=32 | lowrank:rank=4,targets=up_proj;down_proj | tune:epochs=1",
    "mixed:schemes=W2A16;W4A16,bits=5 | hqq:scheme=W3A16,group_size=32 | lowrank:rank=4",
])  # fmt: skip
def test_it_composes(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    notes = compress(tiny_llama, tmp_path / "out", recipe)
    assert any(note.startswith("rank 4 leaves 0.") for note in notes)
    assert Checkpoint.open(tmp_path / "out").scheme("model.layers.0.mlp.up_proj.weight").rank == 4


def test_lost_zeros_are_said(tmp_path: Path) -> None:
    torch.manual_seed(3)
    w = torch.randn(16, 32)
    w[torch.rand_like(w) < 0.5] = 0
    notes: list[str] = []
    step = build("lowrank", {"rank": 4})
    q = build("rtn", {"scheme": "W2A16", "group_size": 32}).solve(w)
    step.correct(w, q, step.observe(None, inputs(200, 32)), notes)
    assert any("exact zeros are zeros of the codes alone" in note for note in notes)


@pytest.mark.parametrize(("recipe", "formats", "reason"), [
    ("gptq:scheme=W4A16,group_size=32 | lowrank:rank=64", (), "use rank="),
    ("rtn:scheme=W8A8 | lowrank", (), "use W8A16"),
    ("gptq:scheme=W4A16,group_size=32 | lowrank:rank=4 | lowrank:rank=4", (), "by two steps"),
    ("gptq:scheme=W4A16,group_size=32 | lowrank:rank=4", ("gptq",), "W4A16"),
    ("gptq:scheme=W4A16,group_size=32 | lowrank:rank=4", ("awq",), "W4A16"),
    ("gptq:scheme=W4A16,group_size=32 | lowrank:rank=4", ("compressed_tensors",), "W4A16,group_size=32 without"),
    ("lowrank:rank=4", (), "changes nothing"),
])  # fmt: skip
def test_what_it_cannot_is_said_before(recipe: str, formats: tuple, reason: str, tiny_llama: Path) -> None:
    with pytest.raises((BadInput, Unsupported), match=reason):
        Recipe.parse(recipe).plan(Checkpoint.open(tiny_llama), formats)


def test_more_rank_is_nearer(tmp_path: Path) -> None:
    folder, distance = write_llama(tmp_path / "llama", layers=1), []
    want = Checkpoint.open(folder).module()(torch.tensor([TOKENS])).logits[0].detach().numpy()
    for rank in (0, 4, 24):
        out = tmp_path / str(rank)
        compress(folder, out, "rtn:scheme=W2A16,group_size=32" + (f" | lowrank:rank={rank}" if rank else ""))
        found = Checkpoint.open(out).module()(torch.tensor([TOKENS])).logits[0].detach().numpy()
        distance.append(divergence(want, found))
    assert distance == sorted(distance, reverse=True)
    assert distance[2] < 0.5 * distance[0]
