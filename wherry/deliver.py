"""Deliver: one run from a plan to a finished folder: checkpoint, exports, and what describes them. Resumable."""

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wherry import __version__, cargo, data, shelf, tensorfile
from wherry.artifact import MANIFEST, Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Error, Exhausted
from wherry.journal import Journal, remove_empty, vacant
from wherry.recipe import TILED, Plan
from wherry.scheme import QTensor, Scheme

Progress = Callable[[int, int, str], None]
Batches = list[dict[str, np.ndarray]]
KEPT = (7,)  # exit codes of errors after which calibrated work stays: the disk or the memory can be mended
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def calibration(checkpoint: Checkpoint, source: data.Data, samples: int, length: int, seed: int) -> Batches:
    """Batches of model inputs: windows of `length` tokens, 4 a batch; for encoders sentences of one length together."""
    for name, value, least in (("samples", samples, 1), ("length", length, 2), ("seed", seed, 0)):
        if value < least:
            raise BadInput(f"--{name} {value} is too small: {least} is the least")
    task = checkpoint.task
    if checkpoint.graph is not None:
        return data.inputs(source, task, samples, seed)
    if task.kind == "text-generation":
        table = data.windows(source, task, min(length, task.max_length), samples, seed)
        vocabulary = checkpoint.config.get("vocab_size", 1 << 62)
        for token in (int(table.max()), int(table.min())):
            if not 0 <= token < vocabulary:
                raise BadInput(f"{source.name} has token {token}, the model {vocabulary}: another tokenizer's ids")
        return [{"input_ids": table[i : i + 4]} for i in range(0, len(table), 4)]
    by_length: dict[int, list[str]] = {}
    for text in data.sentences(source, 4 * samples, seed):
        by_length.setdefault(len(task.encode(text)), []).append(text)
    return [task.batch(by_length[n][i : i + 16]) for n in sorted(by_length) for i in range(0, len(by_length[n]), 16)]


def deliver(
    plan: Plan,
    out: Path,
    formats: tuple[str, ...],
    batches: Batches,
    stamp: dict[str, Any],
    describe: Callable[[Path], None],
    progress: Progress,
) -> None:
    """Do what the plan says into `out`, going on where a killed run of the same stamp was.

    Args:
        plan: checked already. out: folder to make. formats: exports inside of it.
        batches: calibration inputs; empty when no step wants them.
        stamp: what makes this run this run: settings and digests.
        describe: called with the finished folder before it gets its name; writes report and card into it.
        progress: called as progress(done, total, text).
    """
    stamp = stamp | {"wherry": __version__, "source": plan.checkpoint.source.fingerprint(), "recipe": str(plan.recipe)}
    journal = Journal(out, stamp | {"formats": formats}, need=forecast(plan, batches, formats)["disk"])
    result = journal.folder / "result"
    try:
        if not journal.ready.exists():
            if not (result / MANIFEST).exists():
                shutil.rmtree(result, ignore_errors=True)
                _checkpoint(plan, journal, batches, result, progress)
            for name in exports(plan, formats):
                save(Checkpoint.open(result), result / name, name, progress)
            describe(result)
        journal.finish(result)
    except Error as error:
        kept = sorted(journal.folder.rglob("unit-block-*.safetensors")) if batches and error.code in KEPT else []
        if not kept:
            journal.discard()
            raise
        note = f"{len(kept)} finished blocks are kept in {journal.folder}; the same command goes on there."
        raise type(error)("\n".join([*str(error).splitlines()[:2], note])) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        journal.discard()
        raise Exhausted(f"cannot write {out}: {error.strerror}.\nFree space or choose another -o.") from error


def _checkpoint(plan: Plan, journal: Journal, batches: Batches, result: Path, progress: Progress) -> None:
    from wherry.engine import stage, unit

    last, given, batches, history = stage.lead(plan, batches, journal.folder, progress)
    codes = last.recipe.steps[-1].gait == "codes"
    if codes and given.graph is not None:
        facts, checks = shelf.find("engine", "graph").quantize(last, batches, result, progress)
    else:
        facts, checks = stage.run(last, given, batches, journal, result, progress), []
    facts = stage.merged(facts, history, last.first)
    tensorfile.write_pieces(result / "recipe.yaml", [plan.recipe.to_yaml().encode()])
    more = {"plan": facts, "recipe": str(plan.recipe), "source": plan.checkpoint.origin or plan.checkpoint.name}
    if given.graph is not None:
        graph = shelf.find("engine", "graph")
        fields = graph.described(given, result, checks or graph.compared(given, result, batches))
    else:
        fields = cargo.facts(given, "compressed_tensors" if codes else "safetensors", unit.main_file(result))
    made = Checkpoint.open(result) if last.recipe.steps[-1].gait == "model" else given
    Artifact.seal(result, **fields | more | {"params": made.params})


def exports(plan: Plan, formats: tuple[str, ...]) -> list[str]:
    """The formats that are written beside the result: a graph's result is itself ONNX."""
    return [name for name in formats if plan.checkpoint.graph is None or name != "onnx"]


class ByRows:
    """A source whose tiles are seen by rows: the same weights, for a format that knows no tiles."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def scheme(self, name: str) -> Scheme | None:
        """How the weight is stored, by rows."""
        found = self.source.scheme(name)
        return found.by_rows if found else None

    def read(self, name: str) -> Any:
        """One weight, its scales by rows."""
        found = self.source.read(name)
        return dataclasses.replace(found, scheme=found.scheme.by_rows) if isinstance(found, QTensor) else found


def save(checkpoint: Checkpoint, out: Path, name: str, progress: Progress) -> Artifact:
    """Export into a temporary folder beside `out`, then rename; a finished one is left alone."""
    if (out / MANIFEST).exists():
        return Artifact.open(out)
    module = shelf.find("formats", name)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    parents = vacant(out)
    try:
        temporary.mkdir(parents=True)
        progress(0, 1, f"writing {name}")
        if name not in TILED and any(own and own.tiled for own in map(checkpoint.scheme, checkpoint.names())):
            checkpoint = dataclasses.replace(checkpoint, source=ByRows(checkpoint.source))
        module.save(checkpoint, temporary, progress)
        temporary.rename(out)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Exhausted(f"cannot write {out}: {error.strerror}.\nFree space or choose another -o.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(parents)
    return Artifact.open(out)


def forecast(plan: Plan, batches: Batches, formats: tuple[str, ...] = ()) -> dict[str, int]:
    """Bytes of memory and disk that a run will take at most, and of the checkpoint that it writes.

    memory: the library's own 0.5 GB, one block in float32 with its codes and statistics, the activations between two
    blocks (before and after), the largest tensor. disk: units, result and exports together.
    """
    blocks: dict[str, int] = {}
    for row in plan.rows:
        number = next((part for part in row.name.split(".") if part.isdigit()), "")
        blocks[number] = blocks.get(number, 0) + int(np.prod(row.shape, dtype=np.int64))
    block = max((size for number, size in blocks.items() if number), default=0)
    largest = max(int(np.prod(row.shape, dtype=np.int64)) for row in plan.rows)
    tokens = sum(next(iter(batch.values())).size for batch in batches)
    flow = tokens * int(plan.config.get("hidden_size", 0)) * 4
    if plan.checkpoint.graph is not None:
        memory = 500_000_000 + 3 * plan.before + 4 * largest
        return {"memory": memory, "disk": plan.before + plan.after * (1 + len(formats)), "checkpoint": plan.after}
    widths = {row.shape[-1] for row in plan.rows if row.role == "linear"}
    memory = 500_000_000 + 16 * largest
    if batches:
        memory += 12 * block + 2 * flow + sum(40 * k * k for k in widths)
    disk = plan.after * (2 + len(formats)) + (2 * flow if batches else 0)
    return {"memory": memory, "disk": disk, "checkpoint": plan.after}
