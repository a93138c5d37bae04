"""Weights: what may be said of one decoded weight: is it on its grid, has a scale been lost, is it still the original?

Idea:   for an integer grid with step D the error of a group is near D^2 / 12 per weight, whatever the method; methods
        that see data (GPTQ) trade more weight error for less output error. So the error must be below a multiple of
        that, and the slope <w, w'> / <w, w> must be near the slope of plain rounding. A tensor scaled by 1.02 hides in
        the error and shows in the slope; a tensor swapped with another of its shape has an error near 1.4.
Shapes: w (original), v (decoded) float32 [n, k]; groups of `size` neighbouring inputs of a row.
Cost:   a few passes over the tensor in numpy, 5 times its bytes of memory.
Source: Widrow & Kollar 2008, Quantization Noise (D^2 / 12). The multiples are measured: GPTQ with 2, 3, 4 and 8 bits on
        all-MiniLM-L6-v2 had errors up to 2.7 times that of rounding, and slopes from rounding's -0.13 e^2 to +0.003.
"""

from dataclasses import dataclass

import numpy as np

from wherry.scheme import Group, Row, Scheme, Tensor

ERROR_FACTOR = 4.0  # times the error that a grid of these steps has, at most
ERROR_FLOOR = 0.01  # of the weight's norm: scales rounded to 7 bits, fp16
ERROR_MOST = 0.95  # above it nothing of the original is left
FLOAT_ERROR = 2.0**-8  # rounding to bfloat16
SLOPE_UP, SLOPE_UP_E2 = 0.006, 0.02  # slope above that of rounding: constant, and per squared error
SLOPE_DOWN, SLOPE_DOWN_E2 = 0.010, 0.20  # below
TINY_RANGE = 2.0**-16  # a group of smaller range may become one code: the smallest portable scale is 2^-18
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Comparison:
    """One decoded weight beside its original. All relative to the original's norm."""

    error: float  # ||v - w|| / ||w||
    allowed: float
    slope: float  # <w, v> / <w, w>
    low: float
    high: float

    @property
    def problem(self) -> str:
        """What is wrong, or an empty string."""
        if not self.error <= self.allowed:
            hint = "; it looks like another tensor" if self.error > 1.2 and abs(self.slope) < 0.3 else ""
            return f"error {self.error:.3g} where its scheme allows {self.allowed:.3g}{hint}"
        if not self.low <= self.slope <= self.high:
            return f"scaled by {self.slope:.4f} where {self.low:.4f} to {self.high:.4f} is allowed"
        return ""


def size(scheme: Scheme, shape: tuple[int, ...]) -> int | None:
    """Weights that share one scale, or None for a grain or a kind that is not checked here."""
    if scheme.kind != "int" or scheme.planes != 1 or not shape:
        return None
    if isinstance(scheme.grain, Group):
        return scheme.grain.size if shape[-1] % scheme.grain.size == 0 else None
    if isinstance(scheme.grain, Row):
        return shape[-1]
    return int(np.prod(shape)) if isinstance(scheme.grain, Tensor) else None


def rounded(w: np.ndarray, scheme: Scheme, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain rounding to the grid of each group's range: weights, and the step of each group [groups]."""
    g = w.reshape(-1, group)
    low, high = np.minimum(g.min(-1, keepdims=True), 0), np.maximum(g.max(-1, keepdims=True), 0)
    span = np.float32(scheme.qmax - scheme.qmin)
    step = (2 * np.maximum(-low, high) if scheme.symmetric else high - low) / span
    step = np.where(step > 0, step, 1).astype(np.float32)
    zero = np.float32(0) if scheme.symmetric else np.clip(scheme.qmin - np.rint(low / step), scheme.qmin, scheme.qmax)
    code = np.clip(np.rint(g / step + zero), scheme.qmin, scheme.qmax)
    return ((code - zero) * step).reshape(w.shape), step[:, 0]


def compare(w: np.ndarray, v: np.ndarray, scheme: Scheme | None) -> Comparison:
    """Error and slope of a decoded weight, with what its scheme allows. scheme None: stored as floats."""
    norm = _dot(w, w)
    if norm == 0:
        error = 0.0 if not v.any() else float("inf")
        return Comparison(error, 0.0, 1.0, 1.0, 1.0)
    error, slope = float(np.sqrt(_dot(v - w, v - w) / norm)), _dot(w, v) / norm
    group = size(scheme, w.shape) if scheme else None
    if scheme is None or group is None:
        most = FLOAT_ERROR if scheme is None else ERROR_MOST
        return Comparison(error, most, slope, 1 - most, 1 + most)
    plain, step = rounded(w, scheme, group)
    grid = float(np.sqrt(_dot(step, step) * group / 12 / norm))
    allowed = min(ERROR_MOST, ERROR_FACTOR * grid + ERROR_FLOOR)
    centre, chance = _dot(w, plain) / norm, 2 * error / np.sqrt(w.size)
    low = centre - SLOPE_DOWN - SLOPE_DOWN_E2 * error**2 - chance
    return Comparison(error, allowed, slope, low, centre + SLOPE_UP + SLOPE_UP_E2 * error**2 + chance)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a.ravel().astype(np.float64), b.ravel().astype(np.float64)))


def off_grid(v: np.ndarray, scheme: Scheme, seed: int = 0) -> str:
    """Reason why v cannot be codes of `bits` bits: a group with more values than codes. Looks at 256 rows, seeded."""
    group = size(scheme, v.shape)
    if group is None:
        return ""
    rows = v.reshape(-1, v.shape[-1])
    if len(rows) > SAMPLED_ROWS and not isinstance(scheme.grain, Tensor):
        rows = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:SAMPLED_ROWS])]
    ordered = np.sort(rows.reshape(-1, group), axis=-1)
    distinct = int((np.diff(ordered, axis=-1) != 0).sum(-1).max(initial=0)) + 1
    codes = 1 << scheme.bits
    return f"{distinct} values in one group where {codes} codes exist: it is not quantized" if distinct > codes else ""


def lost_scales(v: np.ndarray, scheme: Scheme, w: np.ndarray | None) -> int | None:
    """Groups that decode to one single value although the original's do not; None when that cannot be known.

    A zero scale makes such a group. Without the original, groups of one value are suspect only if there are any:
    then None.
    """
    group = size(scheme, v.shape)
    if group is None or group == 1:
        return 0
    flat = np.ptp(v.reshape(-1, group), axis=-1) == 0
    if not flat.any():
        return 0
    if w is None:
        return None
    return int((flat & (np.ptp(w.reshape(-1, group), axis=-1) > TINY_RANGE)).sum())
