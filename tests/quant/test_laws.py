"""Composition laws that every method keeps, whatever it optimises."""

from typing import Any

import pytest
import torch

from wherry.ops import grid
from wherry.ops.latent import Latent
from wherry.recipe import build
from wherry.rows import holds_zero
from wherry.scheme import PRESETS, QTensor
from wherry.shelf import names

SOLVERS = [name for name in names("quant") if build(name, {}).solves]  # a new one is under the laws at once
FREE = [name for name in SOLVERS if not hasattr(build(name, {}), "observe")]
CALIBRATED = [name for name in SOLVERS if name not in FREE]
WITH_ZERO = [name for name, scheme in PRESETS.items() if holds_zero(scheme)]


def solve(method: str, w: torch.Tensor, x: torch.Tensor, **knobs: Any) -> QTensor:
    step = build(method, knobs)
    if method in FREE:
        return step.solve(w)
    extra = (x,) if method == "gptaq" else ()
    return step.solve(w, step.observe(None, x, *extra))


def sized(scheme: str) -> dict[str, int]:
    return {} if PRESETS[scheme].fixed or scheme.startswith("FP8") else {"group_size": 32}


def inputs(tokens: int, k: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g) + 0.1 * torch.randn(
        tokens, k, generator=g
    )


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize(
    "scheme", ["W4A16_ASYM", "W2A16", "NF4", "MXFP4A16", "FP8A16", "Q4_K", "Q6_K", "W2A16_BINARY"]
)
def test_white_inputs_make_it_round_to_nearest(method: str, scheme: str) -> None:
    """Inputs without correlation leave nothing to gain: the codes are the nearest ones of the searched ranges."""
    torch.manual_seed(0)
    w, x = torch.randn(24, 256), torch.eye(256) * 16
    knobs: dict[str, Any] = {"scheme": scheme, **sized(scheme)}
    knobs |= {"damp": 0, "refit": False} if method != "awq" else {}
    ours = solve(method, w, x, **knobs)
    step = build(method, knobs)
    ranges = grid.search(w, step.scheme, step.rounding, norm=getattr(step, "norm", 2.0))
    nearest = grid.encode(w, step.scheme, *ranges)
    assert torch.equal(ours.code, nearest.code)
    assert torch.equal(ours.scale, nearest.scale)


@pytest.mark.parametrize("scheme", WITH_ZERO)
@pytest.mark.parametrize("method", [*CALIBRATED, *FREE])
def test_exact_zeros_stay_zero(method: str, scheme: str) -> None:
    torch.manual_seed(1)
    w = torch.randn(16, 256)
    mask = torch.rand_like(w) < 0.5
    w[mask] = 0
    assert (solve(method, w, inputs(300, 256), scheme=scheme, **sized(scheme)).decode()[mask] == 0).all()


@pytest.mark.parametrize("method", [*CALIBRATED, *FREE])
def test_more_bits_are_never_worse(method: str) -> None:
    torch.manual_seed(2)
    w, x = torch.randn(32, 128), inputs(400, 128)
    errors = []
    for scheme in ("W2A16_ASYM", "W3A16_ASYM", "W4A16_ASYM"):
        errors.append(float((solve(method, w, x, scheme=scheme, group_size=32).decode() - w).norm()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", [*CALIBRATED, *FREE])
def test_a_group_of_one_is_exact(method: str) -> None:
    torch.manual_seed(3)
    w = torch.randn(8, 16)
    q = solve(method, w, inputs(64, 16), scheme="W4A16_ASYM", group_size=1, portable="false")
    torch.testing.assert_close(q.decode(), w, rtol=0.02 if method in ("gptq", "gptaq") else 1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W3A16", "W2A16_ASYM", "W8A16"])
def test_encoding_what_was_decoded_changes_nothing(scheme: str) -> None:
    torch.manual_seed(4)
    q = solve("hqq", torch.randn(16, 128), inputs(9, 128), scheme=scheme, group_size=32)
    again = grid.encode(q.decode(), q.scheme, q.scale, q.zero)
    assert torch.equal(again.code, q.code)
    assert torch.equal(again.decode(), q.decode())


@pytest.mark.parametrize("method", [*CALIBRATED, *FREE])
def test_a_latent_begins_where_its_solver_ended(method: str) -> None:
    torch.manual_seed(5)
    w = torch.randn(16, 64)
    w[:, :7] = 0
    for scheme in ("W4A16_ASYM", "W2A16"):
        q = solve(method, w, inputs(200, 64), scheme=scheme, group_size=32)
        latent = Latent(q, w, grid.portable)
        assert torch.equal(latent.settle().code, q.code)
        torch.testing.assert_close(latent.weight().detach(), q.decode(), rtol=1e-6, atol=1e-7)
        with torch.no_grad():
            latent.v.add_(torch.randn_like(latent.v))
            latent.a.add_(0.1 * torch.randn_like(latent.a))
        settled = latent.settle()
        torch.testing.assert_close(latent.weight().detach(), settled.decode(), rtol=1e-6, atol=1e-7)
        assert (settled.decode()[:, :7] == 0).all()
        assert torch.equal(settled.scale, grid.portable(settled.scale))
        assert int(settled.code.min()) >= q.scheme.qmin
        assert int(settled.code.max()) <= q.scheme.qmax


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16_ASYM", "W4A16_ASYM", "FP4A16", "Q4_K"])
def test_a_searched_range_is_the_best_of_all_parts_tried(scheme: str) -> None:
    """rtn with observer=mse against a loop over shrunken weights' ranges, each group for itself."""
    torch.manual_seed(0)
    w = torch.distributions.StudentT(4.0).sample((6, 256)) * 0.02
    knobs: dict[str, Any] = {"scheme": scheme, **sized(scheme), "portable": False}
    step = build("rtn", knobs)
    found = build("rtn", {**knobs, "observer": "mse"}).solve(w).decode()
    plain = step.solve(w).decode()
    assert float((found - w).norm()) < float((plain - w).norm())
    if scheme != "Q4_K":  # whose scales depend on one another
        groups, least = grid.grouped(w, step.scheme), torch.full((6, 1), torch.inf)
        for part in torch.linspace(0.4, 1, 31).tolist():
            scale, zero = grid.fit(w * part, step.scheme, None)
            error = grid.grouped(grid.encode(w, step.scheme, scale, zero).decode() - w, step.scheme).square().sum(-1)
            least = torch.minimum(least, error)
        ours = grid.grouped(found - w, step.scheme).square().sum(-1)
        torch.testing.assert_close(ours, least.expand(groups.shape[:-1]), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("scheme", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "NVFP4A16"])
@pytest.mark.parametrize("method", SOLVERS)
def test_a_group_of_zeros_costs_its_neighbours_nothing(method: str, scheme: str) -> None:
    """Pruned groups have no scale of their own: none may stand in for it that others are measured by."""
    torch.manual_seed(0)
    w, x = torch.randn(8, 512) * 0.02, inputs(600, 512)
    whole = solve(method, w, x, scheme=scheme).decode()
    pruned = w.clone()
    pruned[:, 64:96] = 0
    left = solve(method, pruned, x, scheme=scheme).decode()
    rest = pruned != 0
    assert (left[:, 64:96] == 0).all()
    assert float((left - w)[rest].norm()) < 1.1 * float((whole - w)[rest].norm())
