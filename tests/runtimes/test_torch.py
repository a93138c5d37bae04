"""The torch runtime against stock transformers, also where the inputs of layers are integers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from wherry import api, shelf
from wherry.artifact import Artifact
from wherry.session import Sampling


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn:scheme=W8A8", "rtn:scheme=W8A8_STATIC", "rtn:scheme=W4A16,group_size=32", "rtn:scheme=W4A8,group_size=32",
        "rtn:scheme=W4A8_STATIC,group_size=32", "rtn:scheme=W8A8_STATIC,strategy=tensor",
        "smoothquant | gptq:scheme=W4A8,group_size=32",
    ],
)  # fmt: skip
def test_logits_equal_stock_transformers(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.compress(tiny_llama, out, recipe, samples=8, length=64)
    artifact = Artifact.open(out)
    session = shelf.find("runtimes", "torch").load(artifact)
    tokens = artifact.task.encode("In the beginning was the word, and the word was with light.")
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = stock(torch.tensor([tokens])).logits[0, :-1].numpy()
    ours = session.score(tokens).logits
    assert ours is not None
    exact = "A8" not in recipe
    # a value half way between two int8 codes may round either way when a sum differs in its last bit
    np.testing.assert_allclose(ours, theirs, atol=1e-5 if exact else 5e-2)
    if not exact:
        assert np.abs(ours - theirs).mean() < 5e-3


def test_generate_is_transformers_greedy(tiny_llama: Path) -> None:
    module = shelf.find("runtimes", "torch")
    artifact = module.wrap(tiny_llama)
    session = module.load(artifact)
    tokens = artifact.task.encode("In the beginning")
    ours = list(session.generate(tokens, Sampling(max_tokens=12)))
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    theirs = stock.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert ours == theirs[0, len(tokens) :].tolist()
