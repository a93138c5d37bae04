"""Metric: a figure of merit as a function of how often each example is drawn; rows with intervals, one model or two.

Idea:   one function of weights [resamples, examples] gives the value (all weights 1), its bootstrap interval (weights
        drawn), and, with the same draws for two models, the interval of their paired difference.
Cost:   2000 resamples; the models are not run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wherry.errors import BadInput
from wherry.evaluate import interval
from wherry.report import Report


@dataclass(frozen=True)
class Metric:
    """name: of the row. of: weights float64 [resamples, n] to values [resamples], NaN where undefined.

    hits: boolean [n], where the value is the share of true ones: then closed forms give the intervals.
    lower: whether less is better. note: what the figure means, for the row.
    """

    name: str
    of: Callable[[np.ndarray], np.ndarray]
    count: int
    hits: np.ndarray | None = None
    lower: bool = False
    note: str = ""

    @property
    def value(self) -> float:
        """With every example once."""
        return float(self.of(np.ones((1, self.count)))[0])


def share(name: str, hits: np.ndarray, note: str = "") -> Metric:
    """The share of true values among boolean [n]."""
    hits = np.asarray(hits, bool)
    return Metric(name, lambda w: w @ hits / w.sum(1), len(hits), hits, note=note)


def mean(name: str, values: Sequence[float] | np.ndarray, lower: bool = False, note: str = "") -> Metric:
    """The mean of one value per example."""
    each = np.asarray(values, np.float64)
    return Metric(name, lambda w: w @ each / w.sum(1), len(each), lower=lower, note=note)


def ratio(
    name: str, above: np.ndarray, below: np.ndarray, lower: bool = False, note: str = "", scale: float = 1
) -> Metric:
    """The sum of one quantity over the sum of another: errors over words."""
    return Metric(name, lambda w: scale * _over(w @ above, w @ below), len(above), lower=lower, note=note)


def f1(name: str, counts: np.ndarray, note: str = "") -> tuple[Metric, ...]:
    """F1, precision and recall pooled over all examples, from [3, n]: said rightly, said, wanted in each example."""
    right, said, wanted = counts
    count = len(right)
    return (
        Metric(f"{name} f1", lambda w: _over(2 * (w @ right), w @ said + w @ wanted), count, note=note),
        Metric(f"{name} precision", lambda w: _over(w @ right, w @ said), count, note=note),
        Metric(f"{name} recall", lambda w: _over(w @ right, w @ wanted), count, note=note),
    )


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b > 0, a / b, np.nan)


def rows(metrics: Sequence[Metric], where: str) -> Report:
    """One row per metric with its 95% interval."""
    report = Report()
    for metric in metrics:
        if metric.hits is not None:
            found, how = interval.share([metric.hits[i : i + 1] for i in range(metric.count)]), "Wilson"
        else:
            found, how = interval.weighted(metric.of, metric.count), "bootstrap"
        text = "; ".join(filter(None, (metric.note, f"{metric.count} examples; 95% {how} interval")))
        if np.isfinite(found.value):
            report.add(metric.name, where, found.value, "", found.low, found.high, text)
        else:
            report.add(metric.name, where, None, note=f"{metric.name} has no value here: nothing to divide by")
    return report


def differences(metrics: Sequence[Metric], reference: Sequence[Metric], where: str, original: str) -> Report:
    """One row "NAME difference" per metric: this minus reference, the same examples drawn for both."""
    report, before = Report(), {metric.name: metric for metric in reference}
    for metric in metrics:
        other = before.get(metric.name)
        if other is None:
            continue
        if other.count != metric.count:
            raise BadInput(f"{metric.name}: {metric.count} examples against {other.count}: not the same data")
        found = difference(metric, other)
        how = "Bonett-Price" if metric.hits is not None else "paired bootstrap"
        text = f"to {original}, the same examples; 95% {how} interval" + ("; less is better" if metric.lower else "")
        if np.isfinite(found.value):
            report.add(f"{metric.name} difference", where, found.value, "", found.low, found.high, text)
        else:
            report.add(f"{metric.name} difference", where, None, note=f"{metric.name} has no value for one of the two")
    return report


def difference(metric: Metric, reference: Metric) -> interval.Interval:
    """The metric minus the reference, with its paired interval."""
    if metric.hits is not None and reference.hits is not None:
        return interval.paired_share(metric.hits, reference.hits)
    return interval.weighted(lambda w: metric.of(w) - reference.of(w), metric.count)
