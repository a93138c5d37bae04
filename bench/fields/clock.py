"""The clock: variants of one model in turn, one thread and two, so that a ratio is of the same minute of the machine.

A round runs every variant `repeat` times in a shuffled order, after one run that does not count. Wall seconds give the
latency; the ratio to another variant is taken inside a round, and its spread is over rounds.
Cost: rounds * repeat * variants * latency, per count of threads.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np


def rounds(variants: Mapping[str, Callable[[], object]], count: int, budget: float) -> dict[str, np.ndarray]:
    """Seconds [rounds, repeat] of each variant; `budget` is seconds for all of it, and sets the repeats (2 to 50)."""
    start = time.perf_counter()
    for run in variants.values():
        run()
        run()
    once = (time.perf_counter() - start) / 2
    repeat = int(np.clip(budget / (once * count), 2, 50))
    names, drawn = list(variants), np.random.default_rng(0)
    seconds = {name: np.zeros((count, repeat)) for name in names}
    for number in range(count):
        for name in drawn.permutation(names):
            run = variants[str(name)]
            run()
            for i in range(repeat):
                start = time.perf_counter()
                run()
                seconds[str(name)][number, i] = time.perf_counter() - start
    return seconds


def ratio(ours: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """How many times faster than the other: median over rounds of the medians' ratio, and its quartiles."""
    each = np.median(other, axis=1) / np.median(ours, axis=1)
    low, middle, high = np.quantile(each, (0.25, 0.5, 0.75))
    return float(middle), float(low), float(high)


def latency(seconds: np.ndarray) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1000
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4)}
