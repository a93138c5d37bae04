"""Losses against torch's own, closed forms and finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F

from wherry.distill.attention import Attention
from wherry.distill.hidden import Hidden, couples
from wherry.distill.kl import KL
from wherry.distill.l2 import L2
from wherry.errors import BadInput
from wherry.objective import IGNORE, Objective

B, T, V = 3, 5, 11


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch() -> dict[str, torch.Tensor]:
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(7))
    targets[0, 3:] = IGNORE
    return {"targets": targets}


def mean(step: KL, z: torch.Tensor, teacher: dict, given: dict) -> torch.Tensor:
    total, count = step.loss({"logits": z}, teacher, given)
    assert int(count) == step.count(given)
    return total / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_and_reverse_are_torchs_kl(temperature: float) -> None:
    z, t, given = drawn(0, B, T, V), drawn(1, B, T, V), batch()
    keep = given["targets"] != IGNORE
    log_q, log_p = (F.log_softmax(x[keep] / temperature, -1) for x in (z, t))
    for direction, ours, theirs in (("forward", log_q, log_p), ("reverse", log_p, log_q)):
        wanted = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
        got = mean(KL(temperature=temperature, direction=direction), z, {"logits": t}, given)
        assert torch.allclose(got.double(), wanted, rtol=1e-5)


def test_jensen_shannon_is_scipys() -> None:
    from scipy.spatial.distance import jensenshannon

    z, t = drawn(0, 1, V), drawn(1, 1, V)
    got = mean(KL(direction="js"), z, {"logits": t}, {"targets": torch.tensor([0])})
    wanted = jensenshannon(z.softmax(-1)[0].numpy(), t.softmax(-1)[0].numpy()) ** 2
    assert float(got) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_jensen_shannon_tends_to_both_directions(share: float) -> None:
    """JS_b / b tends to KL(p || q) for b to 0, JS_b / (1 - b) to KL(q || p) for b to 1 (GKD, section 3)."""
    z, t, given = drawn(0, 1, V), drawn(1, 1, V), {"targets": torch.tensor([0])}
    near = 1e-3 if share < 0.5 else 1 - 1e-3
    got = mean(KL(direction="js", share=near), z, {"logits": t}, given) / min(near, 1 - near)
    wanted = mean(KL(direction="forward" if share < 0.5 else "reverse"), z, {"logits": t}, given)
    assert float(got) == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_gradients_by_finite_differences(direction: str) -> None:
    t, given = drawn(1, 2, V), {"targets": torch.tensor([0, 1])}
    step = KL(temperature=2.0, direction=direction)
    z = drawn(0, 2, V).requires_grad_()
    mean(step, z, {"logits": t}, given).backward()
    eps = 1e-2  # the loss is computed in float32
    for i in range(V):
        shift = torch.zeros(2, V, dtype=torch.float64)
        shift[0, i] = eps
        with torch.no_grad():
            up, down = (float(mean(step, z + s, {"logits": t}, given)) for s in (shift, -shift))
        assert float(z.grad[0, i]) == pytest.approx((up - down) / 2 / eps, abs=2e-4)


def test_a_high_temperature_matches_logits() -> None:
    """Hinton et al. 2015, section 2.1: T^2 KL tends to sum of (centred z_s - z_t)^2 / 2V."""
    z, t, given = drawn(0, B, V), drawn(1, B, V), {"targets": torch.zeros(B, dtype=torch.int64)}
    z.requires_grad_()
    mean(KL(temperature=300.0), z, {"logits": t}, given).backward()
    d = z.detach() - t
    centred = d - d.mean(-1, keepdim=True)
    assert torch.allclose(z.grad, centred / V / B, atol=2e-4)


def test_top_k_is_the_whole_at_v_and_a_bound_below() -> None:
    z, t, given = drawn(0, B, T, V).float(), drawn(1, B, T, V).float(), batch()
    whole = mean(KL(), z, {"logits": t}, given)
    found = []
    for k in (1, 4, 8, V - 1, V):
        values, indices = t.log_softmax(-1).topk(k)
        found.append(float(mean(KL(), z, {"top_values": values, "top_indices": indices, "temperature": 1.0}, given)))
    assert found == sorted(found)  # every split of the bucket adds
    assert found[-1] == pytest.approx(float(whole), rel=1e-6)
    assert found[-2] == pytest.approx(float(whole), rel=1e-4)  # one class is the bucket itself


def test_top_k_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    teacher = {"top_values": p[:, :1].log(), "top_indices": torch.tensor([[0]]), "temperature": 1.0}
    got = mean(KL(), q.log(), teacher, {"targets": torch.tensor([0])})
    assert float(got) == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8), rel=1e-5)


def test_another_vocabulary_or_temperature_is_refused() -> None:
    given = {"targets": torch.tensor([0])}
    with pytest.raises(BadInput, match="vocabularies differ"):
        KL().loss({"logits": torch.zeros(1, 5)}, {"logits": torch.zeros(1, 6)}, given)
    cached = {"top_values": torch.zeros(1, 1), "top_indices": torch.zeros(1, 1).long(), "temperature": 1.0}
    with pytest.raises(BadInput, match="temperature 1"):
        KL(temperature=2.0).loss({"logits": torch.zeros(1, 5)}, cached, given)
    for knobs in ({"temperature": 0.0}, {"share": 1.0}, {"temperature": float("nan")}):
        with pytest.raises(BadInput):
            KL(**knobs)


def test_hidden_relative_and_cosine_by_hand() -> None:
    h, t = drawn(0, B, T, 4).float(), drawn(1, B, T, 4).float()
    given = batch()
    keep = given["targets"] != IGNORE
    states = ({"hidden_states": (h * 0, h)}, {"hidden_states": (t * 0, t)})
    total, count = Hidden().loss(*states, given)
    wanted = ((h - t) ** 2).sum(-1) / (t**2).sum(-1)
    assert float(total / count) == pytest.approx(float(wanted[keep].mean()), rel=1e-5)
    total, count = Hidden(match="cosine").loss(*states, given)
    assert float(total / count) == pytest.approx(float((1 - F.cosine_similarity(h, t, dim=-1))[keep].mean()), rel=1e-5)


def test_hidden_similarity_takes_other_widths_and_ignores_rotation() -> None:
    h, given = drawn(0, B, T, 6).float(), batch()
    turn = torch.linalg.qr(drawn(2, 9, 6).float())[0]
    total, _ = Hidden(match="similarity").loss(
        {"hidden_states": (h, h)}, {"hidden_states": (h @ turn.T, h @ turn.T)}, given
    )
    assert float(total) < 1e-8
    with pytest.raises(BadInput, match="similarity"):
        Hidden().loss({"hidden_states": (h, h)}, {"hidden_states": (h @ turn.T, h @ turn.T)}, given)


def test_layers_of_a_shallow_student_are_spread() -> None:
    assert couples(2, 4) == [(0, 1), (1, 3)]
    assert couples(3, 4) == [(0, 0), (1, 2), (2, 3)]
    assert all(couples(n, m)[-1] == (n - 1, m - 1) for n in range(1, 9) for m in range(n, 20))


def test_hidden_of_labels_means_over_tokens() -> None:
    h, t = drawn(0, B, T, 4).float(), drawn(1, B, T, 4).float()
    total, count = Hidden().loss(
        {"hidden_states": (h, h)}, {"hidden_states": (t, t)}, {"targets": torch.tensor([1, IGNORE, 0])}
    )
    wanted = (((h - t) ** 2).sum(-1) / (t**2).sum(-1)).mean(-1)[[0, 2]].mean()
    assert float(total / count) == pytest.approx(float(wanted), rel=1e-5)


def test_attention_is_torchs_kl_and_averages_other_heads() -> None:
    mask = torch.ones(T, T).tril().log()
    a, t = (drawn(i, B, 2, T, T).float().add(mask).softmax(-1) for i in (0, 1))
    given = {"targets": torch.zeros(B, T, dtype=torch.int64)}
    total, count = Attention().loss({"attentions": (a,)}, {"attentions": (t,)}, given)
    wanted = F.kl_div(a.clamp(min=1e-12).log(), t, reduction="none").sum(-1).mean(1).mean()
    assert float(total / count) == pytest.approx(float(wanted), rel=1e-4)
    total, count = Attention(layers="all").loss({"attentions": (a.mean(1, keepdim=True),)}, {"attentions": (a,)}, given)
    assert float(total) == pytest.approx(0, abs=1e-5)


def test_the_regulariser_is_half_the_square_and_the_lasso() -> None:
    w = drawn(0, 3, 4)
    assert float(L2().penalty(w)) == pytest.approx(float(w.square().sum()) / 2)
    assert float(L2(power=1).penalty(w)) == pytest.approx(float(w.abs().sum()))
    with pytest.raises(BadInput):
        L2(power=3)


def test_a_recipe_is_read_and_written() -> None:
    text = "kl:temperature=2.0,direction=js | hidden:weight=0.5 | qat:scheme=W2A16_ASYM,group_size=32 | keep_zeros"
    made = Objective.parse(text)
    assert Objective.parse(str(made)) == made
    assert made.needs == {"teacher", "hidden"}
