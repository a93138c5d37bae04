"""Scales that were changed after they were rounded are seen in the decoded weights alone, at any factor."""

import numpy as np
import pytest
import torch

from wherry.evaluate.weights import compare, nearest, rounded, unrounded_scales
from wherry.ops import grid
from wherry.scheme import QTensor, Scheme


@pytest.mark.parametrize(
    "text", ["W4A16_ASYM,group_size=32", "W4A16,group_size=64", "W3A16,group_size=32", "W2A16,group_size=16"]
)
@pytest.mark.parametrize("factor", [0.5, 0.97, 0.995, 1.0, 1.004, 1.02, 1.3])
def test_a_changed_scale_shows(text, factor):
    scheme = Scheme.parse(text)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    q = grid.encode(w, scheme, *grid.fit(w, scheme))
    changed = QTensor(scheme, q.code, (q.scale * factor).half().float(), q.zero).decode().numpy()
    assert bool(unrounded_scales(changed, scheme)) == (factor not in (0.5, 1.0))


def test_one_changed_group_in_ten_is_no_alarm_of_this_check():
    scheme = Scheme.parse("W4A16,group_size=32")
    w = torch.randn(64, 320, generator=torch.Generator().manual_seed(3))
    q = grid.encode(w, scheme, *grid.fit(w, scheme))
    scale = q.scale.clone()
    scale[:, 0] *= 1.02
    assert not unrounded_scales(np.asarray(QTensor(scheme, q.code, scale, None).decode()), scheme)


@pytest.mark.parametrize("factor", [1.0, 0.9, 0.98, 1.005, 1.1])
@pytest.mark.parametrize("half", [False, True])
def test_wide_codes_of_weights_that_lie_on_a_narrow_grid(factor: float, half: bool) -> None:
    """Eight bits over what four once decoded to: no two codes are neighbours. Scales as float32 or as GGUF's fp16."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 20
    narrow = Scheme.parse("W4A16_ASYM,group_size=32")
    w = grid.encode(w, narrow, *grid.fit(w, narrow)).decode()
    scheme = Scheme.parse("W8A16,group_size=32")
    q = grid.encode(w, scheme, *grid.fit(w, scheme))
    scale = q.scale * factor
    changed = QTensor(scheme, q.code, scale.half().float() if half else scale, None).decode()
    assert bool(unrounded_scales(np.asarray(changed), scheme)) == (factor != 1.0)


def heterogeneous(kind: str, seed: int = 0) -> torch.Tensor:
    """Weights [256, 512]: equal, of unequal columns (as AWQ leaves them), unequal rows, or with long tails."""
    random = np.random.default_rng(seed)
    w = random.standard_t(4, (256, 512)) if kind == "tails" else random.standard_normal((256, 512))
    if kind in ("columns", "rows"):
        w = w * np.exp(random.standard_normal((1, 512) if kind == "columns" else (256, 1)))
    return torch.tensor(w / 20, dtype=torch.float32)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("kind", ["equal", "columns", "rows", "tails"])
def test_the_slope_of_a_k_quant_is_that_of_its_own_grid(name: str, kind: str) -> None:
    """The reference is the k-quant's own rounding, bit for bit, so 2% more is seen at any width."""
    scheme = Scheme.parse(name)
    given, rounding = heterogeneous(kind), grid.stored(scheme, None)
    q = grid.encode(given, scheme, *grid.fit(given, scheme, rounding))
    w, v = given.numpy(), np.asarray(q.decode())
    plain, step = rounded(w, scheme, scheme.group_size or 0)
    assert np.array_equal(plain, v)
    assert np.array_equal(step, q.scale.flatten().numpy())
    assert compare(w, v, scheme).problem == ""
    assert "scaled: slope" in compare(w, 1.02 * v, scheme).problem
    if name == "Q4_K":
        assert "scaled down" in compare(w, 0.98 * v, scheme).problem


@pytest.mark.parametrize("text", ["W1.58A16,group_size=32", "W1.58A16,group_size=128"])
@pytest.mark.parametrize("shrink", [1.0, 0.75, 0.55])
def test_a_smaller_range_of_few_codes_may_raise_the_slope(text: str, shrink: float) -> None:
    """Normal weights of deviation 1, step t, codes -1 to 1: the slope is 2 t phi(t / 2), most at t = 2."""
    scheme, given = Scheme.parse(text), heterogeneous("equal") * 20
    step = grid.fit(given, scheme)[0] * shrink
    w, v = given.numpy(), np.asarray(grid.encode(given, scheme, step, None).decode())
    assert compare(w, v, scheme).problem == ""
    assert "scaled" in compare(w, 1.2 * v, scheme).problem
    if scheme.group_size == 128:  # a small group's step hangs on the weights that it rounds
        expected = float((2 * step * torch.exp(-(step**2) / 8) / np.sqrt(2 * np.pi)).mean())
        assert float((w * v).sum() / (w * w).sum()) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    "text", ["W4A16_ASYM,group_size=32", "W4A16,group_size=128", "W3A16_ASYM,group_size=16", "W3A16_ASYM,group_size=64",
             "W2A16_ASYM,group_size=64", "Q3_K", "Q4_K"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["equal", "columns", "rows", "tails"])
def test_what_a_searched_range_cuts_off_is_not_called_scaled(text: str, kind: str) -> None:
    """The range of least error leaves out the tail's end; a scale lost afterwards is still seen at 4 bits."""
    scheme, given = Scheme.parse(text), heterogeneous(kind)
    q = grid.encode(given, scheme, *grid.search(given, scheme, grid.stored(scheme, grid.portable), None, norm=2.0))
    w, v = given.numpy(), np.asarray(q.decode())
    assert compare(w, v, scheme).problem == ""
    if text.startswith("W4"):
        assert "scaled down" in compare(w, 0.97 * v, scheme).problem


@pytest.mark.parametrize("text", ["W4A16_ASYM,group_size=8", "W3A16,group_size=4", "W8A16,group_size=16"])
def test_levels_of_a_group_are_found_by_brute_force(text: str) -> None:
    """Each weight takes the nearest of the multiples of the smallest gap between the group's least and most."""
    scheme, given = Scheme.parse(text), torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    size = scheme.group_size or 0
    v = np.asarray(grid.encode(given, scheme, *grid.fit(given, scheme)).decode()).reshape(-1, size)
    w = given.numpy().reshape(-1, size) * np.float32(1.07)
    for x, y, found in zip(w, v, nearest(w, v, size), strict=True):
        held = np.unique(y)
        levels = np.arange(held[0], held[-1] + 1e-6, np.diff(held).min())
        expected = levels[np.abs(x[:, None] - levels).argmin(1)]
        assert found == pytest.approx(expected, abs=1e-4)
