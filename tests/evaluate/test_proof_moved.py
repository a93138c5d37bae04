"""Sabotage of what calibrated methods made: weights that took scales, were turned, or learned are still compared."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_llama
from tests.evaluate.test_proof import edit, failed, reseal
from wherry import api
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.evaluate import weights
from wherry.prove import item, prove
from wherry.scheme import Scheme

RECIPES = [
    "awq | gptq:scheme=W4A16_ASYM,group_size=32",
    "rounding:scheme=W4A16_ASYM,group_size=32,iters=8",
    "best:scheme=W3A16_ASYM,group_size=32,iters=20",
    "smoothquant | gptq:scheme=W4A16,group_size=32",
    "rotation | gptq:scheme=W4A16,group_size=32",
    *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in (
        "awq | gptq:scheme=W2A16,group_size=32",
        "smoothquant | gptq:scheme=W8A8",
        "rotation | awq | gptq:scheme=W4A16,group_size=32",
        "awq | gptq:scheme=W4A16,group_size=32 | tune",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("original") / "llama", hidden=128)


@pytest.fixture(scope="module", params=RECIPES, ids=lambda text: text.partition(":")[0])
def made(request, original, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    api.compress(original, out, request.param, samples=8, length=64)
    return out


def check(folder: Path, original: Path):
    return prove([item(Artifact.open(folder), folder)], Checkpoint.open(original), behave=False, speed=False)


def sabotage(t):
    """Two tensors scaled, two of one shape swapped, one scale zero."""
    t["model.layers.1.self_attn.q_proj.weight_scale"] *= 1.02
    t["model.layers.0.mlp.down_proj.weight_scale"] *= 0.98
    t["model.layers.0.self_attn.o_proj.weight_scale"][5, 0] = 0
    for part in ("weight", "weight_packed", "weight_scale", "weight_zero_point"):
        a, b = (f"model.layers.{i}.mlp.gate_proj.{part}" for i in (0, 1))
        if a in t:
            t[a], t[b] = t[b].clone(), t[a].clone()


def test_an_honest_artifact_passes_and_a_sabotaged_one_fails(made, original, tmp_path):
    assert failed(check(made, original)) == set()
    victim = Path(shutil.copytree(made, tmp_path / "victim"))
    edit(victim, sabotage)
    reseal(victim, original)
    report = check(victim, original)
    assert "decodes to the plan's weights" not in failed(report)  # the forger made the digests right
    assert report.get("verdict").value == "FAIL"
    for where, what in (
        ("layers.1.self_attn.q_proj", "scales as they were rounded"),
        ("layers.0.mlp.down_proj", "scales as they were rounded"),
        ("layers.0.self_attn.o_proj", "no zero scale"),
        ("layers.0.mlp.gate_proj", "weights of the original"),
        ("layers.1.mlp.gate_proj", "weights of the original"),
    ):
        assert where in report.get(f"check: {what}").note


def test_scales_of_columns_and_rows_are_undone_and_a_stranger_is_not():
    random = np.random.default_rng(0)
    w, other = random.standard_normal((2, 96, 128)).astype(np.float32)
    t, s = np.exp(random.standard_normal((96, 1))), np.exp(random.standard_normal(128))
    moved = (w * t * s).astype(np.float32)
    assert np.linalg.norm(weights.undone(w, moved) - moved) < 2e-3 * np.linalg.norm(moved)
    v, _ = weights.rounded(moved, Scheme.parse("W4A16,group_size=32"), 32)
    assert weights.compare(weights.undone(w, v), v, Scheme.parse("W4A16,group_size=32")).problem == ""
    assert "error" in weights.compare(weights.undone(other, v), v, Scheme.parse("W4A16,group_size=32")).problem
    assert "error" in weights.compare(weights.undone(-w, v), v, Scheme.parse("W4A16,group_size=32")).problem


def test_a_norm_may_be_divided_or_tuned_but_not_lost():
    w = np.linspace(0.5, 2, 64, dtype=np.float32)
    assert weights.strayed(w, w / np.linspace(0.01, 9, 64, dtype=np.float32), False) == ""
    assert weights.strayed(w - 1, w / 3 - 1, False) == ""  # Gemma's 1 + w
    assert "sign" in weights.strayed(w, -w, False)
    assert "sign" in weights.strayed(w, np.where(np.arange(64) < 32, w, 0), False)
    assert weights.strayed(w, w * 1.05, True) == ""
    assert "tuning" in weights.strayed(w, w * 2, True)
