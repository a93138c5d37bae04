"""One figure of many judged examples, with a bootstrap interval; paired where two variants are compared.

Units [n, k]: one row per example (an image, a pair, an utterance); rows are drawn with replacement, whole.
Source: Efron 1979; percentile interval, 95%, 2000 draws, seeded, the same draws for both sides of a difference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL = 2000, 0.95


def _mean(units: np.ndarray) -> float:
    return float(units[:, 0].mean())


def _spearman(units: np.ndarray) -> float:
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(units[:, 0]), rankdata(units[:, 1]))[0, 1])


def _rate(units: np.ndarray) -> float:
    """Columns errors, words: the word error rate."""
    return float(units[:, 0].sum() / units[:, 1].sum())


def _f1(units: np.ndarray) -> float:
    """Columns true positives, false positives, false negatives."""
    tp, fp, fn = units[:, :3].sum(0)
    return float(2 * tp / max(2 * tp + fp + fn, 1))


def _bleu(units: np.ndarray) -> float:
    """Columns as sacrebleu counts them: system length, reference length, 4 matches, 4 totals."""
    from sacrebleu.metrics import BLEU

    total = [int(value) for value in units.sum(0)]
    return float(BLEU.compute_bleu(total[2:6], total[6:10], total[0], total[1]).score)


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": _mean, "spearman": _spearman, "word error rate": _rate, "f1": _f1, "bleu": _bleu,
}  # fmt: skip
LOWER_IS_BETTER = ("word error rate",)


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def row(self, name: str) -> dict[str, float]:
        """As fields of a row: name, name_low, name_high."""
        figures = zip((name, f"{name}_low", f"{name}_high"), (self.value, self.low, self.high), strict=True)
        return {key: round(value, 6) for key, value in figures}


def draws(count: int) -> np.ndarray:
    """Row numbers [2000, count]; a function of count alone, so that two variants meet the same examples."""
    return np.random.default_rng(0).integers(0, count, (DRAWS, count))


def figure(units: np.ndarray, statistic: str) -> Interval:
    """The statistic of the units."""
    measure = STATISTICS[statistic]
    return _ends(measure(units), [measure(units[chosen]) for chosen in draws(len(units))])


def loss(units: np.ndarray, original: np.ndarray, statistic: str) -> Interval:
    """How much worse than the original, paired by example; above 0 is worse, whichever way the statistic counts."""
    measure, sign = STATISTICS[statistic], -1 if statistic in LOWER_IS_BETTER else 1
    if units.shape != original.shape:
        raise ValueError(f"units of {units.shape} and {original.shape} are not of the same examples")
    many = [sign * (measure(original[chosen]) - measure(units[chosen])) for chosen in draws(len(units))]
    return _ends(sign * (measure(original) - measure(units)), many)


def _ends(value: float, many: list[float]) -> Interval:
    low, high = np.quantile(many, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, float(low), float(high))
