"""Intervals against scipy, and against the truth of simulated data: 95% must mean 95%."""

import numpy as np
import pytest
from scipy import stats

from wherry.errors import BadInput
from wherry.evaluate import interval


def clustered(rng: np.random.Generator, windows: int, tokens: int, between: float) -> list[np.ndarray]:
    """Values around 3 whose windows have means of their own."""
    return [3 + between * rng.standard_normal() + rng.standard_normal(tokens) for _ in range(windows)]


def test_mean_is_the_t_interval_of_scipy():
    rng = np.random.default_rng(0)
    data = clustered(rng, 9, 20, 0.5)
    found = interval.mean(data)
    ends = stats.ttest_1samp([window.mean() for window in data], 0).confidence_interval(0.95)
    assert found.value == pytest.approx(np.concatenate(data).mean())
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_mean_covers_the_truth_where_tokens_depend_on_each_other():
    rng = np.random.default_rng(1)
    hits = naive = 0
    for _ in range(600):
        data = clustered(rng, 12, 50, 0.5)
        found = interval.mean(data)
        hits += found.low <= 3 <= found.high
        every = np.concatenate(data)
        naive += abs(every.mean() - 3) <= 1.96 * every.std() / np.sqrt(len(every))
    assert 0.92 <= hits / 600 <= 0.98
    assert naive / 600 < 0.75  # what an interval over tokens would have claimed


def test_mean_weighs_windows_by_their_tokens():
    found = interval.mean([np.array([1.0, 1.0, 1.0]), np.array([5.0])])
    assert found.value == 2.0
    assert found.low < 2 < found.high


def test_one_window_has_no_interval():
    assert interval.mean([np.array([1.0, 2.0])]) == interval.Interval(1.5, None, None)
    with pytest.raises(BadInput, match="at least one window"):
        interval.mean([])


def test_share_is_wilson_where_windows_are_alike():
    data = [np.array([True, True, False, True])] * 5
    found = interval.share(data)
    ends = stats.binomtest(15, 20).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((0.75, ends.low, ends.high))


def test_share_of_all_is_not_certain():
    found = interval.share([np.ones(100, dtype=bool)] * 3)
    assert found.value == found.high == 1
    assert found.low == pytest.approx(stats.binomtest(300, 300).proportion_ci(0.95, method="wilson").low)


def test_share_covers_the_truth_in_clusters():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        found = interval.share([rng.random(60) < p for p in rng.beta(16, 4, 20)])
        hits += found.low <= 0.8 <= found.high
    assert 0.91 <= hits / 400 <= 0.985


def test_correlation_is_scipys():
    rng = np.random.default_rng(3)
    x = rng.standard_normal(80)
    y = np.round(x + rng.standard_normal(80), 1)  # with ties
    assert interval.correlation(x, y, ranks=True).value == pytest.approx(stats.spearmanr(x, y).statistic)
    pearson = interval.correlation(x, y, ranks=False)
    assert pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    fisher = stats.pearsonr(x, y).confidence_interval(0.95)
    assert (pearson.low, pearson.high) == pytest.approx((fisher.low, fisher.high), abs=0.04)


def test_correlation_covers_the_truth():
    rng = np.random.default_rng(4)
    hits = 0
    for i in range(100):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 60).T
        found = interval.correlation(x, y, ranks=False, seed=i)
        hits += found.low <= 0.8 <= found.high
    assert 88 <= hits <= 99


def test_paired_difference_is_narrower_than_two_apart():
    rng = np.random.default_rng(5)
    gold = rng.standard_normal(100)
    base = gold + 0.5 * rng.standard_normal(100)
    close = base + 0.02 * rng.standard_normal(100)
    paired = interval.difference(close, base, gold, ranks=True)
    single = interval.correlation(base, gold, ranks=True)
    assert paired.low <= paired.value <= paired.high
    assert paired.high - paired.low < (single.high - single.low) / 5
    expected = stats.spearmanr(close, gold).statistic - stats.spearmanr(base, gold).statistic
    assert paired.value == pytest.approx(expected)


def test_difference_to_itself_is_zero():
    x = np.arange(10.0)
    assert interval.difference(x, x, x[::-1].copy(), ranks=True) == interval.Interval(0.0, 0.0, 0.0)
