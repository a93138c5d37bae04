"""GPTQ: brute force on a tiny problem, the exact test of white inputs, the order of the paper, composition laws."""

import itertools

import numpy as np
import pytest
import torch

from wherry.errors import Diverged
from wherry.ops.solve import inverse_factor, refit
from wherry.quant.gptq import GPTQ, Hessian
from wherry.quant.rtn import RTN
from wherry.scheme import Scheme

S4, S3 = Scheme.parse("W4A16_ASYM,group_size=32"), Scheme.parse("W3A16,group_size=32")


def correlated(tokens: int, k: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g) + 0.1 * torch.randn(
        tokens, k, generator=g
    )


def loss(w: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> float:
    return float(((w - q) @ x.T).norm())


@pytest.mark.parametrize("scheme", [S4, S3, Scheme.parse("W2A16_ASYM,group_size=16")])
@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_beats_round_to_nearest(scheme: Scheme, order: str, seed: int) -> None:
    torch.manual_seed(seed)
    w, x = torch.randn(48, 128), correlated(512, 128, seed)
    method = GPTQ(scheme=scheme, actorder=order)
    ours = method.solve(w, method.observe(None, x)).decode()
    nearest = RTN(scheme=scheme).solve(w).decode()
    assert loss(w, ours, x) < 0.75 * loss(w, nearest, x)


@pytest.mark.parametrize("order", ["static", "none"])
def test_white_inputs_make_it_round_to_nearest(order: str) -> None:
    w = torch.randn(16, 96)
    white = Hessian(torch.eye(96), 1)
    ours = GPTQ(scheme=S4, damp=0.0, observer="minmax", actorder=order).solve(w, white)
    assert torch.equal(ours.code, RTN(scheme=S4).solve(w).code)


def test_against_the_textbook_loop() -> None:
    """Algorithm 1 written out without blocks, permutation or lazy updates, in float64."""
    torch.manual_seed(3)
    w, x = torch.randn(8, 64).double(), correlated(300, 64).double()
    method = GPTQ(
        scheme=Scheme.parse("W4A16_ASYM,group_size=32"), actorder="none", observer="minmax", block=16, refit=False
    )
    ours = method.solve(w.float(), method.observe(None, x.float()))
    H = x.T @ x / len(x)
    H += 0.01 * H.diagonal().mean() * torch.eye(64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    S = ours.scale.double().repeat_interleave(32, 1)
    assert ours.zero is not None
    Z = ours.zero.double().repeat_interleave(32, 1)
    W, code = w.float().double().clone(), torch.empty(8, 64)
    for j in range(64):
        q = (W[:, j] / S[:, j] + Z[:, j]).round().clamp(-8, 7)
        code[:, j] = q
        e = (W[:, j] - S[:, j] * (q - Z[:, j])) / U[j, j]
        W[:, j:] -= e[:, None] * U[j, j:]
    assert (code == ours.code).float().mean() > 0.995  # float32 against float64: a tie may fall the other way


def test_near_the_best_of_all_codes() -> None:
    """Brute force over every code of a row of 5 weights with 2 bits: GPTQ is close to the optimum and beats RTN."""
    scheme = Scheme.parse("W2A16_ASYM,group_size=5")
    ratios, nearest = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        w, x = torch.randn(1, 5), correlated(64, 8, seed)[:, :5]
        method = GPTQ(scheme=scheme, damp=1e-4)
        q = method.solve(w, method.observe(None, x))
        assert q.zero is not None
        grids = torch.tensor(list(itertools.product(range(-2, 2), repeat=5))).float()
        values = q.scale[0, 0] * (grids - q.zero[0, 0].float())
        best = float(((w - values) @ x.T).norm(dim=1).min())
        ratios.append(loss(w, q.decode(), x) / best)
        nearest.append(loss(w, RTN(scheme=scheme).solve(w).decode(), x) / best)
    assert min(ratios) >= 1 - 1e-5
    assert sum(ratios) < sum(nearest)
    assert sorted(ratios)[20] < 1.35


def test_exact_zeros_stay_zero() -> None:
    torch.manual_seed(0)
    w = torch.randn(32, 128)
    mask = torch.rand_like(w) < 0.5
    w[mask] = 0
    x = correlated(400, 128)
    for scheme in (S4, S3):
        method = GPTQ(scheme=scheme)
        q = method.solve(w, method.observe(None, x)).decode()
        assert (q[mask] == 0).all()


def test_statistics_add_up() -> None:
    x = correlated(256, 64)
    method = GPTQ(scheme=S4)
    whole, parts = method.observe(None, x), method.observe(method.observe(None, x[:100]), x[100:])
    assert whole.tokens == parts.tokens
    torch.testing.assert_close(whole.total, parts.total, rtol=1e-4, atol=1e-2)


def test_damping_repairs_itself_and_says_so() -> None:
    w, x = torch.randn(8, 64), torch.zeros(4, 64)
    x[:, 0] = 1.0  # rank one
    method, notes = GPTQ(scheme=S4, damp=0.0), []
    q = method.solve(w, method.observe(None, x), notes)
    assert torch.isfinite(q.decode()).all()
    assert "damping raised" in notes[0]


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    x = correlated(200, 48).double()
    H = (x.T @ x).float()
    U, damp = inverse_factor(H, 0.01)
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(U.double().T @ U.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-7)
    assert damp == 0.01
    assert (U.tril(-1) == 0).all()


def test_refit_is_least_squares_and_never_worse() -> None:
    """Against numpy's lstsq on the inputs themselves; a row of zeros and a group of zeros keep their scales."""
    torch.manual_seed(5)
    w, x = torch.randn(6, 64), correlated(500, 64)
    q = RTN(scheme=Scheme.parse("W3A16,group_size=16")).solve(w)
    code = q.code.float()
    code[4], code[5, :16] = 0, 0
    old = q.scale * 1.2
    H = x.T @ x
    new = refit(w, code, H, old, ridge=0.0, rows=4)
    for i in range(4):
        columns = torch.stack([code[i, g : g + 16] @ x[:, g : g + 16].T for g in range(0, 64, 16)], 1)
        best = np.linalg.lstsq(columns.double().numpy(), (x @ w[i]).double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(new[i].numpy(), best, rtol=2e-3)
    pulled = refit(w, code, H, old)
    assert torch.equal(pulled[4], old[4])
    assert torch.isclose(pulled[5, 0], old[5, 0], rtol=1e-4)
    for i in range(6):
        before, after = (loss(w[i], code[i] * s[i].repeat_interleave(16), x) for s in (old, pulled))
        assert after <= before * (1 + 1e-6)


def test_refit_helps_gptq() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        w, x = torch.randn(48, 128), correlated(512, 128, seed)
        stat = GPTQ().observe(None, x)
        plain, fitted = (GPTQ(scheme=S3, refit=on).solve(w, stat) for on in (False, True))
        assert torch.equal(plain.code, fitted.code)
        assert loss(w, fitted.decode(), x) < 0.98 * loss(w, plain.decode(), x)


def test_nan_in_the_statistics_is_an_error() -> None:
    with pytest.raises(Diverged, match="NaN"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)
