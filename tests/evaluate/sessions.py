"""Small real sessions whose answers are known in closed form."""

from collections.abc import Iterator, Sequence

import numpy as np

from wherry.session import NoPredict, Sampling, Score


def as_score(logits: np.ndarray, tokens: Sequence[int], top_k: int, keep_logits: bool = True) -> Score:
    """A score from logits [T - 1, vocab], by plain numpy in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logprob = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    top = np.argsort(-logprob, axis=-1, kind="stable")[:, :top_k]
    given = logprob[np.arange(len(logprob)), np.asarray(tokens[1:])]
    return Score(given, top, np.take_along_axis(logprob, top, -1), logits if keep_logits else None)


class Fixed(NoPredict):
    """Says the same distribution of the next token at every place."""

    facts: dict[str, str] = {}

    def __init__(self, p: Sequence[float], grade: str = "A") -> None:
        with np.errstate(divide="ignore"):
            self.logits = np.log(np.asarray(p, dtype=np.float64))
        self.grade = grade

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        return as_score(np.tile(self.logits, (len(tokens) - 1, 1)), tokens, top_k, self.grade == "A")

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        yield from [int(self.logits.argmax())] * sampling.max_tokens

    def close(self) -> None:
        pass


class Seeded(Fixed):
    """Random logits that depend on the window alone, plus noise of its own."""

    def __init__(self, vocab: int, noise: float, seed: int, grade: str = "A") -> None:
        super().__init__([1 / vocab] * vocab, grade)
        self.vocab, self.noise, self.seed = vocab, noise, seed

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        shape = (len(tokens) - 1, self.vocab)
        base = np.random.default_rng([int(t) for t in tokens]).standard_normal(shape) * 2
        own = np.random.default_rng([self.seed, *map(int, tokens)]).standard_normal(shape) * self.noise
        return as_score((base + own).astype(np.float32), tokens, top_k, self.grade == "A")
