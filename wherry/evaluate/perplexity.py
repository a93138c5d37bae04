"""Perplexity: exp of the mean negative log-probability of each token given those before it.

Shapes: windows [count][length] token ids; nll one float64 array [length - 1] per window, natural logarithms.
Cost:   one teacher-forced pass over the windows; nothing but one number per token is kept.
Source: the windows do not overlap, so a token sees at most length - 1 others: figures of sliding windows are lower.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from wherry.errors import BadInput, Unsupported
from wherry.evaluate import interval
from wherry.report import Report
from wherry.session import Score

Progress = Callable[[int, int, str], None]
Windows = Sequence[Sequence[int]] | np.ndarray


class Scorer(Protocol):
    """What these measures need: a `Session`, or a `Record` of one."""

    grade: str

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """See `Session.score`."""
        ...


def silent(done: int, total: int, text: str) -> None:
    """A progress that shows nothing."""


def perplexity(
    session: Scorer, windows: Windows, where: str = "", progress: Progress = silent
) -> tuple[list[np.ndarray], Report]:
    """Negative log-probabilities of every window, and a report with one row "perplexity".

    Raises:
        Unsupported: the runtime cannot score a given text (grade C).
        BadInput: no window, or one of fewer than two tokens.
    """
    check(windows, session)
    nll = []
    for i, window in enumerate(windows):
        nll.append(-session.score(ids(window), top_k=1).logprob.astype(np.float64))
        progress(i + 1, len(windows), f"perplexity of {where}".rstrip(" of"))
    report = Report()
    add(report, where, nll)
    return nll, report


def add(report: Report, where: str, nll: list[np.ndarray]) -> None:
    """Append the row "perplexity" made of the windows' negative log-probabilities."""
    bad = sum(int((~np.isfinite(window)).sum()) for window in nll)
    total = sum(len(window) for window in nll)
    if bad:
        report.add("perplexity", where, None, note=f"{bad} of {total} tokens have a log-probability that is not finite")
        return
    found = interval.mean(nll)
    low, high = (None if end is None else bounded_exp(end) for end in (found.low, found.high))
    note = f"{total} tokens in {len(nll)} windows; 95% interval over windows"
    report.add("perplexity", where, bounded_exp(found.value), "", low, high, note)


def bounded_exp(x: float) -> float:
    """exp(x), at most 1e300, so that it stays a number in JSON."""
    return float(np.exp(min(x, 690.0)))


def ids(window: Any) -> list[int]:
    """Plain integers of one window."""
    return [int(token) for token in window]


def check(windows: Windows, *sessions: Scorer) -> None:
    """Refuse windows or sessions that cannot be scored."""
    if len(windows) == 0 or min(len(window) for window in windows) < 2:
        raise BadInput("nothing to score: give at least one window of two tokens or more")
    for session in sessions:
        if session.grade == "C":
            raise Unsupported(
                "this runtime only generates text (grade C), it cannot score a given one.\nUse another runtime."
            )
