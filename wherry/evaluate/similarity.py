"""Similarity: does an encoder rank sentence pairs as people do? Spearman's and Pearson's correlation with their scores.

Shapes: pairs of (sentence, sentence, score); embeddings [2 * pairs, width], first sentences, then second.
Cost:   every sentence goes through the encoder once, in batches of similar length.
Source: Cer et al. 2017, SemEval task 1 (STS benchmark): cosine of the two embeddings against the score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wherry.errors import BadInput
from wherry.evaluate import interval
from wherry.evaluate.metric import Metric
from wherry.evaluate.perplexity import Progress, silent
from wherry.report import Report
from wherry.session import Session
from wherry.task import Task

Pairs = Sequence[tuple[str, str, float]]


@dataclass(frozen=True)
class Similarity:
    """What an encoder said of pairs: embeddings [2 * pairs, width], cosine [pairs], and people's score [pairs]."""

    embeddings: np.ndarray
    cosine: np.ndarray
    score: np.ndarray


def embed(
    session: Session, task: Task, sentences: Sequence[str], batch: int = 32, progress: Progress = silent
) -> np.ndarray:
    """Embeddings [sentences, width] in the order of the sentences; batches are sorted by length, to save padding."""
    if not sentences:
        raise BadInput("no sentences to embed")
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows: list[np.ndarray] = [np.empty(0)] * len(sentences)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = task.batch([sentences[i] for i in chosen])
        for i, row in zip(chosen, task.answer(session.predict(inputs), inputs), strict=True):
            rows[i] = row
        progress(min(start + batch, len(order)), len(order), "sentences")
    return np.stack(rows)


def measure(
    session: Session, task: Task, pairs: Pairs, where: str = "", batch: int = 32, progress: Progress = silent
) -> tuple[Similarity, Report]:
    """Embed all pairs; returns what was found and rows "spearman" and "pearson" with 95% bootstrap intervals."""
    if len(pairs) < 3:
        raise BadInput(f"{len(pairs)} sentence pairs are too few for a correlation: give three or more")
    embeddings = embed(session, task, [a for a, _, _ in pairs] + [b for _, b, _ in pairs], batch, progress)
    a, b = np.split(embeddings.astype(np.float64), 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    found = Similarity(embeddings, cosine, np.array([score for _, _, score in pairs], dtype=float))
    report = Report()
    for what, ranks in (("spearman", True), ("pearson", False)):
        if not np.isfinite(cosine).all():
            report.add(what, where, None, note=f"{int((~np.isfinite(cosine)).sum())} pairs have no finite cosine")
            continue
        ends = interval.correlation(cosine, found.score, ranks)
        _row(report, what, where, ends, f"{len(pairs)} pairs; 95% bootstrap interval")
    return found, report


def say(session: Session, task: Task, examples: Sequence[Any]) -> list[float]:
    """Cosine of the two sentences of each pair of one batch."""
    if not all(isinstance(example, tuple) for example in examples):
        raise BadInput("sentence similarity is judged on pairs: a .csv or .tsv of sentence, sentence, score is wanted")
    rows = embed(session, task, [a for a, _ in examples] + [b for _, b in examples]).astype(np.float64)
    a, b = np.split(rows, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return list((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def metrics(said: Sequence[float], wanted: Sequence[float], task: Task) -> list[Metric]:
    """Spearman's and Pearson's correlation of the cosines with people's scores, by weights of the pairs."""
    x, y = np.asarray(said, np.float64), np.asarray(wanted, np.float64)
    if len(x) < 3:
        raise BadInput(f"{len(x)} sentence pairs are too few for a correlation: give three or more")

    def of(weights: np.ndarray, ranks: bool) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = [np.repeat(np.arange(len(x)), row.astype(int)) for row in weights]
            return np.array([float(interval.correlate(x[i], y[i], ranks)) for i in drawn])

    return [
        Metric("spearman", lambda w: of(w, True), len(x)),
        Metric("pearson", lambda w: of(w, False), len(x)),
    ]


def compare(reference: Similarity, other: Similarity, where: str, original: str = "original") -> Report:
    """Rows "spearman difference" and "pearson difference" (paired), and "embedding agreement": the mean cosine of each
    sentence's embedding with the original's, 1 = the same direction.
    """
    if not np.array_equal(reference.score, other.score):
        raise BadInput("the two results are not of the same sentence pairs")
    report = Report()
    whole = np.isfinite(other.cosine).all() and np.isfinite(reference.cosine).all()
    for what, ranks in (("spearman difference", True), ("pearson difference", False)):
        if not whole:
            report.add(what, where, None, note="some embeddings are not finite")
            continue
        found = interval.difference(other.cosine, reference.cosine, other.score, ranks)
        _row(report, what, where, found, f"to {original}, the same pairs drawn for both; 95% bootstrap interval")
    if not whole:
        report.add("embedding agreement", where, None, note="some embeddings are not finite")
        return report
    a, b = reference.embeddings.astype(np.float64), other.embeddings.astype(np.float64)
    near = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    mean = interval.mean([near[i : i + 1] for i in range(len(near))])
    _row(report, "embedding agreement", where, mean, f"mean cosine with {original}'s embedding of the same sentence")
    return report


def _row(report: Report, what: str, where: str, found: interval.Interval, note: str) -> None:
    if not np.isfinite(found.value):
        report.add(what, where, None, note="the cosines do not vary: no correlation")
        return
    report.add(what, where, found.value, "", found.low, found.high, note)
