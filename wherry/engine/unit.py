"""Unit: the tensors that are worked on together (one block, or all that lies outside of the blocks), and how they end.

Both gaits end a unit alike: codes in compressed-tensors' layout in one file of the journal, with an error and a
digest for each weight; `assemble` streams all units into the final folder.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wherry import cargo, tensorfile
from wherry.checkpoint import INDEX, Checkpoint, natural, stack
from wherry.errors import Corrupt
from wherry.formats import compressed_tensors
from wherry.journal import Units
from wherry.ops import grid
from wherry.recipe import Pass, Plan, PlanRow
from wherry.scheme import QTensor
from wherry.tensorfile import TensorFile

SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class Unit:
    """key: name in the journal. rows: its tensors. path: the block's module path, or "" outside of the blocks."""

    key: str
    rows: tuple[PlanRow, ...]
    path: str = ""


def units(plan: Plan) -> list[Unit]:
    """The outside first, then the blocks in order."""
    module = plan.checkpoint.skeleton()
    path = stack(module)
    blocks_there = module.get_submodule(path)
    assert isinstance(blocks_there, torch.nn.ModuleList)
    count = len(blocks_there)
    places = plan.checkpoint.places(module)
    home = {weight: parameter for parameter, weight in places.items() if parameter.startswith(f"{path}.")}
    blocks: list[list[PlanRow]] = [[] for _ in range(count)]
    outside = []
    for row in plan.rows:
        if row.name in home:
            blocks[int(home[row.name].removeprefix(f"{path}.").split(".")[0])].append(row)
        else:
            outside.append(row)
    width = len(str(count))
    inner = [Unit(f"block-{i:0{width}}", tuple(rows), f"{path}.{i}") for i, rows in enumerate(blocks)]
    return [Unit("outside", tuple(outside)), *inner]


def digest(weight: torch.Tensor) -> str:
    """First 16 hex digits of the sha256 of a weight's float32 bytes, little endian, row by row."""
    return hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest()[:16]


def sound(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself. Raises Corrupt when it holds NaN or inf."""
    if tensor.is_floating_point():
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            raise Corrupt(
                f"{name} holds {bad} value(s) that are NaN or infinite; nothing was written.\nGet the model again."
            )
    return tensor


def round_to_nearest(plan: Plan, row: PlanRow, w: torch.Tensor) -> QTensor:
    """Codes without data: for the embedding, the head, and whatever lies outside of the blocks."""
    assert row.scheme
    rounding = grid.coarse if row.role != "linear" else plan.rounding(row)
    return grid.encode(w, row.scheme, *grid.fit(w, row.scheme, rounding))


def solved(step: Pass, w: torch.Tensor, device: str, *more: Any) -> QTensor:
    """What the step solves for w, on that device, where the statistic among `more` is already; the codes come back."""
    q = step.solve(w.to(device), *more)
    if device == "cpu":
        return q
    zero = None if q.zero is None else q.zero.cpu()
    return replace(q, code=q.code.cpu(), scale=q.scale.cpu(), zero=zero)


def store(row: PlanRow, result: torch.Tensor | QTensor) -> dict[str, torch.Tensor]:
    """The tensors that hold one result in the checkpoint."""
    if row.role != "linear" and isinstance(result, QTensor):
        return compressed_tensors.encode_table(row.name, result)
    return compressed_tensors.encode(row.name, result)


def fact(row: PlanRow, original: torch.Tensor, result: torch.Tensor | QTensor, notes: list[str]) -> dict[str, Any]:
    """What the manifest says of one weight: relative error and digest of what it decodes to."""
    decoded = result.decode() if isinstance(result, QTensor) else result.float()
    original = original.float()
    more: dict[str, Any] = {}
    if row.step >= 0 and not isinstance(result, QTensor):
        more["sparsity"] = zeros(decoded)
        if bool(((decoded != original) & (decoded != 0)).any()):  # what stays was changed too
            more["moved"] = "pruning"
    norm = float(original.norm())
    error = float((decoded - original).norm()) / norm if norm else 0.0
    return {
        "name": row.name, "shape": list(row.shape), "role": row.role, "step": row.step, "reason": row.reason,
        "scheme": str(row.scheme) if row.scheme else None, "before": row.before, "after": row.after,
        "notes": [*row.notes, *notes], "error": float(f"{error:.6g}"), "digest": digest(decoded),
    } | more  # fmt: skip


def zeros(weight: torch.Tensor) -> float:
    """Share of a weight that is exactly 0, to 6 digits, rounded down."""
    count = weight.numel() - int(torch.count_nonzero(weight))
    return math.floor(1e6 * count / max(weight.numel(), 1)) / 1e6


def assemble(plan: Plan, journal: Units, done: list[TensorFile], folder: Path) -> list[dict[str, Any]]:
    """Stream finished units into a Hugging Face folder: weights, config, tokenizer. Returns the plan as facts.

    Memory: one chunk of 16 MiB. Disk: the weights once more, until the journal is removed.
    """
    folder.mkdir(exist_ok=True)
    facts = sorted((f for unit in done for f in journal.facts(unit)["rows"]), key=lambda f: natural(f["name"]))
    turned = getattr(plan.checkpoint.source, "turned", {})
    facts = [f | ({"turned": turned[f["name"]]} if f["name"] in turned else {}) for f in facts]
    where = {name: unit for unit in done for name in unit.entries}
    shards: list[list[str]] = [[]]
    size = 0
    tables = {name: where[name].read(name) for name in where if name.endswith(compressed_tensors.TABLE_SCALE)}
    if tables:
        kinds = {row.name: str(row.scheme) for row in plan.rows if row.scheme and row.role != "linear"}
        tensorfile.write(folder / compressed_tensors.TABLES, tables, kinds)
    for name in sorted(set(where) - set(tables), key=natural):
        entry = where[name].entries[name]
        if size and size + entry.end - entry.begin > SHARD_BYTES:
            shards.append([])
            size = 0
        size += entry.end - entry.begin
        shards[-1].append(name)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = folder / ("model.safetensors" if single else f"model-{i:05}-of-{len(shards):05}.safetensors")
        weight_map.update(dict.fromkeys(names, file.name))
        tensorfile.write_pieces(file, _pieces(names, where))
    if len(shards) > 1:
        total = sum(where[name].entries[name].end - where[name].entries[name].begin for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        tensorfile.write_pieces(folder / INDEX, [json.dumps(index, indent=1).encode()])
    checkpoint = plan.checkpoint
    schemes = {r.name.removesuffix(".weight"): r.scheme for r in plan.rows if r.scheme and r.role == "linear"}
    left = [
        r.name.removesuffix(".weight") for r in plan.rows if r.role == "head" or (r.role == "linear" and not r.scheme)
    ]
    if checkpoint.tied:
        left.append("lm_head")
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    kept = (checkpoint.config.get("quantization_config") or {}).get("kv_cache_scheme")
    if kept or any(row.scheme for row in plan.rows):
        config["quantization_config"] = compressed_tensors.quantization_config(schemes, left)
        config["quantization_config"]["kv_cache_scheme"] = kept
    tensorfile.write_pieces(folder / "config.json", [json.dumps(config, indent=2, sort_keys=True).encode()])
    cargo.beside(checkpoint.path, checkpoint.task, folder)
    return facts


def main_file(folder: Path) -> str:
    """Name of the file that a loader opens first."""
    return "model.safetensors" if (folder / "model.safetensors").exists() else INDEX


def _pieces(names: list[str], where: dict[str, TensorFile]) -> Iterator[bytes]:
    entries = {name: (where[name].entries[name].dtype, where[name].entries[name].shape) for name in names}
    yield tensorfile.header_bytes(entries, {"format": "pt"})
    for name in names:
        yield from where[name].chunks(name)


def original(checkpoint: Checkpoint, row: PlanRow) -> torch.Tensor | QTensor:
    """One weight of the source, checked for NaN."""
    tensor = checkpoint.tensor(row.name)
    return tensor if isinstance(tensor, QTensor) else sound(row.name, tensor)
