"""Learning keeps what batches that it did not learn from approve of; the original is asked once for each batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wherry.engine.tune import distance
from wherry.ops.latent import held_out, learn


def test_what_only_the_teachers_like_does_not_stay() -> None:
    x, judges = torch.zeros(1, requires_grad=True), held_out(16)
    assert judges == [3, 11]
    asked: set[int] = set()

    def loss(i: int) -> torch.Tensor:
        if torch.is_grad_enabled():
            asked.add(i)
        return ((x - (-1.0 if i in judges else 1.0)) ** 2).sum()

    assert learn(loss, [], [x], 16, 40, 0.0, 0.0, 0.05) == (1.0, 1.0)
    assert x.item() == 0
    assert asked == set(range(16)) - set(judges)


def test_what_the_judges_like_stays() -> None:
    x = torch.zeros(1, requires_grad=True)
    first, last = learn(lambda i: ((x - 1) ** 2).sum(), [], [x], 16, 40, 0.0, 0.0, 0.05)
    assert first == 1
    assert last == pytest.approx((x.item() - 1) ** 2)
    assert last < 0.2


@pytest.mark.parametrize("batches", [1, 7])
def test_few_batches_teach_and_judge(batches: int) -> None:
    x, asked = torch.zeros(1, requires_grad=True), set()

    def loss(i: int) -> torch.Tensor:
        asked.add((i, torch.is_grad_enabled()))
        return ((x - 1) ** 2).sum()

    learn(loss, [], [x], batches, 20, 0.0, 0.0, 0.05)
    assert asked == {(i, grad) for i in range(batches) for grad in (False, True)}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_the_original_is_asked_once_where_its_head_alone_makes_the_logits(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    extra = {"gemma2": {"final_logit_softcapping": 0.05, "head_dim": 16, "num_key_value_heads": 2}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **extra.get(kind, {}), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    calls: list[int] = []
    teacher = AutoModelForCausalLM.from_config(config).eval()
    teacher.load_state_dict(model.state_dict())
    teacher.register_forward_hook(lambda *_: calls.append(1))
    batch = {"input_ids": np.arange(2, 18).reshape(2, 8)}
    plan = SimpleNamespace(task=SimpleNamespace(kind="text-generation"))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    same = distance(plan, model, teacher, [batch], {}, weights)
    assert [float(same(0)) for _ in range(3)] == pytest.approx([0.0] * 3, abs=1e-6)
    assert len(calls) == (1 if kind == "llama" else 3)  # the others cap or scale what the head gives
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0)
    other = distance(plan, model, teacher, [batch], {}, weights)
    with torch.no_grad():
        ids = torch.from_numpy(batch["input_ids"])
        p = teacher(input_ids=ids).logits.log_softmax(-1)
        q = torch.func.functional_call(model, weights, (ids,)).logits.log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert [float(other(0)) for _ in range(2)] == pytest.approx([expected] * 2, rel=1e-4)
