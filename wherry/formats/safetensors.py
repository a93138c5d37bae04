"""safetensors: a plain Hugging Face folder of float weights, which stock transformers loads: pruned, healed, narrowed.

Only what is float is held; codes belong to compressed_tensors.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherry import cargo, tensorfile
from wherry.artifact import Artifact
from wherry.errors import Unsupported

if TYPE_CHECKING:
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Plan, Progress

MAIN = "model.safetensors"


def check(plan: "Plan") -> dict[str, str]:
    """No notes. Raises Unsupported for a graph, and for weights that are or become codes."""
    if plan.checkpoint.graph is not None:
        raise Unsupported(f"{plan.checkpoint.name} is a graph: its floats are written as onnx")
    if coded := [row.name for row in plan.rows if row.scheme]:
        said = f"safetensors holds floats, and {coded[0]} is stored as codes"
        raise Unsupported(f"{said}: leave it out, the checkpoint holds them")
    return {}


def write(out: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write config.json and model.safetensors into the folder `out`: all that stock transformers needs of a model."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    tensorfile.write_pieces(out / "config.json", [json.dumps(plain, indent=2, sort_keys=True).encode()])
    tensorfile.write(out / MAIN, tensors, {"format": "pt"})


def save(checkpoint: "Checkpoint", out: Path, progress: "Progress") -> Artifact:
    """Write every weight as it is, in one file; memory: the whole model."""
    tensors = {}
    for i, name in enumerate(checkpoint.names()):
        progress(i, len(checkpoint.names()), name)
        if checkpoint.scheme(name) is not None:
            raise Unsupported(f"safetensors holds floats, and {name} is stored as codes: take compressed_tensors")
        tensors[name] = checkpoint.tensor(name)
    cargo.beside(checkpoint.path, checkpoint.task, out)
    write(out, checkpoint.config, tensors)
    return Artifact.seal(out, **cargo.facts(checkpoint, "safetensors", MAIN))


def decode(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Every tensor in float32, read by the safetensors library."""
    from safetensors import safe_open

    for file in sorted(artifact.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as found:
            for name in found.keys():
                yield name, found.get_tensor(name).float().numpy()


def command(artifact: Artifact) -> list[str]:
    """Copy-paste lines that load the result."""
    kind = "AutoModelForCausalLM" if artifact.task.kind == "text-generation" else "AutoModel"
    path = artifact.path
    return [f"python -c \"from transformers import {kind} as M; m = M.from_pretrained('{path}')\"",
            f"wherry serve {path}"]  # fmt: skip


__all__ = ["check", "command", "decode", "save", "write"]
