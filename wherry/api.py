"""The verbs: inspect, plan, compress, export, verify, evaluate, compare, serve, chat. The one file that knows every shelf."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wherry import __version__, data, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Error, Unsupported
from wherry.journal import Journal
from wherry.recipe import Plan, Recipe
from wherry.report import Report

Progress = Callable[[int, int, str], None]
SAMPLES, LENGTH, SEED = 64, 512, 0


def quiet(done: int, total: int, text: str) -> None:
    """A progress display that shows nothing."""


def plan(model: str | Path, recipe: str | None = None, formats: tuple[str, ...] = ()) -> Plan:
    """Decide and check everything that can be known before any work. Cost: seconds; reads no weights."""
    checkpoint = Checkpoint.open(model)
    return Recipe.parse(recipe or default_recipe(checkpoint)).plan(checkpoint, formats)


def default_recipe(checkpoint: Checkpoint) -> str:
    """What is done when no recipe is given: GPTQ at 4 bits for generators, static int8 for encoders."""
    if checkpoint.task.kind != "text-generation":
        return "rtn:scheme=W8A8_STATIC"
    widths = {checkpoint.shape(n)[-1] for n in checkpoint.names() if "_proj" in n and len(checkpoint.shape(n)) == 2}
    size = next((g for g in (64, 32, 128, 16) if widths and all(k % g == 0 for k in widths)), -1)
    return f"gptq:scheme=W4A16_ASYM,group_size={size}"


def calibration(checkpoint: Checkpoint, source: data.Data, samples: int, length: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Batches of model inputs. Generators: windows of `length` tokens, 4 a batch; encoders: sentences of equal length together."""
    task = checkpoint.task
    if task.kind == "text-generation":
        length = min(length, task.max_length)
        table = data.windows(source, task, length, samples, seed)
        return [{"input_ids": table[i : i + 4]} for i in range(0, len(table), 4)]
    by_length: dict[int, list[str]] = {}
    for text in data.sentences(source, 8 * samples, seed):
        by_length.setdefault(len(task.encode(text)), []).append(text)
    return [task.batch(by_length[n][i : i + 16]) for n in sorted(by_length) for i in range(0, len(by_length[n]), 16)]


def compress_only(
    model: str | Path,
    out: str | Path,
    recipe: str | None = None,
    formats: tuple[str, ...] = (),
    data_file: str | Path | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = SEED,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Artifact:
    """Compress a model into the folder `out`, which stock transformers loads; with formats, exports inside of it.

    A killed run goes on where it was when it is called again with the same arguments.

    Args:
        model: folder, .gguf file or hub id.
        out: folder to make; it must not exist.
        recipe: recipe string or YAML file; None = default_recipe.
        formats: names on the formats shelf; each becomes a folder inside of `out`.
        data_file: calibration data (.txt, .jsonl, .csv, .tsv, .npy token ids); None = the shipped text.
        samples, length, seed: calibration windows, their length in tokens, and how they are drawn.
        device: "cpu", or a torch device.
        progress: called as progress(done, total, text).

    Raises:
        wherry.Error: before any work where it can be known; nothing is left behind.
    """
    if device != "cpu":
        raise Unsupported(f"--device {device}: compressing runs on the CPU in this version")
    out = Path(out)
    made = plan(model, recipe, formats)
    checkpoint = made.checkpoint
    batches, stamp = [], {"data": None, "samples": None}
    if made.recipe.calibrated:
        source = data.read(data_file or data.shipped("calibration" if checkpoint.task.kind == "text-generation" else "pairs"))
        batches = calibration(checkpoint, source, samples, length, seed)
        stamp = {"data": source.digest, "samples": [samples, length, seed]}
    stamp |= {"wherry": __version__, "source": checkpoint.source.fingerprint(), "recipe": str(made.recipe)}
    journal = Journal(out, stamp | {"formats": formats}, need=forecast(made, batches, formats)["disk"])
    result = journal.folder / "result"
    try:
        if not journal.ready.exists():
            if not (result / "wherry.json").exists():
                shutil.rmtree(result, ignore_errors=True)
                _checkpoint(made, journal, batches, result, progress)
            for name in formats:
                _export(Checkpoint.open(result), result / name, name, progress)
        journal.finish(result)
    except Error as error:
        if error.code in (2, 3, 4, 5, 6):
            journal.discard()
        raise
    return Artifact.open(out)


def _checkpoint(made: Plan, journal: Journal, batches: list[Any], result: Path, progress: Progress) -> None:
    from wherry.engine import unit

    gait = shelf.find("engine", "walk" if batches else "stream")
    done = gait.run(made, journal, batches, progress) if batches else gait.run(made, journal, progress)
    facts = unit.assemble(made, journal, done, result)
    checkpoint = made.checkpoint
    from wherry.formats import compressed_tensors

    fields = compressed_tensors.manifest(checkpoint, unit.main_file(result))
    origin = checkpoint.origin or checkpoint.name
    Artifact.seal(result, **fields | {"plan": facts, "recipe": str(made.recipe), "source": origin})


def _export(checkpoint: Checkpoint, out: Path, name: str, progress: Progress) -> Artifact:
    """Save into a temporary folder beside `out`, then rename; a finished one is left alone."""
    if (out / "wherry.json").exists():
        return Artifact.open(out)
    module = shelf.find("formats", name)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        module.save(checkpoint, temporary, progress)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Artifact.open(out)


def export(checkpoint: str | Path, out: str | Path, format: str, progress: Progress = quiet) -> Artifact:
    """Write a checkpoint (compressed or not) in another format, into the folder `out`."""
    from wherry.journal import vacant

    source, out = Checkpoint.open(checkpoint), Path(out)
    vacant(out)
    Recipe.check(source, format)
    return _export(source, out, format, progress)


def forecast(made: Plan, batches: list[Any], formats: tuple[str, ...] = ()) -> dict[str, int]:
    """Bytes of memory and disk that a run will take, and of its result. An estimate; rows of the dry run."""
    largest = max(np.prod(row.shape, dtype=np.int64) for row in made.rows)
    blocks: dict[str, int] = {}
    for row in made.rows:
        part = row.name.split(".")
        number = next((p for p in part if p.isdigit()), "")
        blocks[number] = blocks.get(number, 0) + int(np.prod(row.shape, dtype=np.int64))
    inner = max((v for k, v in blocks.items() if k), default=0)
    tokens = sum(next(iter(b.values())).size for b in batches)
    hidden = int(made.config.get("hidden_size", 0))
    flow = 3 * tokens * hidden * 4
    statistics = sum({row.shape[-1]: 4 * row.shape[-1] ** 2 for row in made.rows if row.role == "linear"}.values())
    memory = 400_000_000 + (12 * inner + flow + 6 * statistics if batches else 0) + 24 * int(largest)
    disk = made.after * (2 + len(formats)) + (flow if batches else 0)
    return {"memory": memory, "disk": disk, "result": made.after}


__all__ = ["BadInput", "Report", "json"]
