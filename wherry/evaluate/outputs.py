"""Outputs: how far a model's raw outputs are from the original's, where no label says what is right.

relative difference   root of the mean squared difference over that of the original's outputs, the worst output counts
top-1 agreement       share of examples whose largest output is the same one, with its interval (Wilson)
Shapes: outputs [batch, ...] by name; whole-number outputs are not compared.
Source: Wilson 1927, Probable Inference, JASA 22 (the interval of a share).
"""

from collections.abc import Sequence

import numpy as np

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
        low, high = wilson(float(same.mean()), len(same))
        report.add("top-1 agreement", where, 100 * float(same.mean()), "%", low=100 * low, high=100 * high)
        good, note = good and low >= AGREE, f"{note}; top-1 agreement at least {AGREE:.0%} at the bad end"
    report.add("check: near the original", where, good, note=note)
    return report


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share of `count` examples, 95% by default."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))
