"""ONNX in half precision: a float graph whose weights and arithmetic are float16, inputs and outputs float32.

Half the bytes, for GPUs and NPUs that compute in it; on a CPU ONNX Runtime converts back and gains nothing but space.
Source: onnxruntime.transformers.float16, part of the onnxruntime package.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wherry import cargo
from wherry.artifact import Artifact
from wherry.cargo import command
from wherry.errors import Diverged, Unsupported

if TYPE_CHECKING:
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Plan, Progress

MAIN = "model.onnx"
MOST, LEAST = 65504.0, 6e-8  # the largest float16, and the least that is not 0
DIFFERENCE_MOST = 0.02  # relative RMS to the float32 graph: fp16 has 11 bits


def check(plan: "Plan") -> dict[str, str]:
    """No notes. Raises Unsupported for what is no graph model, or no float one."""
    import onnxruntime  # noqa: F401

    if plan.checkpoint.graph is None:
        raise Unsupported(f"onnx-half takes graph models: wherry capture {plan.checkpoint.path} -o GRAPH first")
    if plan.checkpoint.graph.quantized or any(row.scheme for row in plan.rows):
        raise Unsupported("onnx-half takes the float graph: what is quantized is smaller already; use onnx")
    return {}


def save(checkpoint: "Checkpoint", out: Path, progress: "Progress") -> Artifact:
    """Write the float16 graph into the empty folder `out`, reload it, compare.

    Raises Diverged when it computes something else: an activation beyond 65504 is infinite in float16.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from wherry.graph import edit, source, whole

    if checkpoint.graph.quantized:
        raise Unsupported("onnx-half takes the float graph: what is quantized is smaller already; use onnx")
    progress(0, 2, "convert")
    plain = out / "float.onnx"
    edit.write(checkpoint.graph.copy().model, plain)
    for name, value in checkpoint.graph.model.graph.initializers.items():
        array = source.constant(value)
        if array.dtype.kind == "f" and float(np.abs(array).max(initial=0)) > MOST:
            raise Diverged(f"{name} holds {float(np.abs(array).max()):.3g}, beyond float16's {MOST:g}; keep float32")
    half = convert_float_to_float16(onnx.load(plain), keep_io_types=True, max_finite_val=MOST, min_positive_val=LEAST)
    for file in out.glob("float.onnx*"):
        file.unlink()
    onnx.save(half, out / MAIN, save_as_external_data=half.ByteSize() > 1 << 28, location=f"{MAIN}.data")
    cargo.beside(checkpoint.path, checkpoint.task, out)
    progress(1, 2, "reload and compare")
    manifest = whole.manifest(checkpoint, [], []) | {"half": True}
    made, original = whole.session(out / MAIN), whole.session(checkpoint.graph.path)
    runs = (lambda feeds: original.run(None, feeds), lambda feeds: made.run(None, feeds))
    manifest["checks"] = [whole.agree(Artifact(out, manifest), *runs, DIFFERENCE_MOST, "float32 || float16")]
    return Artifact.seal(out, **manifest)


def decode(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    """Nothing: what it computes was compared with the float32 graph."""
    return iter(())


__all__ = ["check", "command", "decode", "save"]
