"""Rounding: learn which way each weight rounds, and its scale, so that whole blocks give what they gave before.

Source: Nagel et al. 2020 (AdaRound, arXiv:2004.10568); Li et al. 2021 (BRECQ, arXiv:2102.05426) for blocks;
    Cheng et al. 2023 (AutoRound, arXiv:2309.05516) for a plain shift v in place of a sigmoid.
Idea:   code = round(x + v), scale = s exp(a). Over v and a minimise the mean over tokens of
        ||block(compressed x) - y||^2 / ||y||^2, y = block(original x), by Adam with gradients straight through the
        rounding, a falling rate, one batch of windows a step; keep the best state seen.
Shapes: x, v [n, k]; a [n, g]; ops/latent.py.
Cost:   `iters` forward and backward passes of a block over one batch; the activations of all batches, twice.
Fails:  never: if no state is better than where it began, that is what stays.
Differs: it begins at the codes of the solver before it (`gptq | rounding`); alone at rounding in searched ranges. Its
        target is the original's output for the original's input, its input what the compressed blocks put out.
"""

from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.ops import grid
from wherry.ops.latent import Call, Latent, learn, relative_error
from wherry.recipe import Pass
from wherry.scheme import QTensor


@dataclass(frozen=True, kw_only=True)
class Rounding(Pass):
    """iters: steps of Adam. lr: of the codes, in code units. lr_scale: of the logarithms of scales."""

    iters: int = 200
    lr: float = 0.005
    lr_scale: float = 0.002

    def __post_init__(self) -> None:
        if self.iters < 1 or self.lr < 0 or self.lr_scale < 0:
            raise BadInput(f"rounding: iters={self.iters}, lr={self.lr:g}: one step at least, rates not negative")

    def solve(self, w: torch.Tensor, stat: None = None, notes: list[str] | None = None) -> QTensor:
        """Where learning begins when no other step came before: the nearest codes in searched ranges."""
        return grid.encode(w, self.scheme, *grid.search(w, self.scheme, self.rounding))

    def fit(self, call: Call, latents: dict[str, Latent], targets: list[torch.Tensor], notes: list[str]) -> None:
        """Move the latents of one block so that call(weights, i) is near targets[i]."""

        def loss(i: int) -> torch.Tensor:
            return relative_error(call({name: q.weight() for name, q in latents.items()}, i), targets[i])

        first, last = learn(loss, latents.values(), [], len(targets), self.iters, self.lr, self.lr_scale, 0.0)
        notes.append(f"block error {first:.3g} before learning, {last:.3g} after")
