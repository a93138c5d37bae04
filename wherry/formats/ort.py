"""ORT: a graph in ONNX Runtime's own format for phones and small builds, with the list of operators that it needs.

model.ort is loaded by every ONNX Runtime, the minimal builds included; required_operators.config is what a build is
made from (build.sh --include_ops_by_config). Optimizations are those of the extended level, fixed when it is written.
Source: onnxruntime.tools.convert_onnx_models_to_ort, part of the onnxruntime package.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wherry import cargo
from wherry.artifact import Artifact
from wherry.cargo import command
from wherry.errors import Unsupported

if TYPE_CHECKING:
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Plan, Progress

MAIN, OPERATORS = "model.ort", "required_operators.config"
DIFFERENCE_MOST = 0.02  # relative RMS to the same graph as ONNX


def check(plan: "Plan") -> dict[str, str]:
    """No notes. Raises Unsupported for what is no graph model; Missing without the package."""
    import onnxruntime  # noqa: F401

    if plan.checkpoint.graph is None:
        raise Unsupported(
            f"ort takes graph models, and {plan.checkpoint.name} is a transformers folder.\n"
            "Draw it first: wherry capture MODEL -o GRAPH"
        )
    return {}


def save(checkpoint: "Checkpoint", out: Path, progress: "Progress") -> Artifact:
    """Write model.ort and the list of operators into the empty folder `out`, reload it, compare.

    Raises:
        Unsupported: ONNX Runtime's converter fails. Diverged: it computes something else.
    """
    from wherry.graph import edit, whole

    progress(0, 2, "convert")
    source = out / "model.onnx"
    edit.write(checkpoint.graph.copy().model, source)
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(source)]
    done = subprocess.run([*command, "--optimization_style", "Fixed"], capture_output=True, text=True, timeout=1800)
    if done.returncode or not (out / MAIN).exists():
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1][:200]
        raise Unsupported(f"ONNX Runtime's converter to .ort failed on {checkpoint.name}: {reason}")
    listed = sorted(out.glob("*required_operators*.config"))[0]
    listed.rename(out / OPERATORS)
    for file in out.iterdir():
        if file.name not in (MAIN, OPERATORS):
            file.unlink()
    cargo.beside(checkpoint.path, checkpoint.task, out)
    progress(1, 2, "reload and compare")
    manifest = whole.manifest(checkpoint, [], [], "ort", MAIN)
    made, original = whole.session(out / MAIN), whole.session(checkpoint.graph.path)
    runs = (lambda feeds: original.run(None, feeds), lambda feeds: made.run(None, feeds))
    same = whole.agree(Artifact(out, manifest), *runs, DIFFERENCE_MOST, "ONNX || ORT format")
    text = (out / OPERATORS).read_text(encoding="utf8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    note = "; ".join(lines)[:400]
    manifest["checks"] = [
        same,
        whole.check("operators needed", sum(len(line.split(";")[-1].split(",")) for line in lines), "", None, note),
    ]
    return Artifact.seal(out, **manifest)


def decode(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    """Nothing: the format keeps no names of weights; what it computes was compared with the ONNX file."""
    return iter(())


__all__ = ["check", "command", "decode", "save"]
