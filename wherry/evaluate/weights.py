"""Weights: what may be said of one decoded weight: is it on its grid, has a scale been lost, is it still the original?

Idea:   for an integer grid with step D the error of a group is near D^2 / 12 per weight, whatever the method; methods
        that see data (GPTQ) trade more weight error for less output error. So the error e must be below a multiple of
        that. A tensor swapped with another of its shape has e near 1.4. A scaled one hides in the error and shows in
            slope   <w, v> / <w, w>    near that of plain rounding where codes are rounded, near 1 - e^2 where scales
                                       were fitted by least squares; never above rounding's by more than chance
            return  <w, v> / <v, v>    1 for least squares, less for rounding (v is noisier than w); never above 1,
                                       but for what was cut off: so without the ends of each group's range in v
        so scaling up breaks the first, and scaling down the second. A searched range, or one that cuts off one end as
        symmetric codes do, has another slope and return than the whole range. There w is rounded anew to the levels
        of v: scaled levels are as fit for that as true ones, but codes that were chosen for others are not. 2% is seen
        at 4 bits and more; at 2 and 3 bits the methods themselves move the slope by more than that, and the behaviour
        must tell.
Shapes: w (original), v (decoded) float32 [n, k]; groups of `size` neighbouring inputs of a row.
Cost:   a few passes over the tensor in numpy, 5 times its bytes of memory; a sort of it where a scale is in doubt.
Source: Widrow & Kollar 2008, Quantization Noise (D^2 / 12). The multiple is measured: GPTQ with 2, 3, 4 and 8 bits on
        all-MiniLM-L6-v2 and on a seeded Llama had errors up to 2.8 times that of rounding.
"""

from dataclasses import dataclass

import numpy as np

from wherry.scheme import Block, Group, Row, Scheme, Tensor

ERROR_FACTOR = 4.0  # times the error that a grid of these steps has, at most
ERROR_FLOOR = 0.01  # of the weight's norm: scales rounded to 7 bits, fp16
ERROR_MOST = 0.95  # above it nothing of the original is left
FLOAT_ERROR = 2.0**-8  # rounding to bfloat16
PRUNED_MOST = 0.9  # of the weights that stay, where SparseGPT moved them or they were trained again; swapped: 1.4
TUNED_MOST = 0.5  # of a norm's length: the rates of tuning move it by a few hundredths
SLOPE_UP, SLOPE_UP_E2 = 0.004, 0.02  # slope above that of rounding: constant, and per squared error
SLOPE_DOWN, SLOPE_DOWN_E2 = 0.06, 1.0  # below it: least squares gives 1 - e^2, a searched range clips more
RETURN_MOST = 1.006  # of the whole weight, unless the weights that no clipping touched are as after rounding
RETURN_MORE = 0.008  # above that of rounding to the same levels, over weights that no clipping touched
SAME_LEVEL = 1e-4  # of a group's range: values nearer to each other are one level
PORTABLE_BITS = 7  # of a portable scale (ops/grid.py)
PORTABLE = 2.0**-8  # a portable scale may be off by this much, each group on its own
TINY_RANGE = 2.0**-16  # a group of smaller range may become one code: the smallest portable scale is 2^-18
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Comparison:
    """One decoded weight v beside its original w, with what its scheme allows."""

    error: float  # ||v - w|| / ||w||
    error_most: float
    slope: float  # <w, v> / <w, w>
    slope_least: float
    slope_most: float
    back: float  # <w, v> / <v, v>
    back_most: float

    @property
    def problem(self) -> str:
        """What is wrong, or an empty string."""
        if not self.error <= self.error_most:
            hint = "; it looks like another tensor" if self.error > 1.2 and abs(self.slope) < 0.3 else ""
            return f"error {self.error:.3g} where its scheme allows {self.error_most:.3g}{hint}"
        if not self.slope_least <= self.slope <= self.slope_most:
            return f"scaled: slope {self.slope:.4f} where {self.slope_least:.4f} to {self.slope_most:.4f} is allowed"
        if not self.back <= self.back_most:
            return f"scaled down: it takes {self.back:.4f} to get back, where {self.back_most:.4f} is allowed"
        return ""


def size(scheme: Scheme, shape: tuple[int, ...]) -> int | None:
    """Weights that share one scale, or None for a grain or a kind that is not checked here."""
    if scheme.kind != "int" or scheme.planes != 1 or scheme.rank or not shape:
        return None
    if isinstance(scheme.grain, Group):
        over = _over(scheme)  # of a k-quant, so many groups have one scale for their scales
        return scheme.grain.size if shape[-1] % (scheme.grain.size * over) == 0 else None
    if isinstance(scheme.grain, Row):
        return shape[-1]
    if isinstance(scheme.grain, Block):
        fits = len(shape) == 2 and shape[-1] % scheme.grain.columns == 0
        return scheme.rows_per_scale(shape[0]) * scheme.grain.columns if fits else None
    return int(np.prod(shape)) if isinstance(scheme.grain, Tensor) else None


def laid(x: np.ndarray, scheme: Scheme | None) -> np.ndarray:
    """The weights of each tile side by side, [tiles, rows * columns] with zeros for missing rows; else as they are."""
    if scheme is None or not isinstance(scheme.grain, Block) or size(scheme, x.shape) is None:
        return x
    high, wide = scheme.rows_per_scale(len(x)), scheme.grain.columns
    x = np.pad(x, ((0, -len(x) % high), (0, 0)))
    return x.reshape(len(x) // high, high, -1, wide).swapaxes(1, 2).reshape(-1, high * wide)


def sampled(v: np.ndarray, scheme: Scheme, seed: int) -> np.ndarray:
    """Up to 256 rows of v (of its tiles), seeded, in order; all of them where one scale is for all."""
    rows = laid(v, scheme)
    rows = rows.reshape(-1, rows.shape[-1])
    if len(rows) > SAMPLED_ROWS and not isinstance(scheme.grain, Tensor):
        rows = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:SAMPLED_ROWS])]
    return rows


def rounded(w: np.ndarray, scheme: Scheme, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain rounding to the grid of each group's range: weights, and the step of each group [groups].

    A k-quant's minimum is no code: its grid holds both ends of the range, so the slope of normal weights is 1.014 at
    Q2_K, of any size, where integer zeros give 1.004. Its scales and minimums are small integers over an fp16.
    """
    g = w.reshape(-1, group)
    low, high = np.minimum(g.min(-1, keepdims=True), 0), np.maximum(g.max(-1, keepdims=True), 0)
    span = np.float32(scheme.qmax - scheme.qmin)
    step = (2 * np.maximum(-low, high) if scheme.symmetric else high - low) / span
    step = np.where(step > 0, step, 1).astype(np.float32)
    if scheme.nested:
        step = _small(step, scheme)
        least = scheme.qmin * step if scheme.symmetric else -_small(-low, scheme)
        code = np.clip(np.rint((g - least) / np.where(step > 0, step, 1)), 0, span)
        return (code * step + least).reshape(w.shape), step[:, 0]
    zero = np.float32(0) if scheme.symmetric else np.clip(scheme.qmin - np.rint(low / step), scheme.qmin, scheme.qmax)
    code = np.clip(np.rint(g / step + zero), scheme.qmin, scheme.qmax)
    return ((code - zero) * step).reshape(w.shape), step[:, 0]


def _over(scheme: Scheme) -> int:
    """Groups of one super-block, 1 without such."""
    over = scheme.scale.grain if isinstance(scheme.scale, Scheme) else None
    return over.size if isinstance(over, Group) else 1


def _small(value: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Scales or minimums >= 0 [groups, 1], rounded to whole multiples of one fp16 for each super-block."""
    assert isinstance(scheme.scale, Scheme)
    blocks = value.reshape(-1, _over(scheme))
    parts = np.float32(scheme.scale.qmax - (0 if scheme.symmetric else scheme.scale.qmin))
    most = blocks.max(1, keepdims=True)
    unit = np.maximum((most / parts).astype(np.float16), 2.0**-24).astype(np.float32)
    whole = np.where((blocks == most) & (most > 0), parts, np.clip(np.rint(blocks / unit), 0, parts))
    return (whole * unit).reshape(-1, 1)


def compare(w: np.ndarray, v: np.ndarray, scheme: Scheme | None) -> Comparison:
    """Error and scale of a decoded weight, with what its scheme allows. scheme None: stored as floats."""
    norm, length, both = _dot(w, w), _dot(v, v), _dot(w, v)
    if norm == 0:
        return Comparison(0.0 if length == 0 else float("inf"), 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    error, slope, back = float(np.sqrt(_dot(v - w, v - w) / norm)), both / norm, both / length if length else 1.0
    group = size(scheme, w.shape) if scheme else None
    if scheme is None or group is None:
        most = FLOAT_ERROR if scheme is None else ERROR_MOST
        return Comparison(error, most, slope, 1 - most, 1 + most, back, 1 / (1 - most))
    w, v = laid(w, scheme), laid(v, scheme)
    plain, step = rounded(w, scheme, group)
    grid = float(np.sqrt(_dot(step, step) * group / 12 / norm))
    centre = _dot(w, plain) / norm
    chance = 2 * error / np.sqrt(w.size) + PORTABLE / np.sqrt(step.size)
    above = SLOPE_UP + SLOPE_UP_E2 * error**2 + chance
    most, back_most = centre + above, RETURN_MOST + chance
    if slope > most or back > back_most:  # scaled, or cut off at an end: rounding anew to these levels tells
        anew = nearest(w, v, group)
        most = max(centre, _dot(w, anew) / norm) + above if scheme.symmetric else most
        clipped = inside(w, v, group) <= inside(w, anew, group) + RETURN_MORE
        back_most = float("inf") if clipped else back_most
    least = centre - SLOPE_DOWN - SLOPE_DOWN_E2 * error**2 - chance
    return Comparison(error, min(ERROR_MOST, ERROR_FACTOR * grid + ERROR_FLOOR), slope, least, most, back, back_most)


def undone(w: np.ndarray, v: np.ndarray, rounds: int = 4) -> np.ndarray:
    """diag(t) w diag(s), the nearest to v with t, s >= 0: the original as a neighbour's scales may have left it.

    AWQ and SmoothQuant multiply columns, and divide the rows of the layer before. n + k free numbers cannot make one
    random matrix into another: what was swapped keeps an error near 1. One factor for all of v they do follow.
    """
    if w.ndim != 2:
        return w
    w, v = w.astype(np.float64), v.astype(np.float64)
    t = np.ones((len(w), 1))
    both, square = w * v, w * w
    for _ in range(rounds):  # alternating least squares
        s = np.maximum((both * t).sum(0) / np.maximum((square * t * t).sum(0), 1e-30), 0)
        t = np.maximum((both * s).sum(1) / np.maximum((square * s * s).sum(1), 1e-30), 0)[:, None]
    return np.asarray(w * t * s, dtype=np.float32)


def strayed(w: np.ndarray, v: np.ndarray, tuned: bool) -> str:
    """Reason why v is no longer w, a float tensor that was tuned, or divided by scales above 0; else "".

    A norm may compute 1 + w (Gemma): then 1 + v has the sign of 1 + w.
    """
    if tuned:
        norm = float(np.sqrt(_dot(w, w)))
        error = float(np.sqrt(_dot(v - w, v - w))) / norm if norm else 0.0
        return f"error {error:.3g} where tuning may move it by {TUNED_MOST:g}" if error > TUNED_MOST else ""
    wrong = min(int(np.sum(np.sign(w + c) != np.sign(v + c))) for c in (0.0, 1.0))
    lost = int(np.sum((v == 0) & (w != 0)))
    if max(wrong, lost) > w.size / 10:
        return f"{max(wrong, lost)} of {w.size} values changed their sign or are 0: no scales do that"
    return ""


def nearest(w: np.ndarray, v: np.ndarray, group: int) -> np.ndarray:
    """Round w to the levels of v: in each group those from its least to its most, its smallest gap apart.

    Where no two levels of a group are neighbours (wide codes) the gap is some steps, and this rounds more coarsely.
    """
    x, y = w.reshape(-1, group), np.sort(v.reshape(-1, group), axis=-1)
    low, span = y[:, :1], y[:, -1:] - y[:, :1]
    gap = np.diff(y, axis=-1, append=np.inf)
    step = np.where(gap > SAME_LEVEL * span, gap, np.inf).min(-1, keepdims=True)
    step = np.where(np.isfinite(step), step, 1).astype(np.float32)
    return np.asarray(np.clip(np.rint((x - low) / step), 0, np.rint(span / step)) * step + low).reshape(w.shape)


def inside(w: np.ndarray, v: np.ndarray, group: int) -> float:
    """<w, v> / <v, v> over the weights that are not at an end of their group's range: clipping does not move it."""
    x, y = w.reshape(-1, group), v.reshape(-1, group)
    mask = (y < y.max(1, keepdims=True)) & (y > y.min(1, keepdims=True))
    length = _dot(y[mask], y[mask])
    return _dot(x[mask], y[mask]) / length if length else 1.0


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a.ravel().astype(np.float64), b.ravel().astype(np.float64)))


def off_grid(v: np.ndarray, scheme: Scheme, seed: int = 0) -> str:
    """Reason why v cannot be codes of `bits` bits: a group with more values than codes. Looks at 256 rows, seeded."""
    group = size(scheme, v.shape)
    if group is None:
        return ""
    rows = sampled(v, scheme, seed)
    ordered = np.sort(rows.reshape(-1, group), axis=-1)
    distinct = int((np.diff(ordered, axis=-1) != 0).sum(-1).max(initial=0)) + 1
    codes = 1 << scheme.bits
    return f"{distinct} values in one group where {codes} codes exist: it is not quantized" if distinct > codes else ""


def unrounded_scales(v: np.ndarray, scheme: Scheme, seed: int = 0) -> str:
    """Reason why the scales of v are not of 7 significant bits, as every portable recipe rounds them; else "".

    The smallest step between two values of a group is its scale wherever two neighbouring codes are used, which nearly
    all groups of narrow codes do; of wider codes it is some small multiple, so all of these are tried. More than a
    quarter of steps that are none means that scales were changed after they were rounded.
    """
    group = size(scheme, v.shape)
    if group is None or group < (16 if scheme.bits <= 4 else 32) or scheme.nested:
        return ""  # wider codes seldom are neighbours in a small group
    rows = sampled(v, scheme, seed)
    gaps = np.diff(np.sort(rows.reshape(-1, group), axis=-1), axis=-1).astype(np.float64)
    least = np.where(gaps > 0, gaps, np.inf).min(-1)
    least = least[np.isfinite(least)]
    whole = np.zeros(len(least), bool)
    for times in range(1, 1 << (scheme.bits - 1) if scheme.bits > 4 else 2, 2):  # powers of two change no mantissa
        mantissa = np.frexp(least / times)[0] * 2**PORTABLE_BITS
        whole |= mantissa == np.rint(mantissa)
    long = int((~whole).sum())
    if long <= len(least) / 4:
        return ""
    return f"{long} of {len(least)} scales have more than {PORTABLE_BITS} significant bits: they were changed"


def lost_scales(v: np.ndarray, scheme: Scheme, w: np.ndarray | None) -> int | None:
    """Groups that decode to one single value although the original's do not; None when that cannot be known.

    A zero scale makes such a group. Without the original, groups of one value are suspect only if there are any:
    then None.
    """
    group = size(scheme, v.shape)
    if group is None or group == 1:
        return 0
    flat = np.ptp(laid(v, scheme).reshape(-1, group), axis=-1) == 0
    if not flat.any():
        return 0
    if w is None:
        return None
    return int((flat & (np.ptp(laid(w, scheme).reshape(-1, group), axis=-1) > TINY_RANGE)).sum())
