"""Step: one step of a training recipe. Objective: the steps together, as text, parsed like a compression recipe.

    "kl:temperature=2 | ce:weight=0.1 | qat:scheme=W2A16_ASYM,group_size=64"

A step is a frozen dataclass on the shelf `distill`: its fields are its knobs. By what it defines the engine knows it:

    loss(student, teacher, batch) -> (sum, count)    a term of the loss; the engine divides the sum by the global count
    count(batch) -> int                              the count of `loss`, before it is computed
    penalty(w) -> scalar                             a term that is a sum over a trainable weight's elements
    prepare(module, checkpoint) -> None              changes the student before training: adapters, fake quantizers
    after(module, step) -> None                      after each update of the weights, without gradients
    finish(module, checkpoint) -> None               folds back what `prepare` did, on one process, before the export
    sample(module, batch, step) -> batch             a batch that the student wrote itself, in place of the data's

`student` and `teacher` map names to tensors: `logits` [B, T, V] or [B, C], and `hidden_states` (tuple of [B, T, d]),
`attentions` (tuple of [B, heads, T, T]) when `needs` asks for them. A cached teacher may give `top_values` and
`top_indices` [B, T, k] in place of logits. `batch` has the model's inputs and `targets` [B, T] or [B]: what the logits
at the same place ought to say, IGNORE where nothing.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from wherry import shelf
from wherry.errors import BadInput, Unsupported
from wherry.knobs import spell, split, values

IGNORE = -100  # a target that does not count
GAITS = ("loss", "penalty", "prepare", "after", "finish", "sample")
NEEDS = ("teacher", "hidden", "attention")
Tensors = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. Subclasses are files on the shelf `distill`; their fields are knobs.

    weight: factor of its term in the loss. needs: of "teacher", "hidden", "attention".
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    weight: float = 1.0

    def count(self, batch: Tensors) -> int:
        """How many things the sum of `loss` is over, known from the batch alone: by default its targets that count."""
        return int((batch["targets"] != IGNORE).sum())

    @property
    def method(self) -> str:
        """Its name on the shelf."""
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return spell(self, [item.name for item in dataclasses.fields(self)])


def build(method: str, knobs: Mapping[str, Any]) -> Step:
    """A step from its name and its knobs as text.

    Raises:
        Unsupported: no such step; BadInput: no such knob, or a value of the wrong type.
    """
    kind = shelf.load("distill", method)
    if not issubclass(kind, Step):
        raise Unsupported(f"{method} is a step of compression recipes, not of training: wherry compress --recipe")
    return kind(**values(kind, method, knobs, [item.name for item in dataclasses.fields(kind)]))


@dataclass(frozen=True)
class Objective:
    """Steps in order."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps))

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Read "STEP:knob=value,knob=value | STEP ...".

        Raises BadInput or Unsupported, naming what is wrong and the nearest that is right.
        """
        made = cls(tuple(build(method, knobs) for method, knobs in split(text, "STEP")))
        if not made.losses:
            raise BadInput(f"recipe '{text}' has no loss to learn from: add ce, or kl with a teacher")
        return made

    @property
    def losses(self) -> tuple[Any, ...]:
        """Steps with a term of the loss that comes from data."""
        return tuple(step for step in self.steps if hasattr(step, "loss"))

    @property
    def needs(self) -> frozenset[str]:
        """What any step needs."""
        return frozenset().union(*(step.needs for step in self.steps))

    def having(self, gait: str) -> tuple[Any, ...]:
        """Steps that define that gait, in order."""
        return tuple(step for step in self.steps if hasattr(step, gait))

    def counts(self, batch: Tensors) -> list[int]:
        """One per loss."""
        return [step.count(batch) for step in self.losses]

    def sums(self, student: Tensors, teacher: Tensors | None, batch: Tensors) -> list[tuple[torch.Tensor, Any]]:
        """Sum and count of each loss, unweighted: what is differentiated, and may be compiled."""
        return [step.loss(student, teacher, batch) for step in self.losses]

    def terms(self, sums: list[tuple[torch.Tensor, Any]], batch: Tensors) -> list[torch.Tensor]:
        """The sums alone.

        Raises BadInput when a step counts otherwise than it said, for the mean would be wrong.
        """
        out = []
        for step, (total, count) in zip(self.losses, sums, strict=True):
            if int(count) != step.count(batch):
                raise BadInput(f"{step.method}: loss is over {int(count)} things, count says {step.count(batch)}")
            out.append(total)
        return out
