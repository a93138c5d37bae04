"""Held-out: a model judged on data that it does not learn from, each source by itself and all together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wherry.objective import IGNORE
from wherry.train.samples import Joined, Samples
from wherry.train.text import Batch

if TYPE_CHECKING:
    from wherry.train.learner import Learner


@dataclass(frozen=True)
class Judged:
    """Of one source: mean cross-entropy in nats per target, share of targets that are likeliest, number of targets.

    bits_per_byte: of texts, the mean's code length of all tokens but the first over the text's UTF-8 bytes; else None.
    """

    name: str
    loss: float
    accuracy: float
    count: float
    bits_per_byte: float | None = None


class HeldOut:
    """Held-out data of a run. size: samples at once on a rank."""

    def __init__(self, data: Joined, size: int) -> None:
        self.data, self.size = data, size
        names = [part.name for part in data.parts]
        self.names = [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]

    def measure(self, learner: "Learner") -> list[Judged]:
        """Of each source, on every rank the same."""
        return [self._one(name, part, learner) for name, part in zip(self.names, self.data.parts, strict=True)]

    def _one(self, name: str, part: Samples, learner: "Learner") -> Judged:
        total, right, count = learner.measure(self._batches(part, learner.world.data_rank, learner.world.data_size))
        loss, size, bits = total / max(1.0, count), getattr(part, "size", 0), None
        if size:
            bits = loss * (len(part.tokens) - 1) / math.log(2) / size  # type: ignore[attr-defined]
        return Judged(name, loss, right / max(1.0, count), count, bits)

    def _batches(self, part: Samples, rank: int, ranks: int) -> Iterator[Batch]:
        """Every rank as many batches as the others; one that has no more gives one that counts nothing."""
        for start in range(0, len(part), self.size * ranks):
            ids = np.arange(start + rank * self.size, min(start + (rank + 1) * self.size, len(part)))
            batch = part.batch(ids if len(ids) else np.zeros(1, np.int64))
            if not len(ids):
                batch["targets"] = torch.full_like(batch["targets"], IGNORE)
            yield batch


def together(found: list[Judged]) -> tuple[float, float]:
    """Loss and accuracy over the targets of all sources."""
    count = max(1.0, sum(one.count for one in found))
    return tuple(sum(getattr(one, name) * one.count for one in found) / count for name in ("loss", "accuracy"))
