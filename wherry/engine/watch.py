"""Watch: what the layers of a block are given while it runs over the calibration data, seen by hooks.

A layer whose inputs are rounded is seen before that, so that layers of one input still share it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from wherry.ops.ranges import Seen
from wherry.recipe import Pass, PlanRow, static_activations


def refers(step: Pass) -> bool:
    """Whether its `observe` also takes what the original model had in place of x."""
    return hasattr(step, "observe") and len(inspect.signature(step.observe).parameters) == 3


def waves(
    block: torch.nn.Module, layers: dict[str, torch.nn.Module], steps: dict[str, Pass], flow: Any
) -> list[list[str]]:
    """Names of layers that are observed together: all, or one input at a time for a method that asks for the original.

    Order and shared inputs are seen on the first batch; a layer that it does not reach comes last.
    """
    if any(refers(steps[name]) for name in layers):
        return waves_of(block, layers, flow)
    return [list(layers)] if layers else []


def waves_of(block: torch.nn.Module, layers: dict[str, torch.nn.Module], flow: Any) -> list[list[str]]:
    """Names of layers by the input that they share, in the order of execution."""
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def see(name: str) -> Callable[..., None]:
        def hook(layer: torch.nn.Module, args: Any) -> None:
            if any(name in names for _, names in seen):
                return
            same = next((names for x, names in seen if x is args[0]), None)
            if same is None:
                seen.append((args[0], [name]))
            else:
                same.append(name)

        return hook

    handles = [layer.register_forward_pre_hook(see(name), prepend=True) for name, layer in layers.items()]
    flow.call(block, 0)
    for handle in handles:
        handle.remove()
    found = [names for _, names in seen]
    rest = [name for name in layers if not any(name in names for names in found)]
    return found + ([rest] if rest else [])


class Watch:
    """Statistics of the inputs of the watched layers; layers that are given the same tensor share one."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.stats: dict[str, Any] = {}
        self.seen = Seen()  # inputs of layers with static activations
        self.counting = False  # the second pass: histograms, nothing else
        self.leader: dict[str, str] = {}
        self.alive: list[tuple[torch.Tensor, Pass, str]] = []
        self.refers: dict[str, torch.Tensor] = {}
        self.twin: torch.nn.Module | None = None
        self.inner: dict[str, str] = {}
        self.wanted: list[str] = []

    def reference(self, flow: Any, i: int) -> None:
        """Run the original block on the original's states of batch i, and keep the inputs of the watched layers."""
        if self.twin is None or not self.wanted:
            return

        def keep(name: str) -> Callable[..., None]:
            return lambda layer, args: self.refers.__setitem__(name, args[0])

        layers = {name: self.twin.get_submodule(self.inner[name].removesuffix(".weight")) for name in self.wanted}
        handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
        flow.call(self.twin, i, states=flow.reference)
        for handle in handles:
            handle.remove()

    def batch_ends(self) -> None:
        """Forget the tensors of this batch; statistics of a leader count for those that follow it."""
        self.alive.clear()
        for name, leader in self.leader.items():
            if leader in self.stats:
                self.stats[name] = self.stats[leader]

    def range(self, name: str, observer: str) -> tuple[float, float] | None:
        """The range of a layer's input, that of the layer whose input it shares; None when nothing was seen."""
        own = self.leader.get(name, name)
        return self.seen.range(own, observer) if own in self.seen.low else None

    def see(self, name: str, step: Pass, row: PlanRow, x: torch.Tensor) -> None:
        """Fold one input x [..., k] into the statistic of the layer, or follow one that saw the same tensor."""
        leader = self.leader.get(name)
        if leader is None:
            leader = next((own for seen, other, own in self.alive if seen is x and other == step), name)
            self.leader[name] = leader
        self.alive.append((x, step, leader))
        if leader != name:
            return
        flat = x.reshape(-1, x.shape[-1])
        if self.counting:
            if static_activations(row.scheme):
                self.seen.count(name, flat.float().cpu().numpy())
            return
        if hasattr(step, "observe"):
            extra: tuple[torch.Tensor, ...] = ()
            if refers(step):
                beside = self.refers.get(name, x)  # experts may be given other tokens than in the original
                extra = ((beside if beside.shape == x.shape else x).reshape(flat.shape),)
            self.stats[name] = step.observe(self.stats.get(name), *(each.to(self.device) for each in (flat, *extra)))
        if static_activations(row.scheme):
            self.seen.extremes(name, flat.float().cpu().numpy())


@contextmanager
def watching(
    layers: dict[str, torch.nn.Module], steps: dict[str, Pass], rows: dict[str, PlanRow],
    twin: torch.nn.Module | None = None, inner: dict[str, str] | None = None, device: str = "cpu",
) -> Iterator[Watch]:  # fmt: skip
    """Hook the layers while the block runs over the calibration data; `twin` is the original block, where wanted.

    Statistics are summed on `device`, where they stay.
    """
    watch = Watch(device)
    watch.twin, watch.inner = twin, inner or {}
    watch.wanted = [name for name in layers if refers(steps[name])]

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args: watch.see(name, steps[name], rows[name], args[0])

    watched = {name: layer for name, layer in layers.items() if steps[name].calibrated}
    handles = [layer.register_forward_pre_hook(hook(name), prepend=True) for name, layer in watched.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
