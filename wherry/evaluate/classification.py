"""Classification of texts, pictures and sounds: accuracy, top-5, precision, recall, F1 per class and macro, confusion.

Shapes: answers: scores float32 [classes] per example; targets: the index of the class.
Source: scikit-learn's definitions; macro averages run over the classes that are wanted or said; a class that is never
        said has precision 0.
Cost:   one pass; scores of all examples are kept.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry.errors import BadInput
from wherry.evaluate.metric import Metric, share
from wherry.report import Report
from wherry.session import Session
from wherry.task import Task

CLASSES_MOST = 50  # beyond, rows per class and the confusion matrix are left out, which a row says
WORST = 5


def say(session: Session, task: Task, examples: Sequence[Any]) -> list[np.ndarray]:
    """Scores [classes] of each example of one batch."""
    inputs = task.prepare(examples)
    outputs = session.predict(inputs)
    task.answer(outputs, inputs)  # checks that the labels fit
    return list(np.asarray(task.main(outputs), np.float32))


def metrics(said: Sequence[np.ndarray], wanted: Sequence[int], task: Task) -> list[Metric]:
    """Accuracy, top-5 (of six classes or more), macro precision, recall and F1."""
    scores, labels = _checked(said, wanted)
    bad = ~np.isfinite(scores).all(1)
    answers = np.where(bad, -1, scores.argmax(1))
    broken = f"{int(bad.sum())} examples have scores that are not finite and count as wrong" if bad.any() else ""
    found = [share("accuracy", answers == labels, broken)]
    if scores.shape[1] > 5:
        top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        found.append(share("top-5 accuracy", (top == labels[:, None]).any(1) & ~bad, broken))
    right, told, true = _indicators(answers, labels, scores.shape[1])
    for i, name in enumerate(("macro precision", "macro recall", "macro f1")):
        found.append(Metric(name, lambda w, i=i: _macro(w @ right, w @ told, w @ true)[i], len(labels)))  # type: ignore[misc]
    return found


def _checked(said: Sequence[np.ndarray], wanted: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.stack(said), np.asarray(wanted, np.int64)
    if labels.size and labels.max() >= scores.shape[1]:
        raise BadInput(f"the data has class {labels.max()}, the model gives scores for {scores.shape[1]} classes")
    return scores, labels


def _indicators(answers: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 [n, used classes] each: said rightly, said, wanted."""
    used = np.unique(np.concatenate([answers[answers >= 0], labels]))
    told, true = answers[:, None] == used, labels[:, None] == used
    return (told & true).astype(np.float64), told.astype(np.float64), true.astype(np.float64)


def _macro(right: np.ndarray, told: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Macro precision, recall, F1 [resamples] from sums [resamples, classes]."""
    present = (told + true) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        each = [np.where(b > 0, a / b, 0) for a, b in ((right, told), (right, true), (2 * right, told + true))]
    many = np.maximum(present.sum(1), 1)
    return tuple((np.where(present, values, 0).sum(1) / many) for values in each)


def details(said: Sequence[np.ndarray], wanted: Sequence[int], task: Task, where: str) -> Report:
    """Precision, recall and F1 per class, the confusion matrix (labels down, answers across), the worst mistakes."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    scores, labels = _checked(said, wanted)
    answers, count, report = scores.argmax(1), scores.shape[1], Report()
    name = lambda i: task.labels[i] if task.labels else str(i)  # noqa: E731
    matrix = confusion_matrix(labels, answers, labels=range(count))
    np.fill_diagonal(off := matrix.copy(), 0)
    for flat in np.argsort(-off, axis=None, kind="stable")[:WORST]:
        label, answer = divmod(int(flat), count)
        if off[label, answer]:
            report.add("mistakes", where, int(off[label, answer]), note=f"{name(label)} taken for {name(answer)}")
    if count > CLASSES_MOST:
        note = f"left out: {count} classes are more than {CLASSES_MOST}"
        report.add("precision, recall and f1 per class; confusion matrix", where, None, note=note)
        return report
    each = precision_recall_fscore_support(labels, answers, labels=range(count), zero_division=0)
    for i in range(count):
        for what, values in zip(("precision", "recall", "f1"), each, strict=False):
            report.add(f"{what}: {name(i)}", where, float(values[i]), note=f"{each[3][i]} examples of this class")
    order = ", ".join(map(name, range(count)))
    report.add("confusion matrix", where, json.dumps(matrix.tolist()), note=f"labels down, answers across: {order}")
    return report
