"""The gaits on whole models: smoothing keeps the function, learning lessens the distance, a killed run goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wherry import api, deliver
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.engine import walk
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Recipe

G = "scheme=W3A16_ASYM,group_size=32,embedding=keep"


def batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(0, 512, (4, 48))} for _ in range(count)]


def compress(folder: Path, recipe: str, out: Path) -> Checkpoint:
    plan = Recipe.parse(recipe).plan(Checkpoint.open(folder))
    deliver.deliver(plan, out, (), batches(), {}, lambda result: None, api.quiet)
    return Checkpoint.open(out)


def logits(checkpoint: Checkpoint, seed: int = 1) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 512, (4, 48)))
    with torch.no_grad():
        return checkpoint.module()(input_ids=ids).logits


def divergence(checkpoint: Checkpoint, original: Checkpoint) -> float:
    p, q = logits(original).log_softmax(-1), logits(checkpoint).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def write_gemma(folder: Path) -> Path:
    """A random Gemma 3: its norms compute 1 + w."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from tests.conftest import write_tokenizer

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) if "norm" in name else 3 * parameter)
    folder.mkdir()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_smoothing_keeps_the_function(family: str, tiny_llama: Path, tmp_path: Path) -> None:
    """With 8 bits there is no error to speak of: what is left is the fold into norms and layers before."""
    folder = tiny_llama if family == "llama" else write_gemma(tmp_path / "gemma")
    made = compress(folder, "awq:scheme=W8A16,group_size=32,embedding=keep", tmp_path / "out")
    moved = {row["name"] for row in made.plan if row.get("moved")}
    first = "input_layernorm" if family == "llama" else "pre_feedforward_layernorm"
    assert any(first in name for name in moved)
    assert any("up_proj" in name for name in moved)
    assert any("down_proj" in name for name in moved)
    name = f"model.layers.0.{first}.weight"
    original = Checkpoint.open(folder)
    assert not torch.equal(made.weight(name), original.weight(name))
    assert divergence(made, original) < 1e-3


@pytest.mark.parametrize("recipe", [f"gptaq:{G}", f"awq:{G} | gptq:{G}", f"gptq:{G} | rounding:iters=30,lr=0.003"])
def test_calibrated_recipes_beat_rounding(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_llama)
    plain = divergence(compress(tiny_llama, f"rtn:{G}", tmp_path / "rtn"), original)
    assert divergence(compress(tiny_llama, recipe, tmp_path / "ours"), original) < plain


def test_tuning_lessens_the_distance(tiny_llama: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_llama)
    before = divergence(compress(tiny_llama, f"gptq:{G}", tmp_path / "a"), original)
    made = compress(tiny_llama, f"gptq:{G} | tune:epochs=8,lr=0.003", tmp_path / "b")
    assert divergence(made, original) < before  # random tokens that it was not tuned on
    norms = [row for row in made.plan if row["role"] == "norm"]
    assert any(row.get("moved") == "tune" for row in norms)
    Artifact.open(tmp_path / "b").verify()


def test_a_killed_run_ends_with_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = f"awq:{G} | gptaq:{G} | rounding:iters=4 | tune:epochs=1"
    whole = compress(tiny_llama, recipe, tmp_path / "whole")
    real, calls = walk.settle, []

    def dies(*args: Any) -> Any:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(walk, "settle", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, recipe, tmp_path / "killed")
    monkeypatch.setattr(walk, "settle", real)
    again = compress(tiny_llama, recipe, tmp_path / "killed")
    assert [row["digest"] for row in again.plan] == [row["digest"] for row in whole.plan]
    assert json.dumps(again.plan) == json.dumps(whole.plan)


def test_steps_see_compressed_inputs(tiny_llama: Path, tmp_path: Path) -> None:
    """The second block's codes depend on how the first was compressed."""
    fine, rough = (
        compress(
            tiny_llama,
            f"rtn:scheme={scheme},group_size=32,embedding=keep,targets=re:.*layers.0.* | gptq:{G}",
            tmp_path / scheme,
        )
        for scheme in ("W8A16", "W2A16")
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(fine.weight(name), rough.weight(name))


def test_a_plan_says_who_does_what(tiny_llama: Path) -> None:
    plan = Recipe.parse(f"awq:{G} | gptq:{G} | rounding | tune").plan(Checkpoint.open(tiny_llama))
    row = plan.row("model.layers.0.mlp.up_proj.weight")
    assert row.step == 1
    assert row.notes == ("smoothed by step 1 (awq)", "codes learned by step 3 (rounding)", "tuned by step 4 (tune)")
    assert Recipe.parse(str(plan.recipe)) == plan.recipe
    assert Recipe.parse(f"awq:{G}").plan(Checkpoint.open(tiny_llama)).row(row.name).step == 0
    with pytest.raises(BadInput, match="changes nothing"):
        Recipe.parse("tune").plan(Checkpoint.open(tiny_llama))


def test_sums_of_planes_are_not_learned(tiny_llama: Path) -> None:
    """Said before any work, with what to do; learning that leaves those tensors alone is fine."""
    checkpoint, scheme = Checkpoint.open(tiny_llama), "scheme=W3A16_BINARY,group_size=32,embedding=keep"
    for recipe, method in ((f"rtn:{scheme} | tune", "tune"), (f"gptq:{scheme} | rounding", "rounding")):
        with pytest.raises(Unsupported, match=f"take W3A16, or leave {method} out"):
            Recipe.parse(recipe).plan(checkpoint)
    Recipe.parse(f"rtn:{scheme} | tune:targets=re:.*embed_tokens").plan(checkpoint)


@pytest.mark.parametrize(
    "recipe",
    [
        f"awq:{G} | gptq:{G}",
        f"rounding:{G},iters=20 | tune:epochs=2",
        "rounding:scheme=W2A16_ASYM,group_size=32,iters=20 | tune:epochs=2",
        f"rotation | gptaq:{G}",
        f"mixed:schemes=W2A16_ASYM;W4A16_ASYM,bits=3.5 | gptaq:{G}",
        "gptaq:scheme=NVFP4A16 | tune:epochs=1",
        "rounding:scheme=NF4,group_size=32,iters=10",
        "gptq:scheme=W2A16_BINARY,group_size=32",
    ],
)
def test_what_was_made_is_proven(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The checks of an honest artifact pass, and one changed scale is seen."""
    from wherry import shelf
    from wherry.evaluate import proof
    from wherry.prove import turned

    compress(tiny_llama, recipe, tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    original = turned(Checkpoint.open(tiny_llama), artifact)
    decoded = list(shelf.find("formats", "compressed_tensors").decode(artifact))
    exact = "NVFP4" not in recipe  # compressed-tensors decodes that in bfloat16

    def checks(tensors: list[Any]) -> dict[str, str]:
        report = proof.structure(artifact, iter(tensors), lambda name: original.weight(name).numpy(), exact=exact)
        return {row.what: row.note for row in report if row.what.startswith("check: ") and row.value is False}

    assert checks(decoded) == {}
    name = "model.layers.1.mlp.up_proj.weight"
    changed = [(n, w * 1.05 if n == name else w) for n, w in decoded]
    if exact:
        assert "check: decodes to the plan's weights" in checks(changed)
