"""KV cache schemes: torch as stock transformers, llama.cpp in blocks of 8 and 4 bits, others say that they cannot."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_llama
from wherry import api, deliver, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.ops.activation import cached
from wherry.prove import item, prove
from wherry.recipe import Recipe
from wherry.session import Sampling

TOKENS = np.random.default_rng(0).integers(3, 512, 120).tolist()
BITS = {8: ("int8", "q8_0"), 4: ("int4", "q4_0")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, as llama.cpp's blocks want."""
    return write_llama(tmp_path_factory.mktemp("wide") / "llama", hidden=128)


@pytest.fixture(scope="module", params=[8, 4])
def made(request: pytest.FixtureRequest, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    out = tmp_path_factory.mktemp("kv") / "out"
    plan = Recipe.parse(f"rtn:scheme=W8A16,group_size=32 | kvcache:bits={request.param}").plan(
        Checkpoint.open(wide), ("gguf", "onnx", "gptq")
    )
    assert any("ONNX Runtime does not read it" in note for note in plan.rows[0].notes)
    assert any("the gptq folder does not read it" in note for note in plan.rows[0].notes)
    assert any(BITS[request.param][1] in note for row in plan.rows for note in row.notes)
    deliver.deliver(plan, out, ("gguf", "onnx"), [], {}, lambda result: None, api.quiet)
    return request.param, out


def logits(runtime: str, folder: Path, **options: Any) -> np.ndarray:
    session = shelf.find("runtimes", runtime).load(Artifact.open(folder), threads=1, **options)
    found = session.score(TOKENS).logits
    session.close()
    assert found is not None
    return found


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_the_grid_is_one_scale_for_a_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 64)
    for bits in (8, 4):
        scale = 2 * x.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True) / (2**bits - 1)
        error = (cached(x, bits, 32) - x).unflatten(-1, (2, 32)).abs()
        inside = x.unflatten(-1, (2, 32)) < scale * (2 ** (bits - 1) - 1)  # the largest is cut by half a step
        assert (error <= scale * 0.5001)[inside].all()
        torch.testing.assert_close(cached(cached(x, bits, 32), bits, 32), cached(x, bits, 32), rtol=0.07, atol=0.2)


def test_torch_computes_what_transformers_does(made: tuple[int, Path]) -> None:
    """Stock transformers reads kv_cache_scheme by compressed-tensors; it knows nothing of our runtime."""
    from transformers import AutoModelForCausalLM

    bits, out = made
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype="float32")(torch.tensor([TOKENS])).logits[0, :-1]
    ours, plain = logits("torch", out), logits("torch", out, cache="float")
    assert np.abs(ours - plain).max() > 20 * np.abs(ours - theirs.numpy()).max()
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-3)


def test_writing_sees_the_same_cache_as_scoring(made: tuple[int, Path]) -> None:
    session = shelf.find("runtimes", "torch").load(Artifact.open(made[1]), threads=1)
    written = list(session.generate(TOKENS[:40], Sampling(max_tokens=6)))
    scored = session.score([*TOKENS[:40], *written]).logits
    assert scored is not None
    assert scored[39:].argmax(-1).tolist() == written


def test_llama_cpp_keeps_its_cache_so(made: tuple[int, Path]) -> None:
    """By the numbers and by the size of its state."""
    bits, out = made
    found = {}
    for cache in ("recorded", "float"):
        session = shelf.find("runtimes", "llamacpp").load(Artifact.open(out / "gguf"), threads=1, cache=cache)
        assert session.facts.get("kv cache") == (BITS[bits][1] if cache == "recorded" else None)
        score = session.score(TOKENS).logits
        size = session.lib.llama_state_get_size
        size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        found[cache] = (score, size(session.context))
        session.close()
    layers, heads, head = 2, 2, 32
    numbers = 2 * layers * heads * head * (len(TOKENS) - 1)
    saved = {8: 16 - 8.5, 4: 16 - 4.5}[bits] / 8 * numbers
    assert found["float"][1] - found["recorded"][1] == pytest.approx(saved, rel=0.02)
    kl = divergence(found["float"][0], found["recorded"][0])
    print(f"KL of llama.cpp's {BITS[bits][1]} cache: {kl:.2e}")
    assert {8: 1e-6, 4: 5e-4}[bits] < kl < {8: 3e-3, 4: 0.2}[bits]


def test_the_server_of_llama_cpp_takes_it_too(made: tuple[int, Path]) -> None:
    loaded = shelf.find("runtimes", "llamacpp").load
    session = loaded(Artifact.open(made[1] / "gguf"), threads=1, api="server")
    assert session.facts["kv cache"] == BITS[made[0]][1]
    found = session.score(TOKENS[:10]).logprob
    session.close()
    direct = loaded(Artifact.open(made[1] / "gguf"), threads=1, api="direct")
    np.testing.assert_allclose(found, direct.score(TOKENS[:10]).logprob, atol=0.15)
    direct.close()


def test_the_proof_measures_it_and_says_who_does_not_read_it(made: tuple[int, Path], wide: Path) -> None:
    bits, out = made
    items = [item(Artifact.open(folder), out) for folder in (out, out / "gguf", out / "onnx")]
    report = prove(items, Checkpoint.open(wide), speed=False)
    for where in ("checkpoint", "gguf"):
        row = report.get("kl of the kv cache", where)
        assert row is not None
        assert 0 < row.value < 0.2
    assert report.get("kl of the kv cache", "onnx") is None
    row = report.get("kv cache", "onnx")
    assert row is not None
    assert "onnxruntime does not read it" in row.note
    assert any("--cache-type-k" in line for line in api.commands(out))


@pytest.mark.parametrize(("recipe", "formats", "reason"), [
    ("rtn:scheme=W8A16,group_size=32 | kvcache:bits=3", (), "use 8 or 4"),
    ("rtn:scheme=W8A16,group_size=32 | kvcache", ("gguf",), "heads of 16"),
    ("kvcache", (), "changes nothing"),
])  # fmt: skip
def test_what_it_cannot_is_said_before(recipe: str, formats: tuple, reason: str, tiny_llama: Path) -> None:
    with pytest.raises((BadInput, Unsupported), match=reason):
        Recipe.parse(recipe).plan(Checkpoint.open(tiny_llama), formats)


def test_encoders_keep_no_cache(tiny_bert: Path) -> None:
    with pytest.raises(Unsupported, match="keeps no cache"):
        Recipe.parse("rtn:scheme=W8A16,group_size=32 | kvcache").plan(Checkpoint.open(tiny_bert))


def test_it_stands_after_pruning_where_a_dense_correction_may_not(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    Recipe.parse("magnitude | rtn:scheme=W8A16,group_size=32 | kvcache").plan(checkpoint)
    with pytest.raises(BadInput, match="fills the zeros"):
        Recipe.parse("magnitude | gptq:scheme=W8A16,group_size=32 | lowrank:rank=4").plan(checkpoint)
