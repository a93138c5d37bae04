"""Hidden: the student's hidden states near the teacher's, layer by layer.

Source: Romero et al. 2015 (FitNets, arXiv:1412.6550); Sanh et al. 2019 (DistilBERT, arXiv:1910.01108) for cosine; Tung
    & Mori 2019, arXiv:1907.09682 (similarities of tokens), which needs no projection between widths.
Idea:   student layer i of n is held to teacher layer round(i N / n) of N. Of a token h against h_t:
        relative ||h - h_t||^2 / ||h_t||^2; cosine 1 - cos(h, h_t); similarity, over the tokens of one sequence,
        ||g - g_t||^2 / tokens, g a row of the cosines of all pairs of tokens.
Shapes: hidden_states: tuple of [B, T, d], the embedding's first (it is left out). Only similarity takes other widths d.
Cost:   relative, cosine: linear in the states. similarity: T^2 per sequence and layer.
Fails:  BadInput when widths differ and match is not similarity.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import cosine_similarity, normalize

from wherry.errors import BadInput
from wherry.objective import IGNORE, Step, Tensors


@dataclass(frozen=True, kw_only=True)
class Hidden(Step):
    """match: relative, cosine or similarity. layers: all, or last."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "hidden"})
    match: Literal["relative", "cosine", "similarity"] = "relative"
    layers: Literal["all", "last"] = "all"

    def loss(self, student: Tensors, teacher: Tensors | None, batch: Tensors) -> tuple[torch.Tensor, Any]:
        """Mean over pairs of layers, summed over what counts: tokens with a target, or labelled examples."""
        assert teacher is not None
        ours, theirs = student["hidden_states"][1:], teacher["hidden_states"][1:]
        pairs = couples(len(ours), len(theirs))
        pairs = pairs[-1:] if self.layers == "last" else pairs
        total = torch.stack([self.distance(ours[i], theirs[j].detach()) for i, j in pairs]).mean(0)
        return counted(total, batch["targets"])

    def distance(self, h: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of each token: [B, T]."""
        h, target = h.float(), target.float()
        if self.match == "similarity":
            g, g_t = (normalize(x, dim=-1) @ normalize(x, dim=-1).transpose(-1, -2) for x in (h, target))
            return (g - g_t).square().mean(-1)
        if h.shape[-1] != target.shape[-1]:
            raise BadInput(
                f"hidden states of {h.shape[-1]} and {target.shape[-1]} numbers cannot be compared one by one: "
                "hidden:match=similarity can"
            )
        if self.match == "cosine":
            return 1 - cosine_similarity(h, target, dim=-1)
        return (h - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)


def couples(student: int, teacher: int) -> list[tuple[int, int]]:
    """Which of the teacher's layers each of the student's is held to, counted from 0; the last to the last."""
    return [(i, max(0, round((i + 1) * teacher / student) - 1)) for i in range(student)]


def counted(distance: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of distances [B, T] over targets [B, T] that count, or of their means over T for targets [B]."""
    keep = targets != IGNORE
    if distance.shape != targets.shape:
        distance = distance.flatten(1).mean(-1)
    return (distance * keep).sum(), keep.sum()
