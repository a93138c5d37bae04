"""Attention: the student looks where the teacher looks.

Source: Wang et al. 2020 (MiniLM, arXiv:2002.10957) for KL of attention; Jiao et al. 2019 (TinyBERT, arXiv:1909.10351)
    for all layers, evenly spread.
Idea:   KL(teacher's row || student's row) of every token's attention, the mean over heads; with other numbers of heads
        both are averaged over heads first. Student layer i of n is held to teacher layer round(i N / n) of N.
Shapes: attentions: tuple of [B, heads, T, T], rows sum to 1; 0 where a token may not look.
Cost:   attention must be computed without a fused kernel: T^2 numbers per head and layer are kept for gradients.
Fails:  BadInput when the student has no layer that gives its attention.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from wherry.errors import BadInput
from wherry.objective import IGNORE, Step, Tensors

TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Attention(Step):
    """layers: all, or last (as MiniLM)."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "attention"})
    layers: Literal["all", "last"] = "last"

    def loss(self, student: Tensors, teacher: Tensors | None, batch: Tensors) -> tuple[torch.Tensor, Any]:
        """Mean over layers and heads in nats, summed over what counts."""
        assert teacher is not None
        ours = [a for a in student["attentions"] if a is not None]
        theirs = [a for a in teacher["attentions"] if a is not None]
        if not ours or not theirs:
            raise BadInput("attention: the model gives no attention maps; take hidden in its place")
        n, last = len(ours), self.layers == "last"
        pairs = [(i, max(0, round((i + 1) * len(theirs) / n) - 1)) for i in range(n)][-1 if last else 0 :]
        total = torch.stack([distance(ours[i], theirs[j].detach()) for i, j in pairs]).mean(0)
        keep = batch["targets"] != IGNORE
        total = total if total.shape == keep.shape else total.mean(-1)
        return (total * keep).sum(), keep.sum()


def distance(a: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(target || a) of each token, the mean over heads: [B, T]."""
    a, target = a.float(), target.float()
    if a.shape[1] != target.shape[1]:
        a, target = a.mean(1, keepdim=True), target.mean(1, keepdim=True)
    log = target.clamp(min=TINY).log() - a.clamp(min=TINY).log()
    return (target * log).sum(-1).mean(1)
