"""A GGUF file as a Checkpoint: weights under their Hugging Face names, decoded to float one at a time."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from wherry.checkpoint import Checkpoint, natural
from wherry.errors import Unsupported
from wherry.formats.gguf import adapter
from wherry.formats.gguf.header import Header
from wherry.formats.gguf.names import ROPE_FREQS, norm_lift, order, tensor_names
from wherry.formats.gguf.unpack import unpack
from wherry.task import Task

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0", "MXFP4")


class GgufSource:
    """Tensors of one file. Memory: one tensor; nothing is mapped.

    Raises:
        Unsupported: a tensor of a type, or with a name, that is not read; says which.
    """

    def __init__(self, header: Header, config: dict[str, Any]) -> None:
        self.header, self.config = header, config
        back = {own: name for name, own in tensor_names(header.arch, config["num_hidden_layers"]).items()}
        self.where = {}
        for tensor in header.tensors.values():
            if tensor.name == ROPE_FREQS:  # part of the configuration: rope_scaling
                continue
            if tensor.name not in back:
                kind = config["architectures"][0]
                raise Unsupported(f"{header.path}: the tensor {tensor.name} has no place in {kind}")
            if tensor.kind not in FLOATS and tensor.kind not in CODES:
                known = ", ".join((*CODES, *FLOATS))
                raise Unsupported(
                    f"{header.path}: {tensor.name} is {tensor.kind}, which is not read yet; {known} are.\n"
                    f"Give the model's Q8_0 or F16 file, or its Hugging Face folder."
                )
            self.where[back[tensor.name]] = tensor
        thin = adapter.beside(header)
        self.extra = adapter.products(thin) if thin else {}

    def names(self) -> list[str]:
        """All weights, layers in numeric order."""
        return sorted(self.where, key=natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.where[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored; float32 for a weight that is stored in blocks."""
        return FLOATS.get(self.where[name].kind, torch.float32)

    def scheme(self, name: str) -> None:
        """None: blocks are decoded, so that the weights can be compressed anew."""
        return None

    def read(self, name: str) -> torch.Tensor:
        """One weight, rows in Hugging Face's order. Blocks are decoded by the `gguf` package."""
        tensor = self.where[name]
        data = self.header.raw(tensor.name)
        if tensor.kind in FLOATS:
            value = torch.from_numpy(data).view(FLOATS[tensor.kind]).reshape(tensor.shape)
        else:
            blocks = data.reshape(*tensor.shape[:-1], -1)
            value = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[tensor.kind]))
        if tensor.name in self.extra:
            value = (value.double() + torch.from_numpy(self.extra[tensor.name])).float()
        if lift := norm_lift(self.header.arch, name):
            value = value.float() - lift
        rows = order(self.header.arch, self.config, name)
        return value if rows is None else value[torch.from_numpy(np.argsort(rows))]

    def fingerprint(self) -> str:
        """Header, size and time of change."""
        stat = self.header.path.stat()
        return hashlib.sha256(f"{self.header.digest} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()

    def bytes(self) -> int:
        """Size of the file."""
        return self.header.size


def load(path: Path) -> Checkpoint:
    """Open a .gguf file; configuration and tokenizer are unpacked into the cache."""
    header = Header(path)
    folder, config = unpack(header)
    source = GgufSource(header, config)
    data = header.metadata
    stem = re.sub(r"[-._](I?Q\d\w*|B?F16|F32)$", "", path.stem, flags=re.IGNORECASE)
    name = data.get("general.name", stem) if "wherry.version" in data else stem
    kinds = sorted({t.kind for t in source.where.values() if t.kind in CODES})
    origin = f"{path.name}, decoded from {', '.join(kinds)}" if kinds else path.name
    return Checkpoint(folder, config, Task.of(folder, config), source, name, data.get("general.license", ""), origin)
