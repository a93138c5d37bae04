"""Token classification: F1 of words that are not O, and of whole entities (BIO labels) by seqeval.

Shapes: examples: lists of words; answers and targets: one class index per word.
Idea:   the first token of a word speaks for it, as in the common recipe for BERT. Words beyond max_length count as O.
Source: Nakayama 2018, seqeval, in CoNLL's sense: an entity counts when its kind and both ends are right.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry.errors import BadInput
from wherry.evaluate.metric import Metric, f1, share
from wherry.report import Report
from wherry.session import Session
from wherry.task import Task


def say(session: Session, task: Task, examples: Sequence[Any]) -> list[list[int]]:
    """The class of each word of each sentence of one batch."""
    inputs = task.prepare(examples)
    found = task.answer(session.predict(inputs), inputs)
    out = []
    for row, words in zip(found, examples, strict=True):
        first: dict[int, int] = {}
        for place, word in enumerate(task.words(words)):
            if word is not None:
                first.setdefault(word, place)
        outside = task.labels.index("O") if "O" in task.labels else 0
        out.append([int(row[first[i]]) if i in first else outside for i in range(len(words))])
    return out


def metrics(said: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], task: Task) -> list[Metric]:
    """Token F1, precision, recall (classes but O), accuracy over sentences, and F1 of entities."""
    from seqeval.metrics.sequence_labeling import get_entities

    for i, (a, t) in enumerate(zip(said, wanted, strict=True)):
        if len(a) != len(t):
            raise BadInput(f"example {i} has {len(a)} words, but {len(t)} labels")
    outside = task.labels.index("O") if "O" in task.labels else None
    counts = np.zeros((2, 3, len(said)))
    for i, (a, t) in enumerate(zip(said, wanted, strict=True)):
        answer, target = np.asarray(a), np.asarray(t)
        counts[0, :, i] = (
            ((answer == target) & (target != outside)).sum(), (answer != outside).sum(), (target != outside).sum()
        )  # fmt: skip
        told, true = (set(get_entities([task.labels[j] for j in each])) for each in (a, t)) if task.labels else ((), ())
        counts[1, :, i] = len(set(told) & set(true)), len(told), len(true)
    whole = share("right sentences", np.array([list(a) == list(t) for a, t in zip(said, wanted, strict=True)]))
    entity = f1("entity", counts[1]) if task.labels else ()
    return [*f1("token", counts[0], "words, without O"), *entity, whole]


def details(said: Sequence[Any], wanted: Sequence[Any], task: Task, where: str) -> Report:
    """Nothing more."""
    return Report()
