"""Session: a loaded artifact that answers calls; Score: what it says of a given text. Numpy only, no torch.

A runtime (a file in `runtimes/`) has

    available() -> dict[str, str]                       versions and ISA, or raises Missing with the pip line
    accepts(artifact) -> bool                           can it run this artifact's format and task?
    load(artifact, device="cpu", threads=0) -> Session  threads 0 = all cores

and is found by its name: `shelf.find("runtimes", "llamacpp").load(artifact)`. A session of a graph also says what it
takes and gives: `inputs` and `outputs`, each a Signature.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

GRADES = {
    "A": "full logits",
    "B": "teacher-forced log-probabilities with top-k (KL is a bound)",
    "C": "generation only",
}


Signature = dict[str, tuple[str, tuple[int | str | None, ...]]]  # {name: (numpy's dtype, shape)}; free axes: name, None


@dataclass(frozen=True)
class Score:
    """What a session says of a token sequence of length T. Natural logarithms.

    logprob: [T-1] log-probability of token t+1 given tokens 0..t.
    top_ids, top_logprob: [T-1, k] the k likeliest next tokens, best first.
    logits: [T-1, vocab] in grade A, else None.
    """

    logprob: np.ndarray
    top_ids: np.ndarray
    top_logprob: np.ndarray
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 = greedy.

    min_p: tokens below this share of the likeliest one's probability are left out.
    repetition_penalty: divides the positive logits of every token in the text so far, multiplies negative ones.
    presence_penalty, frequency_penalty: subtracted once, and per occurrence, for tokens of the answer.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[int, ...] = field(default=())  # token ids that end the answer (not returned)
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@runtime_checkable
class Session(Protocol):
    """One loaded artifact. Thread-safe: calls from several threads are served one after another.

    A session that computes several answers at once says how many by an attribute `parallel`.
    """

    grade: str  # "A", "B" or "C": how strong a proof this runtime allows (GRADES)
    facts: dict[str, str]  # runtime, version, build, isa, threads, device, format

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; for models that are not generators. [batch, ...] arrays in and out, by name."""
        ...

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """Log-probability of each token of `tokens` (as given: no BOS is added) after the first."""
        ...

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yield the ids that follow `tokens`, one by one, without the stop token; ends by itself."""
        ...

    def close(self) -> None:
        """Free memory and threads; further calls are an error."""
        ...


class NoPredict:
    """For sessions of generators: predict is refused."""

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Refused: a generator has no single output."""
        raise NotImplementedError("this session generates text; use score() or generate()")


class NoGenerate:
    """For sessions of models that are not generators: score and generate are refused."""

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """Refused: the model gives no probability of a text."""
        raise NotImplementedError("this session does not generate text; use predict()")

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Refused: the model writes no text."""
        raise NotImplementedError("this session does not generate text; use predict()")


def draw(
    logits: np.ndarray, sampling: Sampling, random: np.random.Generator, text: Sequence[int] = (), prompt: int = 0
) -> int:
    """One token from logits [vocab]: penalties, greedy at temperature 0, else softmax cut by top_k, min_p, top_p.

    text: all tokens so far, the first `prompt` of which are not the answer's; needed where there are penalties.
    """
    logits = penalized(logits, sampling, text, prompt)
    if sampling.temperature <= 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p = p[p >= sampling.min_p]
    p /= p.sum()
    kept = int(np.searchsorted(np.cumsum(p), sampling.top_p) + 1) if sampling.top_p < 1 else len(p)
    p = p[:kept] / p[:kept].sum()
    return int(order[random.choice(len(p), p=p)])


def penalized(logits: np.ndarray, sampling: Sampling, text: Sequence[int], prompt: int) -> np.ndarray:
    """Logits [vocab] after the penalties of tokens that were there."""
    answer = np.asarray(text[prompt:], dtype=np.int64)
    if sampling.repetition_penalty != 1 and len(text):
        logits, seen = logits.copy(), np.unique(np.asarray(text, dtype=np.int64))
        by = sampling.repetition_penalty
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / by, logits[seen] * by)
    if (sampling.presence_penalty or sampling.frequency_penalty) and len(answer):
        logits, (seen, count) = logits.copy(), np.unique(answer, return_counts=True)
        logits[seen] -= sampling.presence_penalty + sampling.frequency_penalty * count
    return logits


def scored(logits: np.ndarray, following: Sequence[int], top_k: int) -> Score:
    """A Score from logits [t, vocabulary] and the ids that follow each [t]."""
    count, vocabulary = logits.shape
    top_k = min(top_k, vocabulary)
    logprob = np.empty(count, dtype=np.float32)
    top_ids = np.empty((count, top_k), dtype=np.int64)
    top_logprob = np.empty((count, top_k), dtype=np.float32)
    for i, row in enumerate(logits):
        wide = row.astype(np.float64)
        most = wide.max()
        norm = most + np.log(np.exp(wide - most).sum())
        logprob[i] = wide[following[i]] - norm
        best = np.argpartition(-row, top_k - 1)[:top_k]
        top_ids[i] = best[np.lexsort((best, -row[best]))]
        top_logprob[i] = wide[top_ids[i]] - norm
    return Score(logprob, top_ids, top_logprob, logits)
