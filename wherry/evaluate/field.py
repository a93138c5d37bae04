"""Field: the metrics of a task's kind. One file per family of metrics; this one knows which, and runs a model once.

A family (a file of this folder) has

    say(session, task, examples) -> answers          one per example of a batch
    metrics(answers, targets, task) -> [Metric]      what they are worth
    details(answers, targets, task, where) -> Report per class, samples: rows without intervals
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

from wherry import data, shelf
from wherry.errors import BadInput, Unsupported
from wherry.evaluate import metric
from wherry.evaluate.metric import Metric
from wherry.evaluate.perplexity import Progress, silent
from wherry.report import Report
from wherry.task import Task

FAMILIES = {
    "sentence-similarity": "similarity", "text-classification": "classification",
    "image-classification": "classification", "audio-classification": "classification",
    "token-classification": "tagging", "object-detection": "detection",
    "automatic-speech-recognition": "speech", "translation": "translation",
    "voice-activity-detection": "voice", "feature-extraction": "features",
}  # fmt: skip
BATCH = 16


@dataclass(frozen=True)
class Said:
    """What one model answered, one per example, and the seconds of each batch (preparing included)."""

    answers: list[Any]
    seconds: tuple[float, ...]


def family(task: Task) -> ModuleType:
    """The file of metrics for this kind. Raises Missing with the pip line where its library is absent."""
    name = FAMILIES.get(task.kind)
    if name is None:
        raise Unsupported(f"{task.kind} has no metric of labelled examples; there are: {', '.join(FAMILIES)}")
    return shelf.find("evaluate", name)


def ask(
    session: Any, task: Task, examples: Sequence[Any], where: str = "", batch: int = BATCH, progress: Progress = silent
) -> Said:
    """Run a session (or a Writer) over all examples in batches; texts of like length together, to save padding."""
    if not examples:
        raise BadInput("no examples to judge on")
    module = family(task)
    order = list(range(len(examples)))
    if task.modality == "text":
        order.sort(key=lambda i: len(str(examples[i])))
    answers: list[Any] = [None] * len(examples)
    seconds = []
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        began = perf_counter()
        found = module.say(session, task, [examples[i] for i in chosen])
        seconds.append(perf_counter() - began)
        for i, answer in zip(chosen, found, strict=True):
            answers[i] = answer
        progress(min(start + batch, len(order)), len(order), f"answers of {where}".removesuffix(" of "))
    return Said(answers, tuple(seconds))


def targets(source: data.Data, task: Task) -> list[Any]:
    """The labels, checked before any model runs. Raises BadInput with file and line."""
    found = data.targets(source, task)
    if task.kind == "object-detection":
        return found
    if task.kind == "token-classification":
        for example, label, place in zip(source.examples, found, source.places, strict=True):
            if len(example) != len(label):
                raise BadInput(f"{place}: {len(example)} words, but {len(label)} labels")
    return found


def metrics(said: Said, wanted: Sequence[Any], task: Task) -> list[Metric]:
    """The task's metrics of these answers."""
    found: list[Metric] = family(task).metrics(said.answers, wanted, task)
    return found


def measure(said: Said, wanted: Sequence[Any], task: Task, where: str) -> Report:
    """Rows of every metric with its interval, and details."""
    report = metric.rows(metrics(said, wanted, task), where)
    return report.extend(family(task).details(said.answers, wanted, task, where))


def compare(reference: Said, other: Said, wanted: Sequence[Any], task: Task, where: str, original: str) -> Report:
    """Rows "METRIC difference" (paired), and how often both answer the same where answers are classes or texts."""
    report = metric.differences(metrics(other, wanted, task), metrics(reference, wanted, task), where, original)
    pairs = list(zip(reference.answers, other.answers, strict=True))
    same = _same(task.kind)
    if same is not None:
        agreement = metric.share("same answer", np.array([same(a, b) for a, b in pairs]), f"as {original}")
        report.extend(metric.rows([agreement], where))
    return report


def _same(kind: str) -> Callable[[Any, Any], bool] | None:
    if FAMILIES[kind] == "classification":
        return lambda a, b: bool(np.argmax(a) == np.argmax(b))
    if FAMILIES[kind] in ("speech", "translation", "tagging"):
        return lambda a, b: bool(a == b)
    return None
