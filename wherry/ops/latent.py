"""Latent codes: a quantized weight that gradients can move, on its own grid at every step.

A code is round(x), where x = code units of the weight, clipped to +-1/2 round the code that a solver chose, plus a
learned shift v; its scale is the solver's times exp(a). Rounding passes gradients straight through. So what is trained
is what is stored: the same clamp, the same rounding of scales, exact zeros kept.
Source: Nagel et al. 2020 (AdaRound, arXiv:2004.10568) and Cheng et al. 2023 (AutoRound, arXiv:2309.05516) for v;
    Esser et al. 2020 (LSQ, arXiv:1902.08153) for scales; Bengio et al. 2013, arXiv:1308.3432 (straight through).
Shapes: w, v [..., n, k]; scale, a [..., n, g]. Memory: 4 floats per weight with Adam's two.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from wherry.errors import Diverged, Unsupported
from wherry.levels import levels
from wherry.ops import grid, tiles
from wherry.ops.solve import neutral
from wherry.scheme import QTensor

INSIDE = 0.49  # how far from its code a latent may begin


Call = Callable[[dict[str, torch.Tensor], int], torch.Tensor]  # (weights by name, batch) -> outputs
Loss = Callable[[int], torch.Tensor]  # batch -> loss


class Latent:
    """One weight. `v` and `a` are what an optimizer moves; `weight()` is the decoded weight with gradients."""

    def __init__(self, q: QTensor, w: torch.Tensor, rounding: grid.Rounding | None) -> None:
        if q.scheme.planes > 1:
            raise Unsupported(f"{q.scheme}: sums of planes have no one step to learn; use W2A16 or gptq alone")
        self.q, self.rounding = q, rounding
        code = q.code.unflatten(-1, (q.scale.shape[-1], -1)).float()
        self.extra = None if q.left is None or q.right is None else q.left @ q.right  # a float correction stays
        exact = (w.float() if self.extra is None else w.float() - self.extra).reshape(code.shape)
        self.null = neutral(q.scheme, q.scale, q.zero)
        self.keep = w.reshape(code.shape) != 0 if self.null is not None else None  # an exact zero stays zero
        at, point = grid.units(exact, q.scheme, q.scale, q.zero), self.point(code)
        if q.scheme.tabled:
            self.x = torch.where(grid.nearest(at, q.scheme) == code, at, point)
        else:
            self.x = torch.maximum(torch.minimum(at, point + INSIDE), point - INSIDE)
        self.v = torch.zeros_like(self.x, requires_grad=True)
        self.a = torch.zeros_like(q.scale, requires_grad=True)

    def point(self, code: torch.Tensor) -> torch.Tensor:
        """Where codes lie in their own units: levels, or integers."""
        if not self.q.scheme.tabled:
            return code
        table = torch.tensor(levels(self.q.scheme.table), device=code.device)
        return table[code.long() - self.q.scheme.qmin]

    def scale(self) -> torch.Tensor:
        """Scales [..., n, g], rounded as they will be stored; gradients pass straight through the rounding."""
        free = self.q.scale * tiles.shared(self.a, self.q.scheme).exp()
        if self.rounding is None:
            return free
        return free + (self.rounding(free.detach()) - free.detach())

    def weight(self) -> torch.Tensor:
        """The decoded weight [..., n, k]."""
        scheme = self.q.scheme
        ends = self.point(torch.tensor([float(scheme.qmin), float(scheme.qmax)])).tolist()
        room = 0.0 if scheme.tabled else 0.5
        x = (self.x + self.v).clamp(ends[0] - room, ends[1] + room)
        point = x + (self.point(grid.nearest(x.detach(), scheme)) - x.detach())
        s = self.scale().unsqueeze(-1)
        if self.q.zero is None:
            value = point * s
        else:
            z = self.q.zero.float().unsqueeze(-1)
            value = (point - scheme.qmin) * s - z if scheme.minimum != "code" else (point - z) * s
        value = (value if self.keep is None else value * self.keep).flatten(-2)
        return value if self.extra is None else value + self.extra

    @torch.no_grad()
    def settle(self) -> QTensor:
        """The codes and scales where the optimizer left them."""
        code = grid.nearest(self.x + self.v, self.q.scheme)
        if self.keep is not None and self.null is not None:
            code = torch.where(self.keep, code, self.null.unsqueeze(-1).expand_as(code))
        return replace(self.q, code=code.to(torch.int8).flatten(-2), scale=self.scale())

    @torch.no_grad()
    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of what was learned, to go back to."""
        return self.v.detach().clone(), self.a.detach().clone()

    @torch.no_grad()
    def restore(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Go back."""
        self.v.copy_(state[0])
        self.a.copy_(state[1])


def relative_error(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ||y - target||^2 / ||target||^2, y [..., k]: what a norm lets through counts, not size."""
    return ((y - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)).mean()


def learn(
    loss: Loss, latents: Iterable[Latent], free: list[torch.Tensor], batches: int,
    iters: int, lr: float, lr_scale: float, lr_free: float, seed: int = 0, more: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Move latents (and free tensors) by Adam with rates that fall to 0, and keep the best of all rounds.

    loss(i) is that of batch i of `batches`, taken in a seeded new order every round. Of eight batches and more one in
    eight is not learned from: these judge, without gradients, the beginning and 8 states on the way, and the best of
    them stays, so that what is only learned by heart does not. Fewer batches judge and teach. Returns the losses of
    the beginning and of what stays. Raises Diverged when the loss is not finite.
    """
    mine = list(latents)
    groups = [([q.v for q in mine], lr), ([q.a for q in mine], lr_scale), (free, lr_free)]
    optimizer = torch.optim.Adam([{"params": p, "lr": rate} for p, rate in groups if p and rate > 0], betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / iters)
    order = torch.Generator().manual_seed(seed)
    judges = held_out(batches)
    teachers = [i for i in range(batches + more) if i not in judges] or judges

    @torch.no_grad()
    def measure() -> float:
        return float(sum(float(loss(i)) for i in judges) / len(judges))

    def state() -> list[Any]:
        return [[q.state() for q in mine], [p.detach().clone() for p in free]]

    first = least = measure()
    best = state()
    for done in range(iters):
        if done % len(teachers) == 0:
            turn = torch.randperm(len(teachers), generator=order).tolist()
        value = loss(teachers[turn[done % len(teachers)]])
        if not torch.isfinite(value):
            raise Diverged(f"learning codes: the loss is not finite at step {done}: lower lr and lr_scale")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        falling.step()
        if done + 1 == iters or (done + 1) % max(iters // 8, 1) == 0:
            now = measure()
            if now < least:
                least, best = now, state()
    for q, kept in zip(mine, best[0], strict=True):
        q.restore(kept)
    with torch.no_grad():
        for p, kept in zip(free, best[1], strict=True):
            p.copy_(kept)
    return first, least


def held_out(batches: int) -> list[int]:
    """The batches that judge: one in eight, spread over all; every one where there are fewer than eight."""
    return list(range(3, batches, 8)) if batches >= 8 else list(range(batches))
