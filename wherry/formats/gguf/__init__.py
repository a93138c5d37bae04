"""GGUF: one file with weights, configuration and tokenizer, for llama.cpp, Ollama and LM Studio.

The same codes as in every other format, in blocks that hold them exactly: Q4_0, Q4_1, Q8_0, TQ2_0.
Reads files of these types and of F16, BF16, F32 as a Checkpoint. Importing this needs no torch.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from wherry.artifact import Artifact
from wherry.formats.gguf.header import Header
from wherry.formats.gguf.names import config_of, norm_lift, order, tensor_names

if TYPE_CHECKING:
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Plan, PlanRow, Progress


def check(plan: "Plan") -> dict[str, str]:
    """Notes per tensor. Raises Unsupported when llama.cpp cannot run this plan exactly, with what it can."""
    from wherry.formats.gguf import write

    return write.check(plan)


def bytes_of(plan: "Plan", row: "PlanRow") -> int:
    """Bytes of one tensor in the file."""
    from wherry.formats.gguf import write

    return write.bytes_of(plan, row)


def besides(plan: "Plan") -> int:
    """Bytes of the file that are no tensor, at most."""
    from wherry.formats.gguf import write

    return write.besides(plan)


def save(checkpoint: "Checkpoint", out: Path, progress: "Progress") -> Artifact:
    """Write one .gguf file and the tokenizer's files into `out`. Memory: one tensor. Cost: one read of the weights."""
    from wherry.formats.gguf import write

    return write.save(checkpoint, out, progress)


def load(path: Path) -> "Checkpoint":
    """Open a .gguf file as a Checkpoint in Hugging Face naming; quantized tensors are decoded to float32."""
    from wherry.formats.gguf import read

    return read.load(path)


def unpacked(path: Path) -> Path:
    """Folder of the configuration and tokenizer of a .gguf file, written into the cache; needs no torch."""
    from wherry.formats.gguf.unpack import unpack

    return unpack(Header(path))[0]


def decode(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight in float32 by the `gguf` package's own reader and decoder, under its Hugging Face name."""
    from wherry.formats.gguf.adapter import added, beside

    header = Header(artifact.main)
    config = config_of(header)
    back = {own: name for name, own in tensor_names(header.arch, config["num_hidden_layers"]).items()}
    read = (
        (tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False))
        for tensor in GGUFReader(artifact.main).tensors
    )
    for own, value in added(read, beside(header)):
        name = back.get(own)
        if name is None:
            continue
        rows = order(header.arch, config, name)
        if lift := norm_lift(header.arch, name):
            value = value - np.float32(lift)
        yield name, value if rows is None else value[np.argsort(rows)]


def command(artifact: Artifact) -> list[str]:
    """Copy-paste lines that load the result."""
    file = artifact.main
    adapter, kept = artifact.manifest.get("adapter"), artifact.manifest.get("kv_cache")
    more = f" --lora {file.with_name(adapter)}" if adapter else ""  # a low-rank correction is part of the model
    if kind := {"int8": "q8_0", "int4": "q4_0"}.get(kept or ""):
        more += f" --cache-type-k {kind} --cache-type-v {kind} --flash-attn on"
    if more:
        return [f"llama-server -m {file}{more} --port 8080", f"wherry serve {artifact.path}"]
    model = re.sub(r"[^a-z0-9._-]+", "-", artifact.name.lower()).strip("-.") or "model"
    return [
        f"llama-server -m {file} --port 8080",
        f"echo 'FROM {file.resolve()}' > Modelfile && ollama create {model} -f Modelfile && ollama run {model}",
        f"wherry serve {artifact.path if artifact.manifest['wherry'] else file}",
    ]


__all__ = ["check", "command", "decode", "load", "save"]
