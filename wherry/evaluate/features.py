"""Features: how far a model's outputs are from the original's, where there is nothing else to judge them by.

Shapes: answers: the main output of each example, as a flat float64 array.
Idea:   ||y - y0|| / ||y0|| per example (the square root of the noise to signal ratio), and the cosine of the two.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry.errors import BadInput
from wherry.evaluate.metric import Metric, mean
from wherry.report import Report
from wherry.session import Session
from wherry.task import Task


def say(session: Session, task: Task, examples: Sequence[Any]) -> list[np.ndarray]:
    """The main output of each example of one batch, flat."""
    inputs = task.prepare(examples)
    found = np.asarray(task.answer(session.predict(inputs), inputs), np.float64)
    if not found.ndim or len(found) != len(examples):
        raise BadInput(f"the main output {list(found.shape)} has no batch axis of {len(examples)}")
    return list(found.reshape(len(found), -1))


def metrics(said: Sequence[np.ndarray], wanted: Sequence[np.ndarray], task: Task) -> list[Metric]:
    """Relative difference and cosine, `wanted` being the original's answers."""
    if any(a.shape != b.shape for a, b in zip(said, wanted, strict=True)):
        raise BadInput("the two models' outputs have different shapes: they cannot be compared")
    with np.errstate(invalid="ignore", divide="ignore"):
        away = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(said, wanted, strict=True)]
        near = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(said, wanted, strict=True)]
    return [
        mean("relative difference", away, lower=True, note="norm of the difference over the norm of the original's"),
        mean("cosine", near, note="with the original's output"),
    ]


def details(said: Sequence[Any], wanted: Sequence[Any], task: Task, where: str) -> Report:
    """Nothing more."""
    return Report()
