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
    ],
)
def test_what_the_plan_says_is_so(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan, out = api.plan(tiny_llama, recipe), tmp_path / "out"
    warned = [note for row in plan.rows for note in row.notes if "stock transformers does not" in note]
    deliver.deliver(plan, out, (), [], {}, lambda result: None, api.quiet)
    try:
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        ids = torch.arange(3, 40)[None]
        want = Checkpoint.open(out).module()(input_ids=ids).logits
        with torch.no_grad():
            loads = torch.allclose(found(input_ids=ids).logits, want, atol=1e-3) or "A8" in recipe
    except (RuntimeError, ValueError):
        loads = False
    assert loads == (not warned)
