"""Observe: the range of every edge of a graph that will be rounded, from calibration batches run in ONNX Runtime.

minmax      all that was seen
percentile  what is left when 0.001% of the values are cut off at each end
mse         the range with the least squared error of rounding and clipping together
entropy     the range whose rounded distribution is nearest, in KL, to the one seen

Idea:   two passes over the batches: extremes, then a histogram of 2048 bins between them; all ranges are found on
        the histogram. Ranges hold 0, which is then a code of its own (padding and ReLU stay exact).
Source: Jacob et al. 2018, arXiv:1712.05877; Migacz 2017, 8-bit inference with TensorRT (entropy); Wu et al. 2020,
        arXiv:2004.09602 (comparison of the four).
Shapes: batches [{input: array}], all values of an edge together, whatever its axes.
Cost:   two runs of the float graph per batch; memory: the edges of one batch, and 16 KiB per edge.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx

from wherry.errors import BadInput, Diverged

BINS = 2048
TAIL = 1e-5
SHRINKS = np.linspace(1.0, 0.3, 57)
OBSERVERS = ("mse", "minmax", "percentile", "entropy")
Batches = Sequence[dict[str, np.ndarray]]


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


def observe(
    model: Path, edges: Sequence[str], batches: Batches, histograms: bool,
    means: dict[str, int] | None = None, progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Seen:  # fmt: skip
    """Run the batches and look at the edges.

    Args:
        model: file of the float graph. edges: names of values. batches: its inputs.
        histograms: also make the second pass.
        means: {edge: axis} of which the mean of every channel is wanted too.
        progress: called as progress(done, total, text).
    """
    session, names = exposing(model, edges)
    seen = Seen()
    rounds = 2 if histograms else 1
    for turn in range(rounds):
        for i, batch in enumerate(batches):
            progress(turn * len(batches) + i, rounds * len(batches), "calibrating")
            for name, x in zip(names, run(session, names, batch), strict=True):
                if turn == 0:
                    seen.extremes(name, x)
                    if means and name in means:
                        channels = np.moveaxis(x, means[name], -1).reshape(-1, x.shape[means[name]])
                        seen.sums[name] = seen.sums.get(name, 0) + channels.sum(0, dtype=np.float64)
                        seen.tokens[name] = seen.tokens.get(name, 0) + len(channels)
                else:
                    seen.count(name, x)
    return seen


def exposing(model: Path, edges: Sequence[str]) -> tuple[object, list[str]]:
    """A session of the graph whose outputs are the given edges; graph inputs are among them as they are fed."""
    import onnxruntime

    proto = onnx.load(model, load_external_data=False)
    inputs = {value.name for value in proto.graph.input}
    names = [name for name in dict.fromkeys(edges) if name not in inputs]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    file = model.with_name(f".{model.name}.observed")
    file.write_bytes(proto.SerializeToString())
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    finally:
        file.unlink()
    return session, [*names, *(name for name in dict.fromkeys(edges) if name in inputs)]


def run(session: object, names: Sequence[str], batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Values of the edges for one batch. Raises BadInput when the inputs do not fit."""
    wanted = [value.name for value in session.get_inputs()]  # type: ignore[attr-defined]
    if missing := [name for name in wanted if name not in batch]:
        raise BadInput(f"the calibration data lack the input '{missing[0]}'; they have: {', '.join(batch)}")
    try:
        found = session.run([n for n in names if n not in batch], {n: batch[n] for n in wanted})  # type: ignore[attr-defined]
    except Exception as error:  # the wheel's kinds have no common base but Exception
        shapes = ", ".join(f"{name} {batch[name].dtype} {list(batch[name].shape)}" for name in wanted)
        raise BadInput(
            f"the graph does not take the calibration data: {shapes}\n{' '.join(str(error).split())[:200]}"
        ) from error
    return [*found, *(batch[name] for name in names if name in batch)]
