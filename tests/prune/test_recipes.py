"""Recipes that prune a whole model: zeros through every solver, shares under a budget, the cubic schedule, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from wherry import api, deliver
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput
from wherry.recipe import Recipe

G = "scheme=W4A16_ASYM,group_size=32,embedding=keep"


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(0, 512, (4, 32))} for _ in range(2)]


def compress(folder: Path, recipe: str, out: Path) -> Checkpoint:
    plan = Recipe.parse(recipe).plan(Checkpoint.open(folder))
    deliver.deliver(plan, out, (), batches(), {}, lambda result: None, api.quiet)
    return Checkpoint.open(out)


def linears(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.names() if name.endswith("proj.weight")]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Checkpoint:
    return compress(tiny_llama, "wanda", tmp_path_factory.mktemp("pruned") / "out")


@pytest.mark.parametrize(
    "after",
    [
        f"awq:{G} | gptq:{G}", "smoothquant | rtn:scheme=W8A8,embedding=keep", f"gptaq:{G}",
        f"rounding:{G},iters=4 | tune:epochs=1", "mixed:bits=3.5 | gptq:" + G, "rtn:scheme=NF4,group_size=32",
        "gptq:scheme=W2A16,group_size=32", "rtn:scheme=W4A16,group_size=32", f"hqq:{G}",
        "hqq:scheme=W1.58A16,group_size=32", f"best:{G}", "kvcache | rtn:scheme=W8A16,group_size=32",
    ],
)  # fmt: skip
def test_zeros_stay_through_quantization(after: str, pruned: Checkpoint, tiny_llama: Path, tmp_path: Path) -> None:
    made = compress(tiny_llama, f"wanda | {after}", tmp_path / "out")
    for name in linears(made):
        assert bool((made.weight(name)[pruned.weight(name) == 0] == 0).all()), name
        assert next(row for row in made.plan if row["name"] == name)["sparsity"] >= 0.5


def test_a_grid_without_zero_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    plan = Recipe.parse("magnitude | rtn:scheme=W1A16,group_size=32").plan(Checkpoint.open(tiny_llama))
    row = plan.row("model.layers.0.mlp.up_proj.weight")
    assert row.sparsity == 0
    assert any("no zero" in note for note in row.notes)
    made = compress(tiny_llama, "magnitude | rtn:scheme=W1A16,group_size=32", tmp_path / "out")
    assert all(row.get("sparsity", 0) == 0 for row in made.plan if row["scheme"])


@pytest.mark.parametrize("sensitivity", ["fisher", "kl"])
def test_shares_fit_the_budget_and_follow_what_they_cost(
    sensitivity: str, tiny_llama: Path, tmp_path: Path
) -> None:
    made = compress(tiny_llama, f"allot:sensitivity={sensitivity},levels=5 | magnitude:scope=row", tmp_path / "out")
    shares = {name: float((made.weight(name) == 0).float().mean()) for name in linears(made)}
    sizes = {name: made.weight(name).numel() for name in shares}
    total = sum(shares[name] * sizes[name] for name in shares) / sum(sizes.values())
    assert 0.48 < total < 0.53
    assert len({round(share, 2) for share in shares.values()}) > 1
    assert min(shares.values()) > 0.28
    assert max(shares.values()) < 0.72

    def loss(checkpoint: Checkpoint) -> float:
        a, b = (c.module()(**{k: torch.from_numpy(v) for k, v in batches()[0].items()}).logits.log_softmax(-1)
                for c in (Checkpoint.open(tiny_llama), checkpoint))  # fmt: skip
        return float((a.exp() * (a - b)).sum(-1).mean())

    if sensitivity == "kl":
        assert loss(made) < loss(compress(tiny_llama, "magnitude:scope=row", tmp_path / "even"))


def test_the_cubic_schedule(tiny_llama: Path) -> None:
    knobs = "sparsity=0.7,rounds=2,steps=7,prune_by=wanda,options=block=4x1,ignore=q_proj"
    recipe = Recipe.parse(f"gradual:{knobs}").spelled(graph=False)
    assert [step.method for step in recipe.steps] == ["wanda", "heal", "wanda", "heal"]
    first, _, last, heal = recipe.steps
    assert (first.sparsity, last.sparsity) == (pytest.approx(0.6125), 0.7)
    assert (last.block, last.ignore, heal.steps) == ("4x1", ("q_proj",), 7)
    assert len(recipe.stages) == 4
    assert Recipe.parse(f"gradual:{knobs}").plan(Checkpoint.open(tiny_llama)).recipe == recipe


def test_errors_before_work(tiny_llama: Path) -> None:
    original = Checkpoint.open(tiny_llama)
    for recipe, wanted in (
        ("allot", "a step that prunes comes after it"),
        ("allot | gptq", "a step that prunes comes after it"),
        ("allot | wanda:pattern=2:4", "says itself how much"),
        ("allot | magnitude:scope=global", "says itself how much"),
        ("allot | wanda:sparsity=0.9", "leaves 0 to 1"),
        ("allot:levels=1 | wanda", "2 levels or more"),
        ("gradual:rounds=0", "one round"),
        ("gradual:sparsity=1", "between 0 and 1"),
        ("wanda:pattern=2:4,sparsity=1.5", "leaves nothing"),
    ):
        with pytest.raises(BadInput, match=wanted):
            Recipe.parse(recipe).plan(original)
