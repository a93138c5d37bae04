import numpy as np
import pytest
import torch

from tests.evaluate.sessions import Fixed
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.evaluate.perplexity import perplexity
from wherry.runtimes import torch as runtime


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    nll, report = perplexity(Fixed([1 / 50] * 50), np.arange(40).reshape(4, 10), "uniform")
    row = report.get("perplexity", "uniform")
    assert row.value == pytest.approx(50)
    assert (row.low, row.high) == pytest.approx((50, 50))
    assert [len(window) for window in nll] == [9] * 4
    assert "36 tokens in 4 windows" in row.note


def test_it_is_exp_of_transformers_loss(tiny_llama):
    from transformers import LlamaForCausalLM

    windows = np.random.default_rng(0).integers(0, 512, (3, 32))
    _, report = perplexity(runtime.over(Checkpoint.open(tiny_llama)), windows)
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    row = report.get("perplexity")
    assert row.value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert row.low < row.value < row.high


def test_an_impossible_token_is_said_not_averaged():
    _, report = perplexity(Fixed([0.5, 0.5, 0]), [[0, 1, 2, 1], [0, 0, 1, 0]], "m")
    row = report.get("perplexity", "m")
    assert row.value is None
    assert "1 of 6 tokens" in row.note
    report.to_json()


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(BadInput, match="at least one window"):
        perplexity(Fixed([1.0]), [])
    with pytest.raises(BadInput, match="two tokens"):
        perplexity(Fixed([1.0]), [[0]])
    with pytest.raises(Unsupported, match="grade C"):
        perplexity(Fixed([1.0], grade="C"), [[0, 0]])
