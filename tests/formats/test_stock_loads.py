"""The plan says where stock transformers will not load the checkpoint, and only there."""

from pathlib import Path

import pytest
import torch

from wherry import api, deliver
from wherry.checkpoint import Checkpoint


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn:scheme=W4A16_ASYM,group_size=32",
        "rtn:scheme=W8A8",
        "rtn:scheme=W4A16,group_size=32,targets=q_proj | rtn:scheme=W8A16,group_size=64",
        "rtn:scheme=W4A16_ASYM,group_size=32,targets=q_proj | rtn:scheme=W4A16_ASYM,group_size=64",
        "rtn:scheme=W4A16_ASYM,group_size=32,targets=q_proj | rtn:scheme=W8A16,group_size=64",
        "rtn:scheme=NF4,group_size=32",
        "rtn:scheme=W8A16,strategy=tensor",
        "rtn:scheme=W4A16_ASYM,strategy=tensor",
        "rtn:scheme=W4A16,block_structure=16x32",
        "rtn:scheme=FP8A16,block_structure=32x32",
        "rtn:scheme=W8A8,strategy=tensor",
        "mixed:schemes=W4A16;W8A16,bits=6 | rtn:scheme=W4A16,group_size=32",
    ],
)
def test_what_the_plan_says_is_so(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan, out = api.plan(tiny_llama, recipe), tmp_path / "out"
    warned = [note for row in plan.rows for note in row.notes if "stock transformers does not" in note]
    given = [{"input_ids": torch.randint(0, 512, (4, 48)).numpy()}] if plan.recipe.calibrated else []
    deliver.deliver(plan, out, (), given, {}, lambda result: None, api.quiet)
    try:
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        ids = torch.arange(3, 40)[None]
        want = Checkpoint.open(out).module()(input_ids=ids).logits
        with torch.no_grad():
            near = 0.1 if "A8" in recipe else 1e-3  # there inputs are rounded too
            loads = float((found(input_ids=ids).logits - want).norm() / want.norm()) < near
    except (RuntimeError, ValueError):
        loads = False
    assert loads == (not warned)
