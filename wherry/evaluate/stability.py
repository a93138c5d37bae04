"""Stability: how much a figure moves when nothing but the seed of the calibration sample changes.

Idea:   the same recipe with several seeds; mean, standard deviation and range of each figure over the seeds. The
        range is not a confidence interval: it is what happened.
Cost:   one compression and one evaluation per seed.
"""

from collections.abc import Callable, Sequence

import numpy as np

from wherry.errors import BadInput
from wherry.evaluate.perplexity import Progress, silent
from wherry.report import Report


def stability(
    run: Callable[[int], Report], seeds: Sequence[int], whats: Sequence[str] = (), progress: Progress = silent
) -> Report:
    """Rows of every seed, and "WHAT over seeds": mean, with the lowest and the highest as its ends.

    Args:
        run: compresses with a seed and measures; its rows with a number are compared by (what, where).
        seeds: five or more; different.
        whats: rows to compare; by default all that every run has with an interval.
    """
    if len(set(seeds)) < 5 or len(set(seeds)) != len(seeds):
        raise BadInput(f"{len(set(seeds))} different seeds: five or more say something about stability")
    out = Report()
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for i, seed in enumerate(seeds):
        for row in run(seed):
            number = isinstance(row.value, int | float) and not isinstance(row.value, bool)
            if number and (row.what in whats if whats else row.low is not None):
                found.setdefault((row.what, row.where, row.unit), {})[seed] = float(row.value or 0)
                out.add(f"{row.what}: seed {seed}", row.where, row.value, row.unit, row.low, row.high, row.note)
        progress(i + 1, len(seeds), f"seed {seed}")
    for (what, where, unit), values in found.items():
        if len(values) < len(seeds):
            continue
        each = np.array(list(values.values()))
        note = f"{len(each)} seeds: lowest to highest; standard deviation {each.std(ddof=1):.3g}"
        out.add(f"{what} over seeds", where, float(each.mean()), unit, float(each.min()), float(each.max()), note)
    return out
