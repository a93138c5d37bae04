"""CE: cross-entropy with the labels, or with the next token.

Source: Szegedy et al. 2016, arXiv:1512.00567, section 7, for the smoothing of labels.
Idea:   -log p[y], and with smoothing e: (1 - e) of it and e / V of -log p over all V classes.
Shapes: logits [B, T, V] or [B, C]; targets [B, T] or [B], IGNORE (-100) where nothing is to be learned.
Cost:   one log-softmax over the logits, in float32.
Fails:  BadInput when a label is outside of the logits; the engine checks them before any step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from wherry.objective import IGNORE, Step, Tensors


@dataclass(frozen=True, kw_only=True)
class CE(Step):
    """smoothing: share of the target spread over all classes, 0 to 1."""

    smoothing: float = 0.0

    def loss(self, student: Tensors, teacher: Tensors | None, batch: Tensors) -> tuple[torch.Tensor, Any]:
        """Sum in nats over the targets that count, and their number."""
        logits, targets = student["logits"], batch["targets"]
        total = cross_entropy(
            logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum",
            label_smoothing=self.smoothing,
        )  # fmt: skip
        return total, (targets != IGNORE).sum()
