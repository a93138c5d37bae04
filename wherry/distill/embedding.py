"""Embedding: the student's sentence embeddings near the teacher's.

Source: Reimers & Gurevych 2020, arXiv:2004.09813 (an embedding as the target); Park et al. 2019 (relational knowledge
    distillation, arXiv:1904.05068) for similarities within a batch.
Idea:   e = mean over tokens (or the first) of the last hidden state. direct: 1 - cos(e, e_t). similarity: over the
        sentences of one batch, ||g - g_t||^2, g a row of the cosines of all pairs; it takes embeddings of any width.
Shapes: hidden_states[-1] [B, T, d]; targets [B, T], IGNORE at padding. On ranks or micro-batches the batch of
        `similarity` is what one rank sees at once.
Cost:   linear in the states; similarity B^2.
Fails:  BadInput when widths differ and match is direct.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity, normalize

from wherry.errors import BadInput
from wherry.objective import IGNORE, Step, Tensors


@dataclass(frozen=True, kw_only=True)
class Embedding(Step):
    """match: direct or similarity. pooling: mean or first (the token that BERT calls CLS).

    dropout: whether the student keeps its own; the teacher has none, and what is dropped is noise in the distance.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "hidden"})
    match: Literal["direct", "similarity"] = "direct"
    pooling: Literal["mean", "first"] = "mean"
    dropout: bool = False

    def prepare(self, module: torch.nn.Module, checkpoint: Any) -> None:
        """Switch the student's dropout off, if wanted."""
        for layer in module.modules():
            if isinstance(layer, torch.nn.Dropout) and not self.dropout:
                layer.p = 0.0

    def count(self, batch: Tensors) -> int:
        """Sentences."""
        return len(batch["targets"])

    def loss(self, student: Tensors, teacher: Tensors | None, batch: Tensors) -> tuple[torch.Tensor, Any]:
        """Sum over the sentences of a batch, and their number."""
        assert teacher is not None
        mask = batch["targets"] != IGNORE
        theirs = mask if teacher.get("mask") is None else teacher["mask"] > 0  # it may cut texts into other tokens
        e = self.pooled(student["hidden_states"][-1].float(), mask)
        target = self.pooled(teacher["hidden_states"][-1].float(), theirs).detach()
        if self.match == "similarity":
            g, g_t = (normalize(x, dim=-1) @ normalize(x, dim=-1).T for x in (e, target))
            return (g - g_t).square().sum(), len(mask)
        if e.shape != target.shape:
            raise BadInput(
                f"embeddings of {e.shape[-1]} and {target.shape[-1]} numbers cannot be compared one by one: "
                "embedding:match=similarity can"
            )
        return (1 - cosine_similarity(e, target, dim=-1)).sum(), len(mask)

    def pooled(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, d] of [B, T, d]."""
        if self.pooling == "first":
            return hidden[:, 0]
        keep = mask[..., None].to(hidden.dtype)
        return (hidden * keep).sum(1) / keep.sum(1).clamp(min=1)
