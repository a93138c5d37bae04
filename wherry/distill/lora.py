"""LoRA: train a low-rank addition to each linear layer; merged into the weight at the end.

Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732) for the scale alpha / sqrt(r).
Idea:   W' = W + c B A with W frozen, A drawn, B zero, so that it begins at W. After training W' is the weight: nothing
        is left of the adapter in the model that ships.
Shapes: W [n, k] (a convolution's [o, i, h, w] as [o, i h w]); A [r, k]; B [n, r].
Cost:   gradients and optimizer states for r (n + k) numbers a layer; the product B A at every step.
Fails:  BadInput when no layer fits `targets`, or the rank is below 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from wherry.errors import BadInput
from wherry.gait import matches
from wherry.objective import Step


@dataclass(frozen=True, kw_only=True)
class Lora(Step):
    """rank: of the addition. alpha: its scale, over rank, or over its root with rs=true.

    targets, ignore: layers, by name, last part, or `re:` pattern; by default every linear layer but the head.
    """

    rank: int = 16
    alpha: float = 32.0
    rs: bool = False
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise BadInput(f"lora: rank={self.rank}, alpha={self.alpha:g}: both must be positive")

    def prepare(self, module: torch.nn.Module, checkpoint: Any = None) -> None:
        """Freeze everything, add A and B to the layers."""
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        found = self.layers(module)
        if not found:
            raise BadInput(f"lora: no linear layer fits targets={';'.join(self.targets) or 'all'}")
        scale = self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)
        for layer in found.values():
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, self.rank, scale), unsafe=True)

    def finish(self, module: torch.nn.Module, checkpoint: Any = None) -> None:
        """Merge: the weights are W + c B A from now on."""
        for layer in module.modules():
            if parametrize.is_parametrized(layer, "weight"):
                steps = layer.parametrizations["weight"]  # type: ignore[index]
                if any(isinstance(step, LowRank) for step in steps):
                    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)

    def layers(self, module: torch.nn.Module) -> dict[str, Any]:
        """The layers that get an addition, by path."""
        kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        return {
            path: layer
            for path, layer in module.named_modules()
            if isinstance(layer, kinds)
            and (not self.targets or any(matches(p, path) for p in self.targets))
            and not any(matches(p, path) for p in self.ignore)
        }


class LowRank(torch.nn.Module):
    """The parametrization: w to w + c B A."""

    def __init__(self, w: torch.Tensor, rank: int, scale: float) -> None:
        super().__init__()
        n, k = w.flatten(1).shape
        bound = 1 / math.sqrt(k)  # as torch draws a Linear, and peft draws A
        self.A = torch.nn.Parameter(torch.empty(rank, k, device=w.device).uniform_(-bound, bound))
        self.B = torch.nn.Parameter(torch.zeros(n, rank, device=w.device))
        self.scale = scale

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """The weight with its addition."""
        return w + (self.scale * (self.B @ self.A)).reshape(w.shape).to(w.dtype)
