"""GPTAQ: the paper's column loop written out, and that it repairs a drifted input better than GPTQ does."""

import torch

from tests.quant.test_laws import inputs
from wherry.ops import grid
from wherry.quant.gptaq import GPTAQ
from wherry.quant.gptq import GPTQ
from wherry.scheme import Scheme

S = Scheme.parse("W4A16_ASYM,group_size=32")


def test_against_the_textbook_loop() -> None:
    """Column by column in float64, in natural order of a descending diagonal, without blocks."""
    torch.manual_seed(0)
    x = inputs(300, 64)
    x = x[:, torch.argsort(x.square().sum(0), descending=True)]
    ref, w = x + 0.2 * inputs(300, 64, seed=9), torch.randn(8, 64)
    method = GPTAQ(scheme=S, refit=False, block=16)
    ours = method.solve(w, method.observe(None, x, ref))
    X, D = x.double(), (ref - x).double()
    H = X.T @ X / 300
    scale, zero = grid.search(w, S, grid.portable, H.diagonal().float(), norm=3.0)
    U = torch.linalg.cholesky(torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(64)), upper=True)
    P = ((1 - 64 / 300) * (D.T @ X / 300) @ U.T).triu(1) @ U
    assert zero is not None
    s, z = scale.double().repeat_interleave(32, 1), zero.double().repeat_interleave(32, 1)
    W, code = w.double().clone(), torch.empty(8, 64)
    for j in range(64):
        now = W[:, j].clone()
        q = (now / s[:, j] + z[:, j]).round().clamp(-8, 7)
        code[:, j] = q
        e = (now - s[:, j] * (q - z[:, j])) / U[j, j]
        W[:, j + 1 :] += now[:, None] * P[j, j + 1 :] - e[:, None] * U[j, j + 1 :]
    assert (code == ours.code).float().mean() > 0.98


def test_few_tokens_are_trusted_less() -> None:
    """96 tokens for 64 inputs and a drift that is noise: on 2000 other tokens better than the whole correction is."""
    for seed in range(3):
        torch.manual_seed(seed)
        ref, w = inputs(2096, 64, seed), torch.randn(48, 64)
        x = ref + 0.5 * ref.std() * torch.randn_like(ref)
        ours, notes = GPTAQ(scheme=S), []
        stat = ours.observe(None, x[:96], ref[:96])
        whole = stat._replace(drift=stat.drift / (1 - 64 / 96))
        errors = [float((ours.solve(w, s, notes).decode() @ x[96:].T - w @ ref[96:].T).norm()) for s in (stat, whole)]
        assert errors[0] < 0.97 * errors[1]
        assert "0.33 of the correction" in notes[0]
        few = ours.observe(None, x[:60], ref[:60])
        plain = GPTQ(scheme=S)
        assert torch.equal(ours.solve(w, few).code, plain.solve(w, plain.observe(None, x[:60])).code)


def test_it_repairs_what_came_before() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        ref, w = inputs(600, 128, seed), torch.randn(48, 128)
        x = ref + 0.3 * inputs(600, 128, seed + 50)  # what compressed layers before made of it
        ours, plain = GPTAQ(scheme=S), GPTQ(scheme=S)
        errors = [
            float((q.decode() @ x.T - w @ ref.T).norm())
            for q in (ours.solve(w, ours.observe(None, x, ref)), plain.solve(w, plain.observe(None, x)))
        ]
        assert errors[0] < 0.97 * errors[1]


def test_without_drift_it_is_gptq() -> None:
    torch.manual_seed(7)
    x, w = inputs(300, 64), torch.randn(16, 64)
    ours, plain = GPTAQ(scheme=S), GPTQ(scheme=S)
    a, b = ours.solve(w, ours.observe(None, x, x)), plain.solve(w, plain.observe(None, x))
    assert torch.equal(a.code, b.code)
    torch.testing.assert_close(a.scale, b.scale)


def test_signs_take_no_more_of_the_correction_than_helps() -> None:
    """A large drift at one bit: never worse in ||Q X - W X'|| than without any correction, and it says what it took."""
    gained = []
    for seed in range(3):
        torch.manual_seed(seed)
        ref, w = inputs(600, 64, seed), torch.randn(48, 64)
        x = 0.4 * ref + 0.9 * inputs(600, 64, seed + 50)
        scheme, notes = Scheme.parse("W1A16,group_size=32"), []
        ours, plain = GPTAQ(scheme=scheme), GPTAQ(scheme=scheme, alpha=0.0)
        stat = ours.observe(None, x, ref)
        errors = [float((m.solve(w, stat, notes).decode() @ x.T - w @ ref.T).norm()) for m in (ours, plain)]
        assert errors[0] <= errors[1]
        gained.append(bool(notes))
        assert not notes or "alpha=" in notes[0]
    assert any(gained)


def test_few_tokens_and_signs_are_rounded() -> None:
    """200 tokens for 256 inputs, hardly damped: what fits is far from the weight; it is rounded, with a remark."""
    torch.manual_seed(0)
    ref, w = inputs(200, 256), torch.randn(16, 256)
    scheme, notes = Scheme.parse("W1A16,group_size=32"), []
    method = GPTAQ(scheme=scheme, damp=1e-6)
    q = method.solve(w, method.observe(None, ref + 0.5 * inputs(200, 256, seed=3), ref), notes)
    assert float((q.decode() - w).norm() / w.norm()) < 0.9
    assert any("200 tokens" in note for note in notes)
