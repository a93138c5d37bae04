"""Translation and other written answers: BLEU, chrF, ROUGE-L, token F1, exact match.

Shapes: answers and targets: one text per example.
Source: Papineni et al. 2002 and Popovic 2015 by sacrebleu (its own tokenizer, 0 to 100); Lin 2004 by rouge-score (F
        measure, 0 to 1); token F1 as in SQuAD (Rajpurkar et al. 2016): words in common, without case and punctuation.
Cost:   statistics of each example once; resamples are sums of them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sacrebleu

from wherry.evaluate.metric import Metric, mean, share
from wherry.evaluate.speech import plain
from wherry.report import Report
from wherry.task import Task
from wherry.writer import Writer


def say(session: Writer, task: Task, examples: Sequence[Any]) -> list[str]:
    """The written answer to each text of one batch."""
    return session.write(task.prepare(examples))


def metrics(said: Sequence[str], wanted: Sequence[str], task: Task) -> list[Metric]:
    """BLEU, chrF, ROUGE-L, token F1, exact match."""
    short = max(len(text.split()) for text in wanted) < 4
    scorer = rouge_scorer(["rouge1", "rouge2", "rougeL"])
    rouge = [scorer.score(target, answer) for answer, target in zip(said, wanted, strict=True)]
    return [
        _corpus("bleu", sacrebleu.BLEU(), said, wanted, "BLEU needs four words in a row: 0 here" if short else ""),
        _corpus("chrf", sacrebleu.CHRF(), said, wanted, ""),
        *(mean(f"rouge-{kind[5:].lower()}", [each[kind].fmeasure for each in rouge]) for kind in rouge[0]),
        mean("token f1", [token_f1(a, t) for a, t in zip(said, wanted, strict=True)]),
        share("exact match", np.array([a.strip() == t.strip() for a, t in zip(said, wanted, strict=True)])),
    ]


def rouge_scorer(kinds: list[str]) -> Any:
    """A RougeScorer. Its logging keeps, and later closes, the stderr that it finds: it is given the true one."""
    from absl import logging
    from rouge_score.rouge_scorer import RougeScorer

    logging.get_absl_handler().python_handler.stream = sys.__stderr__
    return RougeScorer(kinds)


def _corpus(name: str, scorer: Any, said: Sequence[str], wanted: Sequence[str], note: str) -> Metric:
    """A score of sums over sentences, as sacrebleu's own significance test resamples it."""
    each = np.array(scorer._extract_corpus_statistics(list(said), [list(wanted)]), np.float64)
    return Metric(name, _scored(scorer, each), len(each), note=note)


def _scored(scorer: Any, each: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: np.array([scorer._compute_score_from_stats(list(sums)).score for sums in w @ each])


def token_f1(answer: str, target: str) -> float:
    """F1 of the words that two texts have in common, 0 to 1."""
    a, t = plain(answer).split(), plain(target).split()
    common = sum((Counter(a) & Counter(t)).values())
    return float(a == t) if not a or not t else 2 * common / (len(a) + len(t))


def details(said: Sequence[str], wanted: Sequence[str], task: Task, where: str) -> Report:
    """The first three answers that differ from their target."""
    report = Report()
    for answer, target in [(a, t) for a, t in zip(said, wanted, strict=True) if a.strip() != t.strip()][:3]:
        report.add("sample", where, answer, note=f"for: {target}")
    return report
