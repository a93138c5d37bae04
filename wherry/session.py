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
    """How tokens are drawn. temperature 0 = greedy."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[int, ...] = field(default=())  # token ids that end the answer (not returned)


@runtime_checkable
class Session(Protocol):
    """One loaded artifact. Thread-safe: calls from several threads are served one after another."""

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


def draw(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """One token from logits [vocab]: greedy at temperature 0, else softmax cut by top_k, then by top_p."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept = int(np.searchsorted(np.cumsum(p), sampling.top_p) + 1) if sampling.top_p < 1 else len(p)
    p = p[:kept] / p[:kept].sum()
    return int(order[random.choice(len(p), p=p)])
