"""The allocator against brute force over every choice; its errors."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry.errors import BadInput, Diverged
from wherry.ops.allocate import allocate


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(1, 4), st.floats(0.0, 1.0))
def test_the_best_of_all(seed: int, things: int, choices: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    cost, size = rng.random((things, choices)) ** 4, rng.integers(1, 50, (things, choices)).astype(float)
    budget = size.min(1).sum() + part * (size.max(1).sum() - size.min(1).sum())
    found = allocate(cost, size, budget)
    row = np.arange(things)
    assert size[row, found].sum() <= budget + 1e-6
    every = [np.array(c) for c in itertools.product(range(choices), repeat=things)]
    best = min(cost[row, c].sum() for c in every if size[row, c].sum() <= budget + 1e-9)
    assert cost[row, found].sum() <= best * (1 + 1e-6) + 1e-12


def test_errors() -> None:
    with pytest.raises(BadInput, match="raise the budget"):
        allocate(np.ones((2, 2)), np.full((2, 2), 5.0), 9.0)
    with pytest.raises(Diverged):
        allocate(np.array([[np.nan, 1.0]]), np.ones((1, 2)), 9.0)


@pytest.mark.parametrize("seed", range(5))
def test_small_differences_beside_a_large_cost_are_decided_too(seed: int) -> None:
    """A solver stops within 1e-6 of the best: that must not hide costs of 1e-7."""
    rng = np.random.default_rng(seed)
    cost = np.concatenate([[[1.0, 0.0, 0.5]], rng.random((5, 3)) * 4e-7])
    size = rng.integers(1, 50, (6, 3)).astype(float)
    budget = (size.min(1).sum() + size.max(1).sum()) / 2
    row, every = np.arange(6), np.array(list(itertools.product(range(3), repeat=6)))
    best = cost[row, every].sum(1)[size[row, every].sum(1) <= budget + 1e-9].min()
    assert cost[row, allocate(cost, size, budget)].sum() <= best + 1e-9
