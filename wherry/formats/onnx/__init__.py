"""ONNX: MatMulNBits for language models (onnxruntime-genai loads it), int8 products for sentence encoders.

One folder: model.onnx and model.onnx.data, config and tokenizer, and genai_config.json for a language model. The codes
are the checkpoint's, bit for bit; scales are float32, because ONNX Runtime's CPU operators want the activations' type.

`activations` of a save, kept in the manifest:
    "float32"   (the default) nothing is rounded that the plan does not round. 4 bits and less: accuracy level 0;
                8 bits: int8 in two halves, about 16 bits (graph.halve)
    "int8"      accuracy level 4: each block of an input is rounded to int8. Faster to decode, slower to prefill,
                and another model: 5e-3 nats per token on SmolLM2-135M at W4
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wherry import cargo
from wherry.artifact import Artifact
from wherry.errors import BadInput, Missing

if TYPE_CHECKING:  # what has been exported is decoded and run without torch
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Plan, PlanRow, Progress

MAIN = "model.onnx"


def check(plan: "Plan") -> dict[str, str]:
    """Notes per tensor name.

    Raises:
        Unsupported: an architecture, or a tensor's scheme, that cannot be written; names the nearest that can.
        Missing: a package that writing needs is not installed.
    """
    from wherry.formats.onnx import legal

    packages("" if plan.checkpoint.graph is not None else plan.task.kind)
    return legal.graph(plan) if plan.checkpoint.graph is not None else legal.check(plan)


def bytes_of(plan: "Plan", row: "PlanRow") -> int:
    """Bytes of one tensor in the file."""
    from wherry.formats.onnx import legal

    return legal.bytes_of(plan, row)


def besides(plan: "Plan") -> int:
    """Bytes of the file that are no tensor, at most."""
    from wherry.formats.onnx import legal

    return legal.besides(plan)


def packages(task: str) -> None:
    """Raise Missing, with the pip line, when a package that writing needs is not installed."""
    wanted = ["onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai" if task == "text-generation" else "onnxscript"]
    if absent := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise Missing(f"formats/onnx writes with {', '.join(absent)}, not installed.\npip install 'wherry[onnx]'")


def save(
    checkpoint: "Checkpoint", out: Path, progress: "Progress", activations: Literal["float32", "int8"] = "float32"
) -> Artifact:
    """Write the checkpoint (codes or floats) as ONNX into the empty folder `out`, reload it, check it, and seal it.

    Raises:
        Unsupported: the architecture or a scheme; see `check`.
        Corrupt, Diverged: the file did not pass its checks.
    """
    packages("" if checkpoint.graph is not None else checkpoint.task.kind)
    if checkpoint.graph is not None:
        return copied(checkpoint, out)
    from wherry.formats.onnx import decoder, encoder, proof

    if activations not in ("float32", "int8"):
        raise BadInput(f"activations={activations} is not float32 or int8")
    exact, generator = activations == "float32", checkpoint.task.kind == "text-generation"
    progress(0, 3, "tokenizer")
    cargo.beside(checkpoint.path, checkpoint.task, out)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf8")
    progress(1, 3, "graph and weights")
    (decoder if generator else encoder).build(checkpoint, out, exact)
    progress(2, 3, "reload and compare")
    checks, plan = proof.holds(checkpoint, out / MAIN)
    if generator:
        checks += proof.generator(checkpoint, out / MAIN, exact)
    else:
        checks += proof.encoder(checkpoint, out / MAIN, exact)
        if integers := proof.integer_layers(checkpoint):
            checks += proof.fused(out / MAIN, integers)
    more = {"plan": plan, "activations": activations, "checks": checks}
    return Artifact.seal(out, **cargo.facts(checkpoint, "onnx", MAIN) | more)


def copied(checkpoint: "Checkpoint", out: Path) -> Artifact:
    """A graph is this format already: its file, with its data beside it, as an artifact."""
    from wherry.graph import edit, whole

    edit.write(checkpoint.graph.model, out / MAIN)
    cargo.beside(checkpoint.path, checkpoint.task, out)
    return Artifact.seal(out, **whole.manifest(checkpoint, checkpoint.plan, []))


def load(path: Path) -> "Checkpoint":
    """Open an .onnx file, or the folder that holds model.onnx, as a Checkpoint with a `graph`. See source.py."""
    packages("")
    from wherry.graph import source

    return source.load(path)


def decode(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Every weight as (Hugging Face name, float32 [n, k]); codes are decoded by ONNX Runtime's own operators."""
    from wherry.graph import foreign

    if artifact.manifest.get("graph"):
        from wherry.graph import whole

        return whole.decode(artifact)
    return foreign.decode(artifact.main)


def command(artifact: Artifact) -> list[str]:
    """Copy-paste lines that load the result."""
    path = artifact.path
    if artifact.task.kind == "text-generation":
        library = (
            f"import onnxruntime_genai as og; m = og.Model('{path}'); t = og.Tokenizer(m); p = og.GeneratorParams(m)"
        )
        lines = [
            f"{library}; p.set_search_options(max_length=64)",
            "g = og.Generator(m, p); g.append_tokens(t.encode('Once'))",
            "while not g.is_done(): g.generate_next_token()",
            "print(t.decode(g.get_sequence(0)))",
        ]
        text = "\\n".join(lines)
        return [f'python -c "$(printf "{text}")"', f"wherry serve {path}"]
    names = ", ".join(f"{name}=..." for name in artifact.task.inputs)
    session = f"onnxruntime.InferenceSession('{artifact.main}')"
    outputs = None if artifact.manifest.get("graph") else ["embedding"]
    return [
        f"python -c \"import onnxruntime; s = {session}\"  # s.run({outputs}, dict({names}))",
        f"wherry serve {path}",
    ]


__all__ = ["check", "command", "decode", "load", "save"]
