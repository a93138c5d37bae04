"""Folder: a Hugging Face model as a module of its own class, and a changed one as a folder that transformers loads."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wherry import cargo
from wherry.checkpoint import Checkpoint, Safetensors, natural
from wherry.dependency.architecture import build, names
from wherry.errors import Corrupt, Unsupported
from wherry.scheme import Scheme
from wherry.tensorfile import write

PREFIXES = ("model.", "transformer.", "bert.", "vit.")


def module(checkpoint: Checkpoint) -> nn.Module:
    """The whole model in float32 by the class that config.json names, eager attention, eval mode, ties kept.

    Raises Unsupported or Corrupt, as `Checkpoint.module` does.
    """
    if checkpoint.graph is not None:
        raise Unsupported(f"{checkpoint.path} is a graph")
    made = build(checkpoint, checkpoint.config)
    if not written_so(checkpoint, made):
        return checkpoint.converted(type(made))
    if checkpoint.task.kind == "sentence-similarity" and hasattr(made, "pooler"):
        made._modules["pooler"] = None  # sentence encoders pool by themselves
    tensors: dict[str, torch.Tensor] = {}
    for parameter, name in checkpoint.places(made).items():
        if name not in tensors:
            tensors[name] = nn.Parameter(checkpoint.weight(name), requires_grad=False)
        owner, _, leaf = parameter.rpartition(".")
        made.get_submodule(owner)._parameters[leaf] = tensors[name]  # type: ignore[assignment]
    for parameter, left in list(made.named_parameters()):
        if left.is_meta:  # an unused pooler
            owner, _, leaf = parameter.rpartition(".")
            made.get_submodule(owner)._parameters[leaf] = nn.Parameter(torch.zeros(left.shape), requires_grad=False)
    have = set(checkpoint.names())
    for name, buffer in made.named_buffers():
        if name in have:
            buffer.copy_(checkpoint.weight(name))
    return made


def written_so(checkpoint: Checkpoint, made: nn.Module) -> bool:
    """Whether the weights have the module's names; transformers stores experts one by one that it computes in one."""
    try:
        checkpoint.places(made)
    except Corrupt:
        if isinstance(checkpoint.source, Safetensors):
            return False
        raise
    return True


def save(checkpoint: Checkpoint, changed: nn.Module, config: Mapping[str, Any], out: Path) -> None:
    """Write config.json, weights in their dtype and the side files into the folder `out`, which exists and is empty."""
    if not set(located(checkpoint, changed).values()) <= set(checkpoint.names()):
        rewritten: Any = changed
        for key, value in config.items():
            if key not in ("dtype", "torch_dtype", "architectures", "model_type", "transformers_version"):
                setattr(rewritten.config, key, value)
        rewritten.to(checkpoint.source.dtype(checkpoint.names()[0])).save_pretrained(out)
        cargo.beside(checkpoint.path, checkpoint.task, out)
        return
    places = located(checkpoint, changed)
    tensors: dict[str, torch.Tensor] = {}
    state = dict(changed.named_parameters(remove_duplicate=False)) | dict(changed.named_buffers())
    for name, stored in places.items():
        if stored not in tensors:
            dtype = checkpoint.source.dtype(stored) if stored in checkpoint.names() else torch.float32
            tensors[stored] = state[name].detach().to(dtype).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    write(out / "model.safetensors", tensors)
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    (out / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf8")
    cargo.beside(checkpoint.path if checkpoint.path.is_dir() else checkpoint.task.folder, checkpoint.task, out)
    for name in ("preprocessor_config.json",):
        source = checkpoint.path / name
        if source.is_file():
            (out / name).write_bytes(source.read_bytes())


@dataclass
class Expected:
    """A source that is not there yet: shapes and dtypes of a model that will be written."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    stamp: str

    def names(self) -> list[str]:
        """All tensors, layers in numeric order."""
        return sorted(self.shapes, key=natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that the tensor will have."""
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """That of the model it is made from."""
        return self.dtypes[name]

    def scheme(self, name: str) -> Scheme | None:
        """Floats."""
        return None

    def read(self, name: str) -> torch.Tensor:
        """Zeros: the values are not known yet."""
        return torch.zeros(self.shapes[name], dtype=self.dtypes[name])

    def fingerprint(self) -> str:
        """Of the model that it is made from, with the shapes."""
        return hashlib.sha256(f"{self.stamp} {sorted(self.shapes.items())}".encode()).hexdigest()

    def bytes(self) -> int:
        """Size of the weights."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())


def expected(
    checkpoint: Checkpoint, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Checkpoint:
    """The checkpoint that will be written: shapes by names of the module, or of the checkpoint."""
    have, found, dtypes = set(checkpoint.names()), {}, {}
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in have)), "")
    for name, shape in shapes.items():
        stored = next((o for o in (name, prefix + name, name.removeprefix(prefix)) if o in have), None)
        if stored is not None:
            found[stored], dtypes[stored] = tuple(shape), checkpoint.source.dtype(stored)
    if not written_so(checkpoint, build(checkpoint, checkpoint.config)):  # experts one by one, named otherwise
        entries = (*names(config).neurons, *names(config).hidden)
        old = {checkpoint.config[e]: config[e] for e in entries if isinstance(checkpoint.config.get(e), int)}
        for name in have - set(found):
            before = checkpoint.shape(name)
            found[name] = tuple(shapes[name]) if name in shapes else tuple(old.get(n, n) for n in before)
            dtypes[name] = checkpoint.source.dtype(name)
    source = Expected(found, dtypes, checkpoint.source.fingerprint())
    return replace(checkpoint, config=dict(config), source=source)


def located(checkpoint: Checkpoint, changed: nn.Module) -> dict[str, str]:
    """{parameter or stored buffer of the module: name in the checkpoint}."""
    have, prefix = set(checkpoint.names()), getattr(changed, "base_model_prefix", "")
    found, tied = {}, {}
    for name, tensor in changed.state_dict(keep_vars=True).items():
        options = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        match = next((o for o in options if o in have), None)
        if match is None and id(tensor) in tied:
            continue
        if match is None and "pooler" in name:
            continue
        found[name] = match or name
        tied[id(tensor)] = name
    return found
