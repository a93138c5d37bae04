"""Magnitude, Wanda and SparseGPT on single weights: closed forms, brute force, the authors' loop in numpy."""

import itertools

import numpy as np
import pytest
import torch

from wherry.errors import BadInput, Diverged
from wherry.ops import sparse
from wherry.ops.solve import Hessian, fit_kept, inverse_factor, zero_columns
from wherry.prune.magnitude import Magnitude
from wherry.prune.sparsegpt import SparseGPT
from wherry.prune.wanda import Wanda

METHODS = (Magnitude, Wanda, SparseGPT)


def layer(n: int = 24, k: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [n, k] and correlated inputs [tokens, k] of very unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) * torch.logspace(-1, 1, k)
    return torch.randn(n, k, generator=g), torch.randn(400, k, generator=g) @ mix


def pruned(method, w, x, **knobs):
    step = method(**knobs)
    stat = step.observe(step.observe(None, x[:150]), x[150:]) if hasattr(step, "observe") else None
    return step.prune(w, stat, [])


def loss(w, v, x):
    return float(((w - v) @ x.T).square().sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_share_is_exact(method, sparsity) -> None:
    w, x = layer()
    v = pruned(method, w, x, sparsity=sparsity)
    wanted = round(sparsity * 32) * 24 if method is Wanda else round(sparsity * w.numel())
    assert int((v == 0).sum()) == wanted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_patterns_hold_in_every_group(method, pattern, n, m) -> None:
    w, x = layer()
    v = pruned(method, w, x, pattern=pattern)
    assert bool(((v.reshape(24, -1, m) != 0).sum(-1) == n).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("block", "high", "wide"), [("4x1", 4, 1), ("1x8", 1, 8), ("8x4", 8, 4)])
def test_blocks_go_together(method, block, high, wide) -> None:
    w, x = layer()
    v = pruned(method, w, x, block=block)
    tiles = (v != 0).reshape(24 // high, high, 32 // wide, wide).permute(0, 2, 1, 3).flatten(2).sum(-1)
    assert set(tiles.unique().tolist()) == {0, high * wide}
    assert int((tiles == 0).sum()) == tiles.numel() // 2


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zero(method) -> None:
    w, x = layer()
    w = w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.3)
    v = pruned(method, w, x, sparsity=0.5)
    assert bool((v[w == 0] == 0).all())
    share = float((v == 0).float().mean())
    assert abs(share - 0.5) < 0.02  # the zeros that were there count
    less = pruned(method, w, x, sparsity=0.1)
    assert bool((less[w == 0] == 0).all())


def test_better_methods_lose_less() -> None:
    for seed in range(4):
        w, x = layer(seed=seed)
        found = [loss(w, pruned(m, w, x, **k), x) for m, k in
                 ((Magnitude, {}), (Wanda, {}), (SparseGPT, {"refit": 0}), (SparseGPT, {}))]  # fmt: skip
        assert found == sorted(found, reverse=True)
        assert len(set(found)) == 4


def test_white_inputs_leave_magnitude() -> None:
    w, _ = layer()
    v = SparseGPT().prune(w, Hessian(torch.eye(32), 1))
    assert torch.allclose(v, Magnitude().prune(w), atol=1e-6)


def test_wanda_is_its_score_row_by_row() -> None:
    w, x = layer(6, 8)
    score = w.abs().numpy() * np.linalg.norm(x.numpy(), axis=0)
    v = pruned(Wanda, w, x, sparsity=0.25)
    for i in range(6):
        assert sorted(np.flatnonzero(v[i].numpy() == 0)) == sorted(np.argsort(score[i])[:2])


def test_the_loop_is_the_authors() -> None:
    """fasterprune of the authors' code, in float64 numpy with an explicit inverse, block for block."""
    w, x = layer(5, 12)
    H = (x.T @ x / len(x)).double().numpy()
    H += 0.01 * H.diagonal().mean() * np.eye(12)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    W = w.double().numpy().copy()
    for i in range(0, 12, 4):
        B, d = W[:, i : i + 4], U.diagonal()[i : i + 4]
        score = (B / d) ** 2
        gone = score <= np.sort(score.ravel())[score.size // 2 - 1]
        for c in range(4):
            e = np.where(gone[:, c], W[:, i + c], 0) / d[c]
            W[:, i + c + 1 :] -= np.outer(e, U[i + c, i + c + 1 :])
            W[gone[:, c], i + c] = 0
    ours = pruned(SparseGPT, w, x, columns=4, refit=0)
    assert np.array_equal(ours.numpy() == 0, W == 0)
    assert np.allclose(ours.numpy(), W, atol=1e-4)


def test_refit_is_least_squares() -> None:
    """Against the closed form w_S = w + w_R H_RS H_SS^-1, row by row."""
    w, x = layer(6, 10)
    H = (x.T @ x / len(x)).double()
    H += 0.01 * H.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    v = w * sparse.keep(w.abs(), 0.5)
    found = fit_kept(w.double(), v.double(), H, 60)
    for i in range(6):
        S, R = torch.nonzero(v[i])[:, 0], torch.nonzero(v[i] == 0)[:, 0]
        exact = w[i, S].double() + w[i, R].double() @ H[R][:, S] @ torch.linalg.inv(H[S][:, S])
        assert torch.allclose(found[i, S], exact, atol=1e-5)
        assert bool((found[i, R] == 0).all())


def test_near_the_best_of_all_masks() -> None:
    """One row of 8, 4 stay: all 70 masks with their least squares, against ours."""
    ratios, plain = [], []
    for seed in range(12):
        w, x = layer(1, 8, seed)
        x = x / x.std(0)
        H = (x.T @ x / len(x)).double()
        best = np.inf
        for S in itertools.combinations(range(8), 4):
            R = [j for j in range(8) if j not in S]
            shift = torch.linalg.solve(H[list(S)][:, list(S)], H[list(S)][:, R] @ w[0, R].double())
            v = torch.zeros(8, dtype=torch.float64)
            v[list(S)] = w[0, list(S)].double() + shift
            gap = w[0].double() - v
            best = min(best, float(gap @ H @ gap))
        for found, step in ((ratios, {"method": SparseGPT, "refit": 40, "damp": 1e-4}), (plain, {"method": Wanda})):
            gap = w[0].double() - pruned(w=w, x=x, **step)[0].double()
            found.append(float(gap @ H @ gap) / best)
            assert found[-1] >= 1 - 1e-3
    assert min(ratios) < 1 + 1e-3  # the very best mask, at times
    assert np.median(ratios) < 0.8 * np.median(plain)


def test_threshold_of_all_weights_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 7, generator=g), torch.randn(3, 11, generator=g) * 1e-3, torch.zeros(2, 2)]
    flat = torch.cat([t.abs().flatten() for t in tensors]).sort().values
    for share in (0.01, 0.3, 0.77, 0.999):
        assert sparse.threshold(lambda: tensors, share) == float(flat[min(round(share * len(flat)), len(flat) - 1)])


def test_every_step_leaves_something() -> None:
    w, x = layer(3, 4)
    for method in METHODS:
        v = pruned(method, w, x, sparsity=0.999)
        assert bool((v != 0).any())


def test_dead_inputs_and_broken_statistics() -> None:
    w, x = layer()
    x[:, 5] = 0
    v = pruned(SparseGPT, w, x, damp=0.0)
    assert torch.isfinite(v).all()
    dead = pruned(SparseGPT, w, torch.zeros_like(x))
    assert torch.equal(dead == 0, Magnitude().prune(w) == 0)
    with pytest.raises(Diverged):
        SparseGPT().prune(w, Hessian(torch.full((32, 32), float("nan")), 1))
    with pytest.raises(BadInput):
        SparseGPT(damp=-1)
    with pytest.raises(BadInput):
        SparseGPT(columns=0)


def test_the_loop_takes_any_choice() -> None:
    w, x = layer(4, 8)
    U, _ = inverse_factor(x.T @ x / len(x), 0.01)
    v = zero_columns(w, U, lambda score: torch.ones_like(score, dtype=torch.bool))
    assert torch.equal(v, w)
