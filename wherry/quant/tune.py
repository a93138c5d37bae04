"""Tune: move scales, norms and, if wanted, codes of the whole model until it answers as the original did.

Source: Chen et al. 2024 (EfficientQAT, arXiv:2407.11062) for end-to-end training of scales on fixed codes; Nagel et
    al. 2020 (arXiv:2004.10568) for learned codes; Hinton et al. 2015 (arXiv:1503.02531) for the original as teacher.
Idea:   minimise KL(original || compressed) of the next token over the calibration windows (without logits the relative
        error of its last hidden state) by Adam over a (scales s exp(a)), norms, and v (codes round(x + v)).
        The state with the least loss over a whole round of the windows stays.
Shapes: a [n, g]; v [n, k]; ops/latent.py.
Cost:   `epochs` forward and backward passes of the whole model over the windows, and the original beside it: both in
        float32 in memory with gradients and Adam's moments.
Fails:  Diverged when the loss is not finite.
Differs: all of scales, norms and codes together, with one falling rate each.
"""

from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.ops.latent import Latent, Loss, learn
from wherry.recipe import Pass


@dataclass(frozen=True, kw_only=True)
class Tune(Pass):
    """epochs: rounds of the windows. lr, lr_scale, lr_norm: rates of codes, scales, norms; 0 leaves them."""

    epochs: int = 8
    lr: float = 0.001
    lr_scale: float = 0.002
    lr_norm: float = 0.001

    def __post_init__(self) -> None:
        if self.epochs < 1 or min(self.lr, self.lr_scale, self.lr_norm) < 0:
            raise BadInput(f"tune: epochs={self.epochs}: one round at least, and rates that are not negative")
        if max(self.lr, self.lr_scale, self.lr_norm) == 0:
            raise BadInput("tune: all rates are 0, so nothing would move; leave tune out, or one rate at its default")

    def tune(
        self, loss: Loss, latents: dict[str, Latent], free: list[torch.Tensor], batches: int, notes: list[str]
    ) -> None:
        """Move latents and free tensors (norms) so that loss(i) falls over all batches."""
        iters = self.epochs * batches
        first, last = learn(loss, latents.values(), free, batches, iters, self.lr, self.lr_scale, self.lr_norm)
        notes.append(f"distance from the original {first:.3g} before tuning, {last:.3g} after")
