"""Confidence intervals at 95%: of a mean over windows of text, of a share, of a correlation, of paired differences.

Idea:   tokens of one window depend on each other, so the window is the unit that is drawn, never the token.
        Means: Student's t over windows (weighted by their tokens, as a ratio estimator). Shares: Wilson's interval with
        the number of tokens divided by the design effect of the windows. Correlations: BCa bootstrap over pairs.
Source: Cochran 1977, Sampling Techniques, 2.11 and 9.8 (ratio estimator, design effect); Wilson 1927;
        Efron 1987 (BCa), by scipy.stats.bootstrap.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wherry.errors import BadInput, Missing

try:
    from scipy import stats
except ModuleNotFoundError as error:
    raise Missing("intervals need the package 'scipy', which is not installed.\npip install 'wherry[eval]'") from error

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95% interval; no ends where one window or pair is all there is."""

    value: float
    low: float | None
    high: float | None


def mean(values: Sequence[np.ndarray]) -> Interval:
    """Mean over all tokens of all windows: Student's t over the windows.

    Args:
        values: one array [tokens] per window; lengths may differ.
    """
    if not values or not all(len(window) for window in values):
        raise BadInput("nothing to average: give at least one window of two tokens")
    count = len(values)
    tokens = np.array([len(window) for window in values], dtype=float)
    sums = np.array([float(np.sum(window, dtype=np.float64)) for window in values])
    value = float(sums.sum() / tokens.sum())
    if count < 2:
        return Interval(value, None, None)
    residual = (sums - value * tokens) / tokens.mean()
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.sqrt((residual**2).sum() / (count * (count - 1))))
    return Interval(value, value - half, value + half)


def share(hits: Sequence[np.ndarray]) -> Interval:
    """Share of true values over all tokens of all windows: Wilson, with windows as clusters.

    Args:
        hits: one boolean array [tokens] per window.

    The design effect is at least 1, so that a share of 0 or 1 keeps an honest width.
    """
    by_mean = mean(hits)
    total, windows = sum(len(window) for window in hits), len(hits)
    p = by_mean.value
    effect = 1.0
    if by_mean.high is not None and 0 < p < 1:
        error = (by_mean.high - p) / float(stats.t.ppf((1 + LEVEL) / 2, windows - 1))
        effect = max(1.0, error**2 / (p * (1 - p) / total))
    n, z = total / effect, float(stats.norm.ppf((1 + LEVEL) / 2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def correlation(x: np.ndarray, y: np.ndarray, ranks: bool, seed: int = 0) -> Interval:
    """Spearman's (ranks=True) or Pearson's correlation of x [n] and y [n]: BCa bootstrap over the pairs."""
    return _bootstrap((x, y), lambda a, b, axis: correlate(a, b, ranks), seed)


def difference(x: np.ndarray, reference: np.ndarray, y: np.ndarray, ranks: bool, seed: int = 0) -> Interval:
    """correlation(x, y) - correlation(reference, y), the same pairs drawn for both: BCa bootstrap."""
    return _bootstrap((x, reference, y), lambda a, b, c, axis: correlate(a, c, ranks) - correlate(b, c, ranks), seed)


def _bootstrap(data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int) -> Interval:
    value = float(statistic(*data, axis=-1))
    if len(data) == 3 and np.array_equal(data[0], data[1]):
        return Interval(0.0, 0.0, 0.0)  # one and the same: no draw can tell them apart
    if len(data[0]) < 3 or not np.isfinite(value):
        return Interval(value, None, None)
    for method in ("BCa", "percentile"):  # BCa has no answer where (nearly) all resamples agree
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                data, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=LEVEL,
                batch=250, rng=np.random.default_rng(seed), method=method,
            ).confidence_interval  # fmt: skip
        if np.isfinite(found.low) and np.isfinite(found.high):
            return Interval(value, float(found.low), float(found.high))
    return Interval(value, None, None)


def correlate(a: np.ndarray, b: np.ndarray, ranks: bool) -> np.ndarray:
    """Pearson's correlation, or with ranks Spearman's, along the last axis; leading axes are resamples."""
    if ranks:
        a, b = stats.rankdata(a, axis=-1), stats.rankdata(b, axis=-1)
    a = a - a.mean(-1, keepdims=True)
    b = b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def draws(count: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of `count` examples is drawn in each resample with replacement: float64 [resamples, count]."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def weighted(statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int = 0) -> Interval:
    """Any statistic of examples: percentile bootstrap over them.

    Args:
        statistic: weights [resamples, count] of the examples to values [resamples]; NaN where it has none.
        count: number of examples.
    """
    value = float(statistic(np.ones((1, count)))[0])
    if count < 3 or not np.isfinite(value):
        return Interval(value, None, None)
    found = np.concatenate([statistic(part) for part in np.array_split(draws(count, seed), 20)])
    found = found[np.isfinite(found)]
    if len(found) < RESAMPLES // 2:
        return Interval(value, None, None)
    low, high = np.percentile(found, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(low), float(high))


def paired_share(hits: np.ndarray, reference: np.ndarray) -> Interval:
    """Difference of two shares over the same examples, hits - reference, both boolean [n].

    Source: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data": one example is added to each kind of disagreement, so that no disagreement keeps an honest width.
    """
    count = len(hits)
    won, lost = int((hits & ~reference).sum()), int((~hits & reference).sum())
    p, q = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * float(np.sqrt((p + q - (p - q) ** 2) / (count + 2)))
    value = (won - lost) / count
    return Interval(value, max(-1.0, min(value, p - q - half)), min(1.0, max(value, p - q + half)))
