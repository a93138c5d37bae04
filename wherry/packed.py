"""Packed: Hugging Face folders whose layers are qweight, qzeros and scales: what GPTQ's and AWQ's files share.

One scheme for all layers, named in the `quantization_config` of config.json. Scales are float16, so a portable recipe
is held exactly; embeddings and heads are float16 of exactly the values that their codes mean.
    X.qweight int32, X.qzeros int32, X.scales float16 [groups, n], X.g_idx int32 [k] (GPTQ alone)
Memory: one tensor at a time, read twice: for the header, and for the file.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wherry import cargo, tensorfile
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint, Safetensors, natural
from wherry.errors import Corrupt, Unsupported
from wherry.locate import license_of, name_of
from wherry.recipe import Plan, Progress, roles
from wherry.scheme import PRESETS, QTensor, Row, Scheme
from wherry.task import Task

MAIN = "model.safetensors"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Layout(NamedTuple):
    """One method's way: which schemes, and how a layer is taken apart and put together."""

    name: str
    spellings: tuple[str, ...]
    nearest: str
    parts: Callable[[QTensor], dict[str, torch.Tensor]]
    whole: Callable[[Mapping[str, torch.Tensor], Scheme], QTensor]


def uniform(layout: Layout, checkpoint: Checkpoint, schemes: dict[str, Scheme | None]) -> Scheme:
    """The one scheme of all layers {name: scheme}. Raises Unsupported, with the nearest that the files can say."""
    found = {scheme for scheme in schemes.values() if scheme is not None}
    if checkpoint.graph is not None or not found:
        raise Unsupported(f"{layout.name} holds compressed layers of a Hugging Face model; {checkpoint.name} has none")
    for name in schemes:
        n, k = checkpoint.shape(name)
        if n % 32 or k % 32:
            why = f"{layout.name} packs 32 inputs and outputs together, and {name} is [{n}, {k}]"
            raise Unsupported(f"{why}: leave {layout.name} out; compressed_tensors, the checkpoint, takes any width")
    for scheme in found:
        if replace(scheme, grain=PRESETS["W4A16"].grain) not in [PRESETS[name] for name in layout.spellings]:
            near = f"the nearest that it can is {layout.nearest}" + (" without lowrank" if scheme.rank else "")
            raise Unsupported(f"{layout.name} cannot say the scheme {scheme}; {near}")
    if len(found) > 1:
        raise Unsupported(f"{layout.name} has one scheme for all layers, here are {', '.join(map(str, found))}")
    return found.pop()


def check(layout: Layout, plan: Plan) -> dict[str, str]:
    """Notes per tensor. Raises Unsupported for what the files cannot hold."""
    layers = {row.name: row.scheme for row in plan.rows if row.role == "linear"}
    uniform(layout, plan.checkpoint, layers)
    trials = [row.scheme for trial in plan.trials() for row in trial.rows if row.role == "linear" and row.scheme]
    if len(chosen := sorted(set(map(str, trials)))) > 1:  # it would be found only when all work is done
        choice = f"the recipe chooses among {', '.join(chosen)}"
        raise Unsupported(f"{layout.name} has one scheme for all layers, {choice}: leave {layout.name} out")
    for row in plan.taken():
        if row.step >= 0 and not plan.recipe.steps[row.step].portable:
            raise Unsupported(f"{layout.name} holds scales as float16: leave portable=false out of the recipe")
    said = cargo.unread(plan.config, f"the {layout.name} folder")
    return {plan.rows[0].name: said} if said else {}


def save(
    layout: Layout, checkpoint: Checkpoint, out: Path, config: Callable[[Scheme, list[str]], dict[str, Any]],
    progress: Progress,
) -> Artifact:  # fmt: skip
    """Write the folder `out`. config(scheme, layers left as floats) gives the quantization_config."""
    kinds = {name: role for name, role, _ in roles(checkpoint)}
    layers = {name: checkpoint.scheme(name) for name, role in kinds.items() if role == "linear"}
    scheme = uniform(layout, checkpoint, layers)
    names = checkpoint.names()

    def tensors(name: str) -> dict[str, torch.Tensor]:
        tensor = checkpoint.tensor(name)
        if not isinstance(tensor, QTensor):
            return {name: tensor}
        if kinds[name] == "linear":
            made = layout.parts(tensor)
            if not torch.equal(made["scales"].T.float(), tensor.scale):
                raise Unsupported(f"{name}: float16 does not hold its scales; compress without portable=false")
            return {f"{name.removesuffix('.weight')}.{part}": value for part, value in made.items()}
        half = tensor.decode().half()
        if not torch.equal(half.float(), tensor.decode()):
            raise Unsupported(f"{name}: float16 does not hold {tensor.scheme}; compress with embedding=keep")
        return {name: half}

    entries = {key: (t.dtype, tuple(t.shape)) for name in names for key, t in tensors(name).items()}

    def pieces() -> Iterator[bytes]:
        yield tensorfile.header_bytes(entries, {"format": "pt"})
        for i, name in enumerate(names):
            progress(i, len(names), name)
            for tensor in tensors(name).values():
                yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    tensorfile.write_pieces(out / MAIN, pieces())
    left = [name.removesuffix(".weight") for name, found in layers.items() if found is None]
    text = json.dumps({**checkpoint.config, "quantization_config": config(scheme, left)}, indent=2, sort_keys=True)
    tensorfile.write_pieces(out / "config.json", [text.encode()])
    cargo.beside(checkpoint.path, checkpoint.task, out)
    return Artifact.seal(out, **cargo.facts(checkpoint, layout.name, MAIN))


class Words:
    """A source whose layers lie in such words."""

    def __init__(self, folder: Path, layout: Layout, scheme: Scheme) -> None:
        self.plain, self.layout, self.scheme_of_all = Safetensors(folder), layout, scheme
        have = set(self.plain.names())
        self.layers = {name.removesuffix("qweight") + "weight" for name in have if name.endswith(".qweight")}
        for layer in self.layers:
            lost = [part for part in PARTS[1:3] if self._part(layer, part) not in have]
            if lost:
                raise Corrupt(f"{folder}: {layer} has codes, but no {lost[0]}")
        inner = tuple(f".{part}" for part in PARTS)
        self.own = sorted({name for name in have if not name.endswith(inner)} | self.layers, key=natural)

    def _part(self, name: str, part: str) -> str:
        return name.removesuffix("weight") + part

    def names(self) -> list[str]:
        """All weights, layers in numeric order."""
        return self.own

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight [n, k], also where it is packed."""
        if name not in self.layers:
            return self.plain.shape(name)
        rows, columns = self.plain.shape(self._part(name, "qweight"))
        n = self.plain.shape(self._part(name, "scales"))[1]
        return (n, rows * columns * 32 // self.scheme_of_all.bits // n)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a float weight, or of the scales of a quantized one."""
        return self.plain.dtype(self._part(name, "scales") if name in self.layers else name)

    def scheme(self, name: str) -> Scheme | None:
        """How the weight is stored."""
        return self.scheme_of_all if name in self.layers else None

    def read(self, name: str) -> torch.Tensor | QTensor:
        """One weight: a plain tensor, or a QTensor with unpacked codes."""
        if name not in self.layers:
            return self.plain.read(name)
        names = {part: self._part(name, part) for part in PARTS}
        have = {part: self.plain.read(full) for part, full in names.items() if full in self.plain.where}
        return self.layout.whole(have, self.scheme_of_all)

    def fingerprint(self) -> str:
        """Of the files below."""
        return self.plain.fingerprint()

    def bytes(self) -> int:
        """Of the files below."""
        return self.plain.bytes()


def load(layout: Layout, path: Path, config: dict[str, Any], scheme: Scheme) -> Checkpoint:
    """Open a folder, ours or somebody else's, as a Checkpoint that holds codes."""
    source = Words(path, layout, scheme)
    return Checkpoint(path, config, Task.of(path, config), source, name_of(path), license_of(path))


def scheme_of(path: Path, method: str, bits: Any, size: Any, symmetric: bool) -> Scheme:
    """The scheme that a quantization_config means. Raises Unsupported for widths that are not read."""
    name = f"W{bits}A16" + ("" if symmetric else "_ASYM")
    if bits not in (2, 4, 8) or name not in PRESETS or not isinstance(size, int):
        said = f"quantized by {method}, {bits} bits in groups of {size}"
        raise Unsupported(f"{path} is {said}; 2, 4 and 8 bits are read, in groups of a stated size (group_size)")
    return PRESETS[name].with_group(size)


def decode(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Every weight in float32, one at a time."""
    checkpoint = Checkpoint.open(artifact.path)
    for name in checkpoint.names():
        yield name, checkpoint.weight(name).numpy()


def command(artifact: Artifact) -> list[str]:
    """Copy-paste lines that load the result."""
    return [f"vllm serve {artifact.path}", f"wherry serve {artifact.path}"]


def grain(scheme: Scheme) -> int:
    """group_size as these files say it: -1 for one scale per row."""
    return -1 if isinstance(scheme.grain, Row) else scheme.group_size or -1
