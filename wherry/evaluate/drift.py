"""Drift: how far a model's predictions moved from a reference's, on the same text, token by token.

    KL(reference || other) in nats per token      0 = the same predictions
    top-1 agreement in %                          how often both would say the same next token
    perplexity ratio, paired                      other / reference, the same windows in both

Idea:   exact where both give full logits (grade A). Else the tokens that both know (top-k and the scored one) stand
        alone and all others are one bucket: by the log-sum inequality that is a LOWER bound of KL, and is called so.
Shapes: Score.logits [length - 1, vocab], of one window at a time; sums in float64, 64 tokens at once.
Cost:   one pass of each model over the windows; 4 bytes x length x vocab per model that gives logits.
Source: Kullback & Leibler 1951; Cover & Thomas, Elements of Information Theory, 2.7 (log-sum inequality).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wherry.errors import BadInput, Corrupt
from wherry.evaluate import interval
from wherry.evaluate import perplexity as ppl
from wherry.evaluate.perplexity import Progress, Scorer, Windows, silent
from wherry.report import Report
from wherry.session import GRADES, Score

CHUNK = 64  # tokens whose float64 log-probabilities are in memory at once
FLOOR = 1e-7  # mass below which a remainder is rounding of float32 log-probabilities


@dataclass
class Record:
    """Stored scores of a session (top-k, no logits): a reference that need not be loaded again. Grade B."""

    scores: dict[str, Score] = field(default_factory=dict)
    grade: str = "B"

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """The stored score of exactly these tokens. Raises BadInput when they were not recorded."""
        found = self.scores.get(_key(tokens))
        if found is None:
            raise BadInput("this window is not in the recorded reference: record it again on the same data")
        return found

    def save(self, path: Path) -> None:
        """Write an .npz without pickles, under a temporary name first."""
        arrays = {f"{key}/{name}": getattr(s, name) for key, s in self.scores.items() for name in _FIELDS}
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read what `save` wrote. Raises Corrupt when it is not that."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                keys = dict.fromkeys(name.split("/")[0] for name in arrays.files)
                return cls({key: Score(*(arrays[f"{key}/{name}"] for name in _FIELDS)) for key in keys})
        except (ValueError, KeyError, EOFError) as error:
            raise Corrupt(f"{path} is not a record written by wherry: {error}") from error


_FIELDS = ("logprob", "top_ids", "top_logprob")


def _key(tokens: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()[:32]


def record(session: Scorer, windows: Windows, top_k: int = 256, progress: Progress = silent) -> Record:
    """Score every window once and keep the top-k: 8 bytes x top_k x tokens."""
    ppl.check(windows, session)
    kept = Record()
    for i, window in enumerate(windows):
        score = session.score(ppl.ids(window), top_k=top_k)
        kept.scores[_key(ppl.ids(window))] = Score(
            score.logprob.astype(np.float32), score.top_ids.astype(np.int32), score.top_logprob.astype(np.float32)
        )
        progress(i + 1, len(windows), "recording the reference")
    return kept


def compare(
    reference: Scorer,
    session: Scorer,
    windows: Windows,
    where: str = "artifact",
    original: str = "original",
    top_k: int = 64,
    progress: Progress = silent,
) -> Report:
    """Drift of one session from the reference; see `compare_all`."""
    return compare_all(reference, {where: session}, windows, original, top_k, progress)


def compare_all(
    reference: Scorer,
    sessions: Mapping[str, Scorer],
    windows: Windows,
    original: str = "original",
    top_k: int = 64,
    progress: Progress = silent,
) -> Report:
    """Drift of several sessions from one reference, which scores every window only once.

    Returns rows "perplexity" of the original and of each name, and for each name "perplexity ratio", "kl" and
    "top-1 agreement", with 95% intervals over windows; a session of grade C has rows without a value and the reason.

    Raises:
        Unsupported: the reference cannot score a given text.
        BadInput: nothing to score, or vocabularies of different sizes.
    """
    ppl.check(windows, reference)
    able = {name: session for name, session in sessions.items() if session.grade != "C"}
    base: list[np.ndarray] = []
    nll: dict[str, list[np.ndarray]] = {name: [] for name in able}
    kl: dict[str, list[np.ndarray]] = {name: [] for name in able}
    unseen: dict[str, list[np.ndarray]] = {name: [] for name in able}
    agree: dict[str, list[np.ndarray]] = {name: [] for name in able}
    for i, window in enumerate(windows):
        tokens = ppl.ids(window)
        first = reference.score(tokens, top_k=top_k)
        base.append(-first.logprob.astype(np.float64))
        for name, session in able.items():
            other = session.score(tokens, top_k=top_k)
            if other.logprob.shape != first.logprob.shape:
                raise BadInput(
                    f"{name} scores {len(other.logprob)} tokens where {original} scores {len(first.logprob)}"
                )
            nll[name].append(-other.logprob.astype(np.float64))
            divergence, rest = kl_per_token(first, other, np.asarray(tokens[1:]))
            kl[name].append(divergence)
            unseen[name].append(rest)
            agree[name].append(first.top_ids[:, 0] == other.top_ids[:, 0])
        progress(i + 1, len(windows), f"drift from {original}")
    report = Report()
    ppl.add(report, original, base)
    for name, session in sessions.items():
        if name not in able:
            for what in ("perplexity", "perplexity ratio", "kl", "top-1 agreement"):
                report.add(what, name, None, note=f"grade C: {GRADES['C']}")
            continue
        exact = reference.grade == "A" and session.grade == "A"
        ppl.add(report, name, nll[name])
        _ratio(report, name, base, nll[name], original)
        _kl(report, name, kl[name], unseen[name], exact, original)
        found = interval.share(agree[name])
        low, high = (None if end is None else 100 * end for end in (found.low, found.high))
        note = f"same likeliest next token as {original}"
        report.add("top-1 agreement", name, 100 * found.value, "%", low, high, note)
    return report


def _ratio(report: Report, where: str, base: list[np.ndarray], nll: list[np.ndarray], original: str) -> None:
    change = [b - a for a, b in zip(base, nll, strict=True)]
    if not all(np.isfinite(window).all() for window in change):
        report.add("perplexity ratio", where, None, note="log-probabilities that are not finite")
        return
    found = interval.mean(change)
    low, high = (None if end is None else ppl.bounded_exp(end) for end in (found.low, found.high))
    note = f"to {original}, the same windows in both"
    report.add("perplexity ratio", where, ppl.bounded_exp(found.value), "", low, high, note)


def _kl(report: Report, where: str, kl: list[np.ndarray], unseen: list[np.ndarray], exact: bool, original: str) -> None:
    total = sum(len(window) for window in kl)
    bad = sum(int((~np.isfinite(window)).sum()) for window in kl)
    if bad:
        note = f"not finite at {bad} of {total} tokens: NaN, or no probability at all for what {original} expects"
        report.add("kl", where, None, "nats/token", note=note)
        return
    found = interval.mean(kl)
    low = None if found.low is None else max(0.0, found.low)
    mass = float(np.mean(np.concatenate(unseen)))
    note = f"KL({original} || {where}), exact from full logits"
    if not exact:
        note = f"lower bound of KL({original} || {where}): the mass beyond the top lists ({mass:.2%}) is one bucket"
    report.add("kl", where, found.value, "nats/token", low, found.high, note)


def kl_per_token(reference: Score, other: Score, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || other) per token [length - 1], and the reference's mass in the remainder bucket (0 if exact).

    Args:
        reference, other: scores of the same tokens.
        following: [length - 1] the tokens that were scored, which both know beside their top-k.
    """
    if reference.logits is not None and other.logits is not None:
        return _exact(reference.logits, other.logits), np.zeros(len(following))
    ids, use = _known(reference if reference.logits is None else other, following)
    p, q = _lookup(reference, ids, following), _lookup(other, ids, following)
    broken = ~(np.isfinite(reference.logprob) & np.isfinite(other.logprob))
    with np.errstate(invalid="ignore"):
        use &= ~np.isnan(p) & ~np.isnan(q)
        mass_p, mass_q = np.where(use, np.exp(p), 0.0), np.where(use, np.exp(q), 0.0)
        terms = np.where(use & (mass_p > 0), mass_p * (p - q), 0.0).sum(-1)
    rest_p, rest_q = (np.maximum(1.0 - mass.sum(-1), FLOOR) for mass in (mass_p, mass_q))
    kl = np.maximum(terms + rest_p * np.log(rest_p / rest_q), 0.0)
    return np.where(broken, np.nan, kl), rest_p


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _exact(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    if reference.shape != other.shape:
        raise BadInput(f"logits of different shapes, {reference.shape} and {other.shape}: not the same tokenizer")
    kl = np.empty(len(reference))
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, len(reference), CHUNK):
            p, q = _log_softmax(reference[i : i + CHUNK]), _log_softmax(other[i : i + CHUNK])
            kl[i : i + CHUNK] = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(-1)
    return np.where(kl > -1e-9, np.maximum(kl, 0.0), kl)


def _known(score: Score, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids that a score without logits knows [T, k + 1], and which of them count (the scored token only once)."""
    ids = np.concatenate([score.top_ids.astype(np.int64), following[:, None].astype(np.int64)], axis=1)
    use = np.ones(ids.shape, dtype=bool)
    use[:, -1] = ~(score.top_ids == following[:, None]).any(-1)
    return ids, use


def _lookup(score: Score, ids: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Log-probabilities of ids [T, m] as float64; NaN where the score does not know them."""
    if score.logits is not None:
        if ids.max() >= score.logits.shape[-1]:
            raise BadInput(f"a token id beyond the vocabulary of {score.logits.shape[-1]}: not the same tokenizer")
        out = np.empty(ids.shape)
        for i in range(0, len(ids), CHUNK):
            out[i : i + CHUNK] = np.take_along_axis(_log_softmax(score.logits[i : i + CHUNK]), ids[i : i + CHUNK], -1)
        return out
    mine, _ = _known(score, following)
    logprob = np.concatenate([score.top_logprob, score.logprob[:, None]], axis=1).astype(np.float64)
    same = ids[:, :, None] == mine[:, None, :]  # [T, m, k + 1]
    return np.where(same.any(-1), np.take_along_axis(logprob, same.argmax(-1), -1), np.nan)
