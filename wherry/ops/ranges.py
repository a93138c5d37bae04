"""Ranges: where static activations are cut, from what was seen of them. Numpy only.

minmax      all that was seen
percentile  what is left when 0.001% of the values are cut off at each end
mse         the range with the least squared error of rounding and clipping together
entropy     the range whose rounded distribution is nearest, in KL, to the one seen

Idea:   two passes over the batches: extremes, then a histogram of 2048 bins between them; all ranges are found on
        the histogram. Ranges hold 0, which is then a code of its own (padding and ReLU stay exact).
Source: Jacob et al. 2018, arXiv:1712.05877; Migacz 2017, 8-bit inference with TensorRT (entropy); Wu et al. 2020,
        arXiv:2004.09602 (comparison of the four).
Shapes: values of any shape, all of a tensor together.
Cost:   a sort-free histogram per batch; memory 16 KiB per tensor.
"""

from collections.abc import Callable

import numpy as np

from wherry.errors import Diverged

BINS = 2048
TAIL = 1e-5
SHRINKS = np.linspace(1.0, 0.3, 57)
OBSERVERS = ("mse", "minmax", "percentile", "entropy")


class Seen:
    """What was seen of some edges: extremes, histograms, means."""

    def __init__(self) -> None:
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.counts: dict[str, np.ndarray] = {}
        self.sums: dict[str, np.ndarray] = {}
        self.tokens: dict[str, int] = {}

    def extremes(self, name: str, x: np.ndarray) -> None:
        """First pass. Raises Diverged at a value that is not a number."""
        low, high = float(x.min(initial=0.0)), float(x.max(initial=0.0))
        if not np.isfinite(low) or not np.isfinite(high):
            raise Diverged(f"{name} is NaN or inf on the calibration data: check the model in float32 first")
        self.low[name] = min(low, self.low.get(name, 0.0))
        self.high[name] = max(high, self.high.get(name, 0.0))

    def count(self, name: str, x: np.ndarray) -> None:
        """Second pass."""
        found = np.histogram(x, BINS, (self.low[name], max(self.high[name], self.low[name] + 1e-12)))[0]
        self.counts[name] = self.counts.get(name, 0) + found

    def range(self, name: str, observer: str) -> tuple[float, float]:
        """The range of one edge by one observer, 0 included."""
        low, high = self.low[name], self.high[name]
        if observer == "minmax" or high - low < 1e-12 or name not in self.counts:
            return low, high
        edges = np.linspace(low, high, BINS + 1)
        return FIND[observer](self.counts[name].astype(np.float64), edges, low, high)


def percentile(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Cut a share of TAIL off each end."""
    share = np.cumsum(counts) / counts.sum()
    first, last = int(np.searchsorted(share, TAIL)), int(np.searchsorted(share, 1 - TAIL))
    return min(float(edges[first]), 0.0) if low < 0 else 0.0, max(float(edges[min(last + 1, len(edges) - 1)]), 0.0)


def mse(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Shrink one end, then the other, while the expected squared error falls."""
    centre = (edges[:-1] + edges[1:]) / 2

    def error(a: float, b: float) -> float:
        step = max(b - a, 1e-12) / 255
        zero = np.round(-a / step)
        code = np.clip(np.round(centre / step + zero), 0, 255)
        return float((counts * ((code - zero) * step - centre) ** 2).sum())

    return shrink(error, low, high)


def entropy(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Shrink while the KL of the seen distribution to its rounded one falls.

    What is clipped counts at the ends of the seen one alone. The bin that holds 0 is left out: 0 has a code of its own,
    and the many zeros behind a ReLU would count as lost among their neighbours.
    """
    centre = (edges[:-1] + edges[1:]) / 2
    counts = counts.copy()
    counts[min(int(np.searchsorted(edges, 0.0, "right")) - 1, len(counts) - 1)] = 0
    if not counts.sum():
        return low, high

    def divergence(a: float, b: float) -> float:
        inside = np.flatnonzero((centre >= a) & (centre <= b))
        if len(inside) < 256:
            return float("inf")
        p = counts[inside].copy()
        kept = p.copy()
        p[0] += counts[: inside[0]].sum()
        p[-1] += counts[inside[-1] + 1 :].sum()
        step = (b - a) / 255
        code = np.clip(np.round((centre[inside] - a) / step), 0, 255).astype(np.int64)
        there = p > 0
        spread = np.bincount(code, kept, 256) / np.maximum(np.bincount(code, there, 256), 1)
        p, q = p[there] / p.sum(), np.maximum(spread[code][there], 1e-12)
        return float((p * np.log(p / (q / q.sum()))).sum())

    return shrink(divergence, low, high)


def shrink(cost: Callable[[float, float], float], low: float, high: float) -> tuple[float, float]:
    """The ends, each shrunk by the factor of least cost: the high one first, then the low one, then the high again."""
    a, b = 1.0, 1.0
    for side in (1, 0, 1):
        if (low if side == 0 else high) == 0:
            continue
        costs = [cost(low * (s if side == 0 else a), high * (s if side == 1 else b)) for s in SHRINKS]
        best = float(SHRINKS[int(np.argmin(costs))])
        a, b = (best, b) if side == 0 else (a, best)
    return low * a, high * b


FIND = {"percentile": percentile, "mse": mse, "entropy": entropy}
