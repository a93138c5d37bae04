"""Recipes in stages: prune, remake, quantize; each ends as a model, is done once, and the plan shows all of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wherry import api, deliver, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.evaluate import proof
from wherry.gait import Pass
from wherry.recipe import Recipe

G = "scheme=W4A16_ASYM,group_size=32"
UP = "model.layers.1.mlp.up_proj.weight"
CALLS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    """A step that writes another model: every norm's weight is halved."""

    factor: float = 0.5

    def remake(self, checkpoint: Checkpoint, out: Path, batches: Any, progress: Any) -> None:
        from wherry.formats import safetensors

        CALLS.append(f"{checkpoint.original.name if checkpoint.original else '-'}")
        tensors = {n: checkpoint.tensor(n) * (self.factor if "norm" in n else 1) for n in checkpoint.names()}
        safetensors.write(out, checkpoint.config, tensors)


@pytest.fixture
def halve(monkeypatch: pytest.MonkeyPatch) -> None:
    """`halve` on the shelf prune, as a stranger's package would put it there."""
    point = SimpleNamespace(name="halve", value="x", load=lambda: SimpleNamespace(Halve=Halve))
    real = shelf.entry_points

    def points(group: str, name: str | None = None) -> Any:
        return [point] if group == "wherry.prune" and name in (None, "halve") else real(group=group)

    monkeypatch.setattr(shelf, "entry_points", points)
    CALLS.clear()


def batches(count: int = 2) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(0, 512, (4, 48))} for _ in range(count)]


def compress(folder: Path, recipe: str, out: Path, given: Any = None) -> Checkpoint:
    plan = Recipe.parse(recipe).plan(Checkpoint.open(folder))
    deliver.deliver(plan, out, (), batches() if given is None else given, {}, lambda result: None, api.quiet)
    return Checkpoint.open(out)


def problems(out: Path, original: Path) -> dict[str, str]:
    artifact, source = Artifact.open(out), Checkpoint.open(original)
    decoded = shelf.find("formats", artifact.format).decode(artifact)
    report = proof.structure(artifact, decoded, lambda name: source.weight(name).numpy(), allowed=source.names())
    return {row.what: row.note for row in report if row.what.startswith("check: ") and row.value is False}


def test_stages_are_cut_where_a_model_ends() -> None:
    recipe = Recipe.parse(f"magnitude | magnitude:sparsity=0.7 | awq:{G} | gptq:{G}")
    assert [len(stage.steps) for stage in recipe.stages] == [1, 1, 2]
    assert Recipe.parse(str(recipe)) == recipe
    with pytest.raises(BadInput, match="magnitude stands after gptq"):
        _ = Recipe.parse(f"gptq:{G} | magnitude").stages


def test_a_step_is_found_on_any_shelf(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"no 'magnitud' in quant, prune, distill \(did you mean 'magnitude'\?\)"):
        Recipe.parse("magnitud")
    with pytest.raises(BadInput, match="magnitude has no knob 'scheme'"):
        Recipe.parse("magnitude:scheme=W4A16")
    recipe = Recipe.parse(f"magnitude:sparsity=0.25,block=4x1 | gptq:{G}")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_a_pruned_model_is_a_plain_folder(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = compress(tiny_llama, "magnitude:sparsity=0.5", tmp_path / "out")
    original = Checkpoint.open(tiny_llama)
    assert "quantization_config" not in made.config
    assert sorted(made.names()) == sorted(original.names())
    for name in original.names():
        a, b = original.tensor(name), made.tensor(name)
        assert a.dtype == b.dtype
        linear = a.ndim == 2 and "embed" not in name
        zeros = int((b == 0).sum())
        assert zeros == (a.numel() // 2 if linear else 0), name
        assert torch.equal(torch.where(b == 0, a, b), a)  # what stays is what it was
        assert not linear or a[b == 0].abs().max() <= a[b != 0].abs().min()
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids).logits, made.module()(input_ids=ids).logits)
    assert Artifact.open(tmp_path / "out").format == "safetensors"
    assert problems(tmp_path / "out", tiny_llama) == {}


def test_prune_remake_quantize(halve: None, tiny_llama: Path, tmp_path: Path) -> None:
    plan = Recipe.parse(f"magnitude:sparsity=0.5 | halve | gptq:{G}").plan(Checkpoint.open(tiny_llama))
    row = plan.row(UP)
    assert row.sparsity == 0.5
    assert row.notes[:2] == ("50% zeros by step 1 (magnitude)", "remade by step 2 (halve)")
    assert str(row.scheme) == "W4A16_ASYM,group_size=32"
    made = compress(tiny_llama, f"magnitude:sparsity=0.5 | halve | gptq:{G}", tmp_path / "out")
    assert CALLS == ["tiny-llama"]
    norm = "model.norm.weight"
    original = Checkpoint.open(tiny_llama)
    assert torch.equal(made.weight(norm), 0.5 * original.weight(norm))
    pruned = compress(tiny_llama, "magnitude:sparsity=0.5", tmp_path / "pruned")
    assert bool((made.weight(UP)[pruned.weight(UP) == 0] == 0).all())  # zeros stay zero
    fact = next(row for row in made.plan if row["name"] == UP)
    assert fact["sparsity"] >= 0.5
    assert fact["remade"] == "halve"
    assert fact["step"] == 2
    assert problems(tmp_path / "out", tiny_llama) == {}
    assert not list(tmp_path.glob(".*"))


def test_a_finished_stage_is_not_done_again(
    halve: None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wherry.engine import stage, walk

    recipe = f"magnitude:sparsity=0.5 | halve | gptq:{G}"
    whole = compress(tiny_llama, recipe, tmp_path / "whole")
    real, seen = walk.settle, []

    def dies(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:  # the second block
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(walk, "settle", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, recipe, tmp_path / "killed")
    folder = next(tmp_path.glob(".killed.partial-*"))
    assert sorted(path.name for path in folder.glob("stage-*")) == ["stage-1"]  # the first went when this was done
    assert CALLS == ["tiny-llama"] * 2
    run, ran = stage.run, []
    monkeypatch.setattr(stage, "run", lambda plan, *rest: (ran.append(str(plan.recipe)), run(plan, *rest))[1])
    again = compress(tiny_llama, recipe, tmp_path / "killed")
    assert len(ran) == 1  # the last stage alone
    assert len(seen) == 3  # and of it the second block alone
    assert CALLS == ["tiny-llama"] * 2
    assert json.dumps(again.plan) == json.dumps(whole.plan)


def test_proof_sees_lost_zeros_and_other_weights(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, f"magnitude:sparsity=0.5 | gptq:{G}", tmp_path / "out")
    artifact, source = Artifact.open(tmp_path / "out"), Checkpoint.open(tiny_llama)
    decoded = list(shelf.find("formats", "compressed_tensors").decode(artifact))

    def failed(tensors: Any) -> set[str]:
        weight = lambda name: source.weight(name).numpy()  # noqa: E731
        report = proof.structure(artifact, iter(tensors), weight, exact=False)
        return {row.what for row in report if row.value is False}

    assert failed(decoded) == set()
    filled = [(n, np.where(w == 0, w.max() / 9, w) if n == UP else w) for n, w in decoded]
    assert "check: zeros kept" in failed(filled)
    swapped = [(n, w[::-1].copy() if n == UP else w) for n, w in decoded]
    assert "check: weights of the original" in failed(swapped)


def test_errors_come_before_work(tiny_llama: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_llama)
    for recipe, wanted in (
        ("magnitude:sparsity=1", "leaves nothing"),
        ("magnitude:sparsity=0", "takes nothing"),
        ("magnitude:sparsity=x", "is not a number"),
        ("magnitude:sparsity=nan", "takes nothing"),
        ("wanda:sparsity=0.001", "changes nothing"),  # less than one weight of a row
        ("magnitude:threshold=1e9", "leaves nothing of"),
        ("magnitude:threshold=1e-30", "takes nothing"),
        ("magnitude:pattern=4:2", "not N:M"),
        ("magnitude:pattern=2:3", "does not divide its 128 inputs"),
        ("magnitude:block=3x1", "does not divide its 64 outputs"),
        ("magnitude:pattern=2:4,block=4x1", "exclude each other"),
        ("magnitude:targets=nothing", "matches no layer"),
        ("magnitude | rotation | gptq", "fills the zeros"),
        (f"magnitude | gptq:{G},targets=nope", "matches no layer"),
    ):
        with pytest.raises(BadInput, match=wanted):
            Recipe.parse(recipe).plan(original)
    compress(tiny_llama, f"gptq:{G}", tmp_path / "coded")
    with pytest.raises(BadInput, match="takes the float model"):
        Recipe.parse("magnitude").plan(Checkpoint.open(tmp_path / "coded"))
