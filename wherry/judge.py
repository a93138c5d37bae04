"""Judge: what `evaluate` and `compare` do: open what lies at a path, run it on labelled data, say how good it is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wherry import data
from wherry.artifact import Artifact
from wherry.errors import BadInput, Unsupported
from wherry.evaluate import drift, field, perplexity, robustness, similarity
from wherry.opened import Opened, opened
from wherry.report import Report
from wherry.task import Task

Progress = Callable[[int, int, str], None]
def evaluate(
    model: str | Path,
    data_file: str | Path | None,
    runtime: str,
    progress: Progress,
    against: str | Path | None = None,
    robust: bool = False,
    max_bad: float = data.MAX_BAD,
    most: int = 0,
) -> Report:
    """See `api.evaluate`."""
    found = opened(model, runtime)
    try:
        if found.task.kind == "text-generation":
            return _text(found, data_file, against, robust, progress)
        source = _source(found.task, data_file, max_bad, most)
        report = Report(f"{found.name} on {source.name}").extend(found.chosen)
        report.extend(_origin(found, source))
        if found.task.kind == "feature-extraction" and against is None:
            raise Unsupported(
                "a model of arrays to arrays has no labels to be judged by: it is compared with its original.\n"
                f"wherry evaluate {model} --against ORIGINAL --data {source.name}"
            )
        if against is None:
            wanted = field.targets(source, found.task)
            if robust:
                models = {found.name: (found.session, found.task)}
                report.extend(robustness.latency(models, source.examples))
                return report.extend(robustness.measure(models, source.examples, wanted, progress=progress))
            if found.task.kind == "sentence-similarity":
                return report.extend(
                    similarity.measure(found.session, found.task, source.pairs, found.name, progress=progress)[1]
                )
            said = field.ask(found.session, found.task, source.examples, found.name, progress=progress)
            return report.extend(field.measure(said, wanted, found.task, found.name))
        first = opened(against, runtime)
        try:
            names = short_names(against, model)
            if robust:
                models = {names[0]: (first.session, first.task), names[1]: (found.session, found.task)}
                wanted = _wanted(first, source, progress)
                report.extend(robustness.latency(models, source.examples))
                return report.extend(robustness.measure(models, source.examples, wanted, progress=progress))
            return report.extend(_pair(first, found, names, source, progress))
        finally:
            first.session.close()
    finally:
        found.session.close()


def compare(
    a: str | Path, b: str | Path, data_file: str | Path | None, progress: Progress, max_bad: float = data.MAX_BAD
) -> Report:
    """See `api.compare`."""
    first = opened(a)
    try:
        second = opened(b)
    except BaseException:
        first.session.close()
        raise
    report, names = Report(f"{b} against {a}"), (str(a), str(b))
    try:
        for one, name in zip((first, second), names, strict=True):
            report.add("bytes", name, one.bytes, "B")
        if first.task.kind != second.task.kind:
            raise BadInput(f"{a} is for {first.task.kind}, {b} for {second.task.kind}: they cannot be compared")
        if first.task.kind == "text-generation":
            source = data.read(data_file or data.shipped("evaluation"))
            table = data.windows(source, first.task, min(256, first.task.max_length), 8).tolist()
            found = drift.compare(first.session, second.session, table, names[1], names[0], progress=progress)
            return report.extend(found)
        source = _source(first.task, data_file, max_bad, 0)
        report.extend(_origin(second, source))
        return report.extend(_pair(first, second, names, source, progress))
    finally:
        first.session.close()
        second.session.close()


def short_names(a: str | Path, b: str | Path) -> tuple[str, str]:
    """Two short names for two paths, different ones."""
    first, second = Path(a).resolve(), Path(b).resolve()
    return (first.name, second.name) if first.name != second.name else (str(a), str(b))


def _pair(first: Opened, second: Opened, names: Sequence[str], source: data.Data, progress: Progress) -> Report:
    """Rows of both, and the paired differences."""
    report = Report()
    if first.task.kind == "sentence-similarity":
        base, rows = similarity.measure(first.session, first.task, source.pairs, names[0], progress=progress)
        other, more = similarity.measure(second.session, second.task, source.pairs, names[1], progress=progress)
        return report.extend(rows).extend(more).extend(similarity.compare(base, other, names[1], names[0]))
    if first.task.kind == "feature-extraction":
        wanted = _wanted(first, source, progress)
        said = field.ask(second.session, second.task, source.examples, names[1], progress=progress)
        return report.extend(field.measure(said, wanted, second.task, names[1]))
    if first.task.labels != second.task.labels:
        raise BadInput(f"{names[0]} and {names[1]} have different labels: they cannot be compared")
    wanted = field.targets(source, first.task)
    answers = [
        field.ask(one.session, one.task, source.examples, name, progress=progress)
        for one, name in zip((first, second), names, strict=True)
    ]
    for said, name in zip(answers, names, strict=True):
        report.extend(field.measure(said, wanted, first.task, name))
    return report.extend(field.compare(answers[0], answers[1], wanted, first.task, names[1], names[0]))


def _wanted(first: Opened, source: data.Data, progress: Progress) -> list[Any]:
    """The labels; for arrays to arrays, what the original answers."""
    if first.task.kind != "feature-extraction":
        return field.targets(source, first.task)
    return field.ask(first.session, first.task, source.examples, first.name, progress=progress).answers


def _source(task: Task, data_file: str | Path | None, max_bad: float, most: int) -> data.Data:
    """The data to judge on, of the task's sort; at most that many examples, drawn with a seed."""
    if data_file is None:
        if task.kind != "sentence-similarity":
            raise BadInput(f"{task.kind} is judged on labelled data: give --data. Kinds of files: docs/evaluate.md")
        data_file = data.shipped("pairs")
    source = data.read(data_file, max_bad)
    if task.kind == "sentence-similarity" and not source.pairs:
        raise BadInput(f"{source.name} holds no sentence pairs: a .csv or .tsv of sentence, sentence, score is wanted")
    if not most or most >= len(source.examples):
        return source
    chosen = np.sort(np.random.default_rng(0).permutation(len(source.examples))[:most])
    pairs = tuple(source.pairs[i] for i in chosen) if len(source.pairs) == len(source.examples) else ()
    note = f"{len(source.examples) - most} of {len(source.examples)} examples, by --most; the others drawn with seed 0"
    return replace(source.take(chosen), pairs=pairs, notes=(*source.notes, note))


def _origin(found: Opened, source: data.Data) -> Report:
    """Rows of what the data are: digest, undecodable examples, what was left out, and whether the model saw them."""
    report = Report()
    count = len(source.examples) or len(source.pairs)
    report.add("evaluation data", "", source.name, note=f"{count} examples, sha256 {source.digest[:16]}")
    if source.bad:
        named = "; ".join(source.bad[:5]) + (f"; and {len(source.bad) - 5} more" if len(source.bad) > 5 else "")
        report.add("undecodable examples", source.name, len(source.bad), note=named)
    for note in source.notes:
        report.add("left out", source.name, None, note=note)
    leak = found.task.leak(source.digest) or _calibrated(found.artifact, source.digest)
    if leak:
        note = f"this model was made with these data ({leak}): its quality here says little of others"
        report.add("check: data not seen before", found.name, False, note=note)
    return report


def _calibrated(artifact: Artifact | None, digest: str) -> str:
    """Whether the run that made this artifact calibrated on these data, as its report says."""
    for folder in (artifact.path, artifact.path.parent) if artifact else ():
        if (folder / "report.json").is_file():
            row = Report.load(folder / "report.json").get("made with: data")
            return "calibration" if row is not None and row.value == digest else ""
    return ""


def _text(
    found: Opened, data_file: str | Path | None, against: str | Path | None, robust: bool, progress: Progress
) -> Report:
    """Perplexity of a language model."""
    if robust or against:
        raise Unsupported("a language model is judged by perplexity alone here; `wherry compare A B` compares two")
    source = data.read(data_file or data.shipped("evaluation"))
    table = data.windows(source, found.task, min(512, found.task.max_length), 16)
    report = Report(f"{found.name} on {source.name}").extend(found.chosen)
    report.extend(perplexity.perplexity(found.session, table.tolist(), found.name, progress)[1])
    return report.extend(_origin(found, source))
