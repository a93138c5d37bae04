"""Speech recognition: word and character error rate, by jiwer, after one plain normalisation of both sides.

Idea:   (substitutions + deletions + insertions) / words of the reference, summed over all utterances.
Shapes: answers and targets: one text per utterance.
Source: both sides are lower-cased, punctuation becomes a space, and a lone digit its word ("2" = "two"), since
        recognizers write both. Nothing else is forgiven.
"""

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry.errors import BadInput
from wherry.evaluate.metric import Metric, ratio, share
from wherry.report import Report
from wherry.task import Task
from wherry.writer import Writer

DIGITS = dict(zip(string.digits, "zero one two three four five six seven eight nine".split(), strict=True))


def say(session: Writer, task: Task, examples: Sequence[Any]) -> list[str]:
    """The text of each sound of one batch."""
    return session.write(task.prepare(examples))


def plain(text: str) -> str:
    """A text as it is compared."""
    text = "".join(" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text.lower())
    return " ".join(DIGITS.get(word, word) for word in re.split(r"\s+", text.strip()))


def metrics(said: Sequence[str], wanted: Sequence[str], task: Task) -> list[Metric]:
    """Word error rate, character error rate, and the share of utterances without an error."""
    import jiwer

    errors, words, wrong, letters = [], [], [], []
    for answer, target in zip(map(plain, said), map(plain, wanted), strict=True):
        if not target:
            raise BadInput("a label holds no word: nothing can be compared with it")
        found = jiwer.process_words(target, answer)
        errors.append(found.substitutions + found.deletions + found.insertions)
        words.append(len(target.split()))
        spelled = jiwer.process_characters(target, answer)
        wrong.append(spelled.substitutions + spelled.deletions + spelled.insertions)
        letters.append(len(target))
    e, n, c, m = (np.array(values, np.float64) for values in (errors, words, wrong, letters))
    return [
        ratio("word error rate", e, n, lower=True, note=f"{int(n.sum())} words, lower case without punctuation"),
        ratio("character error rate", c, m, lower=True),
        share("right utterances", e == 0),
    ]


def details(said: Sequence[str], wanted: Sequence[str], task: Task, where: str) -> Report:
    """The first three utterances with an error."""
    report = Report()
    wrong = [(a, b) for a, b in zip(said, wanted, strict=True) if plain(a) != plain(b)]
    for answer, target in wrong[:3]:
        report.add("sample", where, answer, note=f"for: {target}")
    return report
