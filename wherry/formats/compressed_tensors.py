"""compressed-tensors: a Hugging Face folder that stock transformers, vLLM and SGLang load.

This is also how a compressed Checkpoint lies on disk: packed codes, scales, zero points, and a
`quantization_config` in config.json. Source: compressed-tensors 0.20 (formats pack-quantized, int-quantized).
    X.weight_packed       int32, codes packed densely (ops/pack.py)         pack-quantized, up to 8 bits
    X.weight              int8, codes as they are                           int-quantized (W8A8)
    X.weight_scale        float16, or float32 for 8 bits: what keeps scale * (code - zero) exact
    X.weight_zero_point   int32, packed along the outputs                   asymmetric only
    X.weight_shape        int64 [2]
    X.input_scale, X.input_zero_point                                       static activations only
The embedding and the head, which transformers cannot load as shared codes, are float16 of exactly the values
that their 8-bit codes mean; the scales that give the codes back are in `embedding-scales.safetensors`.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch

from wherry import cargo
from wherry.artifact import MANIFEST, Artifact
from wherry.checkpoint import Checkpoint, Safetensors, natural
from wherry.errors import Corrupt, Unsupported
from wherry.locate import license_of, name_of
from wherry.ops import layout
from wherry.ops.grid import encode as encode_by
from wherry.recipe import Plan, PlanRow, Progress
from wherry.scheme import QTensor, Scheme
from wherry.task import Task
from wherry.tensorfile import TensorFile

TABLES, TABLE_SCALE = "embedding-scales.safetensors", ".embedding_scale"
PARTS = (
    "weight", "weight_packed", "weight_blocks", "weight_scale", "weight_global_scale", "weight_zero_point",
    "weight_shape", "input_scale", "input_zero_point", "weight_left", "weight_right",
)  # fmt: skip


def check(plan: Plan) -> dict[str, str]:
    """Notes per tensor. Raises Unsupported when compressed-tensors has no words for a scheme."""
    for row in plan.taken():
        assert row.scheme
        if row.role == "linear":
            layout.words(row.scheme)
    return {}


def bytes_of(plan: Plan, row: PlanRow) -> int:
    """Bytes of one tensor in the file, as `encode` and `encode_table` will lay it out."""
    scheme = row.scheme
    if scheme is None:
        return row.after
    if row.role != "linear":
        return row.after + 2 * math.prod(row.shape[:-1]) * scheme.scales_per_row(row.shape[-1])
    portable = row.step < 0 or plan.recipe.steps[row.step].portable
    return layout.bytes_of(scheme, row.shape, 2 if scheme.bits <= 4 and portable else 4)


def besides(plan: Plan) -> int:
    """Bytes of the files that are no tensor, at most: the headers, with a name and 110 bytes for each part."""
    return sum((5 if row.scheme else 1) * (len(row.name) + 140) for row in plan.rows)


def stock(plan: Plan) -> dict[str, str]:
    """Notes where stock transformers (5.23) does not load the checkpoint, one for each scheme that stands in the way.

    It loads packed zero points only where all layers have one scheme, and knows nothing of wherry's own layout.
    """
    first: dict[Scheme, str] = {}
    for row in (row for trial in (*plan.trials(), plan) for row in trial.rows if row.role == "linear"):
        scheme = row.scheme or plan.checkpoint.scheme(row.name)
        if scheme:
            first.setdefault(scheme, row.name)
    notes = {}
    for scheme, name in first.items():
        if layout.form(scheme) == "wherry":
            notes[name] = f"{scheme} has wherry's layout: wherry loads this checkpoint, stock transformers does not"
        elif layout.form(scheme) == "pack-quantized" and not scheme.symmetric and len(first) > 1:
            notes[name] = (
                f"{scheme} beside other schemes: wherry and compressed-tensors load this checkpoint, stock transformers"
                " does not; it does with symmetric schemes, or with one scheme for all"
            )
    return notes


def encode(name: str, tensor: torch.Tensor | QTensor) -> dict[str, torch.Tensor]:
    """The tensors that hold one weight on disk. A plain tensor is itself."""
    if not isinstance(tensor, QTensor):
        return {name: tensor}
    layer = name.removesuffix(".weight")
    return {f"{layer}.{part}": value for part, value in layout.parts(tensor).items()}


def encode_table(name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
    """An embedding or a head as exact float16, and its scales.

    Raises Corrupt when float16 does not hold the values (a fault of the caller: the scales must be `coarse`).
    """
    decoded = tensor.decode()
    half, scale = decoded.half(), tensor.scale.half()
    if not torch.equal(half.float(), decoded) or not torch.equal(scale.float(), tensor.scale):
        raise Corrupt(f"{name}: float16 does not hold the values of {tensor.scheme} exactly")
    return {name: half, name.removesuffix(".weight") + TABLE_SCALE: scale}


def quantization_config(schemes: dict[str, Scheme], others: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for {layer name: scheme}; others are Linear layers left alone."""
    groups: dict[str, Any] = {}
    formats = []
    for i, scheme in enumerate(dict.fromkeys(schemes.values())):
        layers = [name for name, own in schemes.items() if own == scheme]
        form = layout.form(scheme)
        formats.append(form)
        words = {"weights": {"scheme": str(scheme)}} if form == "wherry" else layout.words(scheme)
        groups[f"group_{i}"] = {
            "targets": [f"re:^{pattern}$" for pattern in patterns(layers)],
            **words,
            "output_activations": None,
            "format": form,
        }
    return {
        "quant_method": "wherry" if "wherry" in formats else "compressed-tensors",
        "format": (formats or ["dense"])[0] if len(set(formats)) < 2 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": others,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # transformers 5 loads packed zero points only in this way, and only when there is one group
        **({"dequantize": True} if len(groups) == 1 and not next(iter(schemes.values())).symmetric else {}),
    }


def scheme_of(group: dict[str, Any]) -> Scheme:
    """The scheme of a config group, ours or in compressed-tensors' words."""
    own = group["weights"].get("scheme")
    return Scheme.parse(own) if own else layout.from_words(group)


def patterns(layers: list[str]) -> list[str]:
    """A short list of regular expressions that match exactly these names: runs of layer numbers are joined."""
    numbers: dict[str, list[str]] = {}
    for name in layers:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        key = f"{re.escape(match[1])}%{re.escape(match[3])}" if match else re.escape(name)
        numbers.setdefault(key, []).append(match[2] if match else "")
    sets: dict[tuple[str, ...], list[str]] = {}
    for key, found in numbers.items():
        sets.setdefault(tuple(found), []).append(key)
    return [
        key.replace("%", f"({'|'.join(found)})") if found != ("",) else key
        for found, keys in sets.items()
        for key in keys
    ]


class Packed:
    """A source whose weights are (partly) codes in compressed-tensors' layout."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.plain = Safetensors(folder)
        have = set(self.plain.names())
        try:
            groups = [(list(group["targets"]), scheme_of(group)) for group in config.get("config_groups", {}).values()]
        except (KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{folder}: config.json has a junk quantization_config ({error!r})") from error
        ignore = config.get("ignore") or []
        self.schemes: dict[str, Scheme] = {}
        for name in have:
            if name.endswith((".weight_scale", ".weight_blocks")):
                layer = name.rpartition(".")[0]
                kind = "Embedding" if "embed" in layer else "Linear"
                fits = [s for targets, s in groups if any(meant(t, layer, kind) for t in targets)]
                if not fits or any(meant(t, layer, "") for t in ignore):
                    raise Corrupt(f"{folder}: {layer} has codes, but its quantization_config names no scheme for it")
                self.schemes[f"{layer}.weight"] = fits[0]
        self.tables: dict[str, torch.Tensor] = {}
        if (folder / TABLES).exists():
            file = TensorFile(folder / TABLES)
            for name, spelling in file.metadata.items():
                self.schemes[name] = Scheme.parse(spelling)
                self.tables[name] = file.read(name.removesuffix(".weight") + TABLE_SCALE).float()
        parts = tuple(f".{part}" for part in PARTS[1:])
        self.own = sorted({n for n in have if not n.endswith(parts)} | set(self.schemes), key=natural)

    def names(self) -> list[str]:
        """All weights, layers in numeric order."""
        return self.own

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight, also where it is packed."""
        if name.removesuffix("weight") + "weight_shape" in self.plain.where:
            return tuple(self.plain.read(name.removesuffix("weight") + "weight_shape").tolist())
        if name in self.plain.where:
            return self.plain.shape(name)
        layer = name.removesuffix("weight")
        part = "weight_packed" if f"{layer}weight_packed" in self.plain.where else "weight_blocks"
        return layout.shape(part, self.plain.shape(layer + part), self.schemes[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a float weight, or of the scales of a quantized one."""
        if name not in self.schemes or name in self.tables:
            return self.plain.dtype(name)
        return torch.float32 if f"{name}_scale" not in self.plain.where else self.plain.dtype(f"{name}_scale")

    def scheme(self, name: str) -> Scheme | None:
        """How the weight is stored."""
        return self.schemes.get(name)

    def read(self, name: str) -> torch.Tensor | QTensor:
        """One weight: a plain tensor, or a QTensor with unpacked codes."""
        if name not in self.schemes:
            return self.plain.read(name)
        if name in self.tables:
            return encode_by(self.plain.read(name), self.schemes[name], self.tables[name], None)
        return restore(name, self.schemes[name], self.plain.where, self.plain.read)

    def fingerprint(self) -> str:
        """Of the files below."""
        return self.plain.fingerprint()

    def bytes(self) -> int:
        """Of the files below."""
        return self.plain.bytes()


def restore(name: str, scheme: Scheme, have: Container[str], read: Callable[[str], torch.Tensor]) -> QTensor:
    """The codes of one weight from the parts that `encode` wrote; `read` gives a part by its name.

    Raises Corrupt when a part is missing or is not of the scheme's shape.
    """
    layer = name.removesuffix(".weight")
    parts = {part: read(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in have}
    try:
        return layout.whole(parts, scheme)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise Corrupt(f"{name}: its parts {', '.join(parts)} do not make a weight in {scheme} ({error})") from error


def restore_table(name: str, scheme: Scheme, read: Callable[[str], torch.Tensor]) -> QTensor:
    """The codes of an embedding or a head from what `encode_table` wrote."""
    return encode_by(read(name), scheme, read(name.removesuffix(".weight") + TABLE_SCALE).float(), None)


def meant(target: str, layer: str, kind: str) -> bool:
    """Whether a target of a config group (class name, layer name, or `re:` pattern) means this layer."""
    if target.startswith("re:"):
        try:
            return re.match(target[3:], layer) is not None
        except re.error as error:
            raise Corrupt(f"quantization_config has '{target}', which is no regular expression: {error}") from error
    return target in (layer, kind)


def load(path: Path) -> Checkpoint:
    """Open a compressed-tensors folder, ours or somebody else's, as a Checkpoint that holds codes."""
    config = json.loads((path / "config.json").read_text(encoding="utf8"))
    checkpoint = Checkpoint(
        path,
        config,
        Task.of(path, config),
        Packed(path, config["quantization_config"]),
        name_of(path),
        license_of(path),
    )
    if (path / MANIFEST).exists():
        manifest = Artifact.open(path).manifest
        if lost := {"plan", "recipe", "model", "source", "license"} - manifest.keys():
            raise Corrupt(f"{path / MANIFEST} says nothing of {', '.join(sorted(lost))}; get it again")
        checkpoint.plan, checkpoint.recipe = manifest["plan"], manifest["recipe"]
        checkpoint.name, checkpoint.origin = manifest["model"], manifest["source"]
        checkpoint.license = manifest["license"] or checkpoint.license
    return checkpoint


def save(checkpoint: Checkpoint, out: Path, progress: Progress) -> Artifact:
    """A compressed checkpoint is this format already; this copies it file by file."""
    if not isinstance(checkpoint.source, Packed):
        raise Unsupported(f"{checkpoint.name} is not compressed: wherry compress it first")
    files = [file.path for file in checkpoint.source.plain.files]
    tables = checkpoint.path / TABLES
    index = checkpoint.path / "model.safetensors.index.json"
    for i, file in enumerate([*files, checkpoint.path / "config.json", *filter(Path.exists, (index, tables))]):
        progress(i, len(files) + 1, file.name)
        shutil.copyfile(file, out / file.name)
    cargo.beside(checkpoint.path, checkpoint.task, out)
    return Artifact.seal(out, **cargo.facts(checkpoint, "compressed_tensors", files[0].name))


def decode(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Every weight in float32 by compressed-tensors' own decompressor, one at a time."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((artifact.path / "config.json").read_text(encoding="utf8"))["quantization_config"]
    source = Packed(artifact.path, config)
    for name in source.names():
        scheme = source.scheme(name)
        if scheme is None or name in source.tables:
            yield name, source.plain.read(name).float().numpy()
            continue
        layer = name.removesuffix(".weight")
        form = layout.form(scheme)
        if form == "wherry":  # nobody else reads it
            yield name, source.read(name).decode().numpy()  # type: ignore[union-attr]
            continue
        group = layout.words(scheme)
        state = {
            part: source.plain.read(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in source.plain.where
        }
        if form in ("pack-quantized", "int-quantized", "float-quantized"):
            state["weight_scale"] = state["weight_scale"].float()
        foreign = QuantizationScheme(targets=["Linear"], **group)
        plain = BaseCompressor.get_value_from_registry(form).decompress(state, foreign)
        yield name, plain["weight"].float().numpy()


def command(artifact: Artifact) -> list[str]:
    """Copy-paste lines that load the result; what lies in wherry's own layout, wherry alone loads."""
    said = {row.get("scheme") for row in artifact.manifest["plan"] if row.get("role") == "linear"}
    if any(layout.form(Scheme.parse(spelling)) == "wherry" for spelling in said if spelling):
        return [f"wherry serve {artifact.path}"]
    kind = "AutoModelForCausalLM" if artifact.task.kind == "text-generation" else "AutoModel"
    path = artifact.path
    lines = [f"python -c \"from transformers import {kind} as M; m = M.from_pretrained('{path}', dtype='float32')\""]
    if artifact.task.kind == "text-generation":
        lines.append(f"vllm serve {path}")
    return [*lines, f"wherry serve {path}"]
