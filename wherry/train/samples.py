"""Samples: data as tensors, one batch of sample ids at a time.

Text becomes windows or rows of tokens (see `text`); tables with labels, pictures, sounds and arrays become `Examples`,
prepared by the task.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from wherry import data
from wherry.errors import BadInput, Missing
from wherry.objective import IGNORE
from wherry.task import Task
from wherry.train import text
from wherry.train.text import Batch, Cut

TEACHER = "teacher:"  # before the names of inputs that are the teacher's own


class Samples(Protocol):
    """Numbered samples."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of its content."""
        ...

    def __len__(self) -> int: ...

    def batch(self, ids: np.ndarray) -> Batch:
        """The model's inputs and `targets` of these samples, on the CPU."""
        ...


@dataclass
class Examples:
    """Labelled raw examples, made inputs by the task when they are asked for."""

    source: data.Data
    task: Task
    targets: np.ndarray  # int64 [n]

    @property
    def name(self) -> str:
        """The data's."""
        return self.source.name

    @property
    def digest(self) -> str:
        """The data's."""
        return self.source.digest

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, ids: np.ndarray) -> Batch:
        """The task's inputs by name, and `targets` int64 [B]. Raises BadInput for what cannot be decoded."""
        prepared = self.task.prepare([self.source.examples[int(i)] for i in ids])
        made = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in prepared.items()}
        return made | {"targets": torch.from_numpy(self.targets[ids])}


@dataclass
class Sentences:
    """Texts without labels for encoders, one per sample, cut to `length` tokens; `targets` say which tokens are real.

    teacher: the task of a teacher that cuts texts into other tokens; its inputs then are there too, as `teacher:NAME`.
    """

    name: str
    digest: str
    texts: Sequence[str]
    task: Task
    length: int
    teacher: Task | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, ids: np.ndarray) -> Batch:
        """The encoder's inputs by name, int64 [B, longest], and `targets` [B, longest]: 0, or IGNORE at padding."""
        return self.of([self.texts[int(i)] for i in ids])

    def of(self, texts: list[str]) -> Batch:
        """The same of any texts."""
        made = self._inputs(self.task, texts, "")
        made["targets"] = torch.where(made["attention_mask"] > 0, 0, IGNORE)
        return made | (self._inputs(self.teacher, texts, TEACHER) if self.teacher else {})

    def _inputs(self, task: Task, texts: list[str], prefix: str) -> Batch:
        prepared = {name: array[:, : self.length or None].copy() for name, array in task.batch(texts).items()}
        return {prefix + name: torch.from_numpy(array) for name, array in prepared.items()}


@dataclass
class Joined:
    """Several sources; the samples of each are numbered after those of the sources before it."""

    parts: Sequence[Samples]
    weights: list[float]

    @property
    def name(self) -> str:
        """Names of all."""
        return ";".join(part.name for part in self.parts)

    @property
    def digest(self) -> str:
        """Of all digests."""
        return hashlib.sha256("".join(part.digest for part in self.parts).encode()).hexdigest()

    @property
    def sizes(self) -> list[int]:
        """Samples of each."""
        return [len(part) for part in self.parts]

    def __len__(self) -> int:
        return sum(self.sizes)

    def batch(self, ids: np.ndarray) -> Batch:
        """Of one source or of several whose tensors have the same shapes."""
        ends = np.cumsum(self.sizes)
        which = np.searchsorted(ends, ids, side="right")
        sentences = [part for part in self.parts if isinstance(part, Sentences)]
        if len(sentences) == len(self.parts):  # padded together
            starts = ends - self.sizes
            places = zip(which, ids, strict=True)
            return sentences[0].of([sentences[part].texts[int(i - starts[part])] for part, i in places])
        made, rows = [], []
        for i, part in enumerate(self.parts):
            here = np.flatnonzero(which == i)
            if len(here):
                made.append(part.batch(ids[here] - (ends[i] - len(part))))
                rows.append(here)
        if len(made) == 1:
            return made[0]
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        return {name: torch.cat([one[name] for one in made])[back] for name in made[0]}


def told(data: Joined, teacher: Task) -> None:
    """Let sentences be cut into the teacher's tokens too, where its tokenizer is another."""
    for part in data.parts:
        if isinstance(part, Sentences):
            ours, theirs = ((task.folder / "tokenizer.json").read_bytes() for task in (part.task, teacher))
            part.teacher = teacher if ours != theirs else None


def opened(said: str, task: Task, cut: Cut, folder: Path) -> Joined:
    """The samples of "SOURCE*WEIGHT;SOURCE*WEIGHT".

    Args:
        cut: how text becomes samples. folder: where tokens are kept, by what they are made of.

    Raises:
        Missing: no such file. BadInput: nothing in it, no labels, or a label that does not fit (file and line).
    """
    parts, weights = [], []
    for item in said.split(";"):
        name, star, weight = item.rpartition("*")
        try:
            weights.append(float(weight) if star else 1.0)
        except ValueError as error:
            raise BadInput(f"data '{item}': after * a weight is wanted, like corpus.txt*0.7") from error
        if not 0 < weights[-1] < float("inf"):
            raise BadInput(f"data '{item}': the weight must be above 0")
        parts.append(source(Path(name if star else item), task, cut, folder))
    return Joined(parts, weights)


def source(path: Path, task: Task, cut: Cut, folder: Path) -> Samples:
    """One source; see `opened`."""
    if not path.exists():
        raise Missing(f"no such data: {path}\nGive a text, a table, an array file, or a folder of texts or pictures.")
    if task.kind == "text-generation":
        return text.opened(path, task, cut, folder)
    found = data.read(path)
    if task.kind == "sentence-similarity":
        parts = [part for each in found.examples for part in (each if isinstance(each, tuple) else (each,))]
        texts = [line.strip() for part in parts if isinstance(part, str) for line in part.splitlines() if line.strip()]
        if not texts:
            raise BadInput(f"{found.name} has no texts: an encoder learns from sentences, one in a line")
        return Sentences(found.name, found.digest, texts, task, cut.length)
    if found.labels is None:
        raise BadInput(f"{found.name} has no labels: {task.kind} is learned from them. Give a column 'label'.")
    targets = data.targets(found, task)
    if not all(isinstance(target, int | np.integer) for target in targets):
        raise BadInput(f"{task.kind} is not trained here: its labels are no classes ({found.places[0]})")
    return Examples(found, task, np.asarray(targets, np.int64))


