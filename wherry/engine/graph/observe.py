"""Observe: the range of every edge of a graph that will be rounded, from calibration batches run in ONNX Runtime.

How a range is found from what was seen: ops/ranges.py.
Shapes: batches [{input: array}], all values of an edge together, whatever its axes.
Cost:   two runs of the float graph per batch; memory: the edges of one batch, and 16 KiB per edge.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx

from wherry.errors import BadInput
from wherry.ops.ranges import OBSERVERS, Seen

Batches = Sequence[dict[str, np.ndarray]]


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
    inner = [name for name in names if name not in batch]
    try:  # a runtime that is asked for nothing raises
        found = session.run(inner, {n: batch[n] for n in wanted}) if inner else []  # type: ignore[attr-defined]
    except Exception as error:  # the wheel's kinds have no common base but Exception
        shapes = ", ".join(f"{name} {batch[name].dtype} {list(batch[name].shape)}" for name in wanted)
        raise BadInput(
            f"the graph does not take the calibration data: {shapes}\n{' '.join(str(error).split())[:200]}"
        ) from error
    return [*found, *(batch[name] for name in names if name in batch)]


__all__ = ["OBSERVERS", "Seen", "observe"]
