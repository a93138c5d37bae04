"""Low-rank corrections as a LoRA adapter: a GGUF file beside the model, which llama.cpp adds as B (A x).

Layout: X.lora_a [rank, k] and X.lora_b [n, rank] in F16, which holds them exactly; rows of b in GGUF's order.
    adapter.lora.alpha is 0: then llama.cpp scales by 1, whatever rank each weight has.
The model's file names its adapter under `wherry.adapter`: without it the weights are others.
Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType

from wherry.errors import Corrupt, Missing
from wherry.formats.gguf.header import Header
from wherry.formats.gguf.names import order

if TYPE_CHECKING:  # what has been exported is run without torch
    from wherry.checkpoint import Checkpoint

KEY = "wherry.adapter"
SIDES = (".lora_a", ".lora_b")


def corrected(checkpoint: "Checkpoint") -> list[str]:
    """Names of the weights that have a correction."""
    schemes = {name: checkpoint.scheme(name) for name in checkpoint.names()}
    return [name for name, scheme in schemes.items() if scheme is not None and scheme.rank]


def write(checkpoint: "Checkpoint", arch: str, names: dict[str, str], path: Path) -> None:
    """Write the corrections of a checkpoint. names: {Hugging Face: GGUF}. Memory: all of them, a few percent of it."""
    writer = GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_name(f"{checkpoint.name}, low-rank correction")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name in corrected(checkpoint):
        tensor: Any = checkpoint.tensor(name)
        rows = order(arch, checkpoint.config, name)
        left, right = tensor.left.half().numpy(), tensor.right.half().numpy()
        for side, value in zip(SIDES, (right, left if rows is None else left[rows]), strict=True):
            kind = GGMLQuantizationType.F16
            writer.add_tensor(names[name] + side, np.ascontiguousarray(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def beside(header: Header) -> Path | None:
    """The adapter that a model's file names, or None. Raises Corrupt for a name elsewhere, Missing when it is gone."""
    name = header.metadata.get(KEY)
    if not name:
        return None
    if Path(str(name)).name != name:
        raise Corrupt(f"{header.path} names an adapter outside of its folder: {name}")
    path = header.path.parent / str(name)
    if not path.is_file():
        raise Missing(f"{header.path.name} is run with its correction {name}, which is not beside it: copy both files")
    return path


def products(path: Path) -> dict[str, np.ndarray]:
    """{GGUF name of the weight: B A in float64} by the `gguf` package's own reader."""
    found = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(path).tensors}
    out = {}
    for name in found:
        if name.endswith(SIDES[0]):
            weight = name.removesuffix(SIDES[0])
            if weight + SIDES[1] not in found:
                raise Corrupt(f"{path} has no lora_b for {weight}")
            out[weight] = found[weight + SIDES[1]].astype(np.float64) @ found[name].astype(np.float64)
    return out


def added(pairs: Iterator[tuple[str, np.ndarray]], path: Path | None) -> Iterator[tuple[str, np.ndarray]]:
    """Weights under GGUF names with what the adapter adds to them."""
    extra = products(path) if path is not None else {}
    for name, value in pairs:
        yield name, (value + extra[name]).astype(np.float32) if name in extra else value
