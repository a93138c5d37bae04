"""KL: the teacher's distribution as the target: forward, reverse or Jensen-Shannon, at a temperature.

Source: Hinton et al. 2015, arXiv:1503.02531 (temperature, T^2); Gu et al. 2023 (MiniLLM, arXiv:2306.08543) for reverse;
    Agarwal et al. 2023 (GKD, arXiv:2306.13649) for the generalised Jensen-Shannon divergence.
Idea:   p = softmax(z_teacher / T), q = softmax(z_student / T), times T^2, so that gradients keep their size:
        forward KL(p || q), reverse KL(q || p), js: b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q.
        As T grows, forward tends to sum (z_t - z_s - means)^2 / 2V: matching of logits.
        A cached teacher knows its k largest; all other classes are one bucket more, whose mass both sides know. That is
        a lower bound of the whole divergence, and equals it at k = V.
Shapes: logits [B, T, V] or [B, C]; top_values (log p) and top_indices [B, T, k]; places without a target are left out.
Cost:   two log-softmaxes of the positions that count, in float32.
Fails:  BadInput when teacher and student have other numbers of classes, or the cache is of another temperature.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from wherry.errors import BadInput
from wherry.objective import IGNORE, Step, Tensors

TINY = -1e-7  # the largest log of a top mass that leaves a rest


@dataclass(frozen=True, kw_only=True)
class KL(Step):
    """temperature: > 0. direction: forward, reverse or js. share: b of js, the teacher's part, 0 < b < 1."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    temperature: float = 1.0
    direction: Literal["forward", "reverse", "js"] = "forward"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.share < 1:
            raise BadInput(f"kl: temperature={self.temperature:g}, share={self.share:g}: T > 0 and 0 < share < 1")

    def loss(self, student: Tensors, teacher: Tensors | None, batch: Tensors) -> tuple[torch.Tensor, Any]:
        """Sum in nats over the positions that count, times T^2, and their number."""
        assert teacher is not None
        keep = (batch["targets"] != IGNORE).flatten()
        log_q = self.log_softmax(student["logits"], keep)
        if "logits" in teacher:
            if teacher["logits"].shape != student["logits"].shape:
                raise BadInput(
                    f"the teacher answers {list(teacher['logits'].shape)}, the student "
                    f"{list(student['logits'].shape)}: their classes or vocabularies differ.\n"
                    "Take a teacher with the student's own tokenizer."
                )
            log_p = self.log_softmax(teacher["logits"], keep)
        else:
            log_p, log_q = self.buckets(teacher, log_q, keep)
        return self.divergence(log_p, log_q).sum() * self.temperature**2, keep.sum()

    def log_softmax(self, logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Log softmax(z / T) [positions, V] in float32."""
        return (logits.flatten(0, -2)[keep].float() / self.temperature).log_softmax(-1)

    def buckets(self, teacher: Tensors, log_q: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both distributions over the teacher's k classes and the rest: [positions, k + 1], or k = V alone."""
        if float(teacher["temperature"]) != self.temperature:
            made = float(teacher["temperature"])
            raise BadInput(f"the teacher's cache is of temperature {made:g}, kl of {self.temperature:g}: make it again")
        place = teacher["top_indices"].flatten(0, -2)[keep].long()
        log_p = teacher["top_values"].flatten(0, -2)[keep].float()
        if place.shape[-1] == log_q.shape[-1]:
            return log_p, log_q.gather(-1, place)
        rest_p = log_rest(log_p.logsumexp(-1, keepdim=True))
        rest_q = log_q.scatter(-1, place, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_p, rest_p], -1), torch.cat([log_q.gather(-1, place), rest_q], -1)

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Of each position: [positions]."""
        if self.direction == "forward":
            return one_way(log_p, log_q)
        if self.direction == "reverse":
            return one_way(log_q, log_p)
        b = torch.tensor(self.share, device=log_p.device)
        log_m = torch.logaddexp(log_p + b.log(), log_q + (1 - b).log())
        return b * one_way(log_p, log_m) + (1 - b) * one_way(log_q, log_m)


def one_way(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last axis; 0 log 0 = 0."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_rest(log_mass: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(log_mass)), for a mass that rounding may bring to 1."""
    return torch.log(-torch.expm1(log_mass.clamp(max=TINY)))
