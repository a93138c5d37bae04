"""Outputs: how far a model's raw outputs are from the original's, where no label says what is right.

relative difference   root of the mean squared difference over that of the original's outputs, the worst output counts
same class            share of examples whose largest output is the same one, with its interval
Shapes: outputs [batch, ...] by name; whole-number outputs are not compared.
"""

from collections.abc import Sequence

import numpy as np

from wherry.evaluate import interval
from wherry.report import Report

Outputs = Sequence[dict[str, np.ndarray]]
LIMIT = 0.7  # relative difference: above it the outputs have little to do with the original's
AGREE = 0.5  # of classifications, at the bad end of the interval


def compare(base: Outputs | None, found: Outputs, where: str, classes: bool) -> Report:
    """Rows of difference and agreement, and the checks on them. base None: only whether all outputs are finite."""
    report = Report()
    finite = all(np.isfinite(array).all() for batch in found for array in batch.values() if array.dtype.kind == "f")
    report.add("check: finite outputs", where, finite, note="every output")
    if base is None:
        return report
    worst, name = 0.0, ""
    for key in base[0]:
        if key not in found[0] or base[0][key].dtype.kind != "f":
            continue
        gap = sum(float(((a[key].astype(np.float64) - b[key]) ** 2).sum()) for a, b in zip(base, found, strict=True))
        norm = sum(float((a[key].astype(np.float64) ** 2).sum()) for a in base)
        far = float(np.sqrt(gap / norm)) if norm else float(np.sqrt(gap))
        worst, name = (far, key) if not far <= worst else (worst, name or key)
    report.add("relative difference", where, worst, note=f"relative RMS to the original, output {name}")
    good = bool(worst <= LIMIT)
    note = f"relative difference {worst:.3g}, at most {LIMIT}"
    first = next(iter(base[0]))
    if classes and base[0][first].ndim == 2:
        same = np.concatenate([a[first].argmax(-1) == b[first].argmax(-1) for a, b in zip(base, found, strict=True)])
        share = interval.share([hit[None] for hit in same])
        low, high = share.low or 0.0, 1.0 if share.high is None else share.high
        report.add("same class", where, 100 * share.value, "%", 100 * low, 100 * high, "as the original's likeliest")
        good, note = good and low >= AGREE, f"{note}; the same class at least {AGREE:.0%} at the bad end"
    report.add("check: near the original", where, good, note=note)
    return report
