"""Smooth: let a method scale the inputs of layers, and give the inverse to the norm or layer before them.

Nothing is known of architectures. Layers that share an input are seen by tensor identity; what made that input is found
by a probe: scale the outputs of a candidate (a norm, a Linear of that many outputs) by powers of two, and see whether
the input is scaled by exactly them, and whether the block's output stays when the layers' columns are divided by them.
A norm that computes 1 + w (Gemma) is seen by its output for w = 0 and w = 1.
Cost: per group of layers one pass over the data for its statistics, and a few calls on one window for the probe.
"""

from dataclasses import replace
from typing import Any

import torch

from wherry.engine.watch import watching, waves_of
from wherry.recipe import Plan, PlanRow

TOLERANCE = 1e-4


def smooth(
    plan: Plan, rows: dict[str, PlanRow], block: torch.nn.Module, inner: dict[str, str],
    layers: dict[str, Any], flow: Any, notes: dict[str, list[str]],
) -> dict[str, str]:  # fmt: skip
    """Do every `smooth` pass on one block, in place. Returns {weight that was changed: by which method}."""
    moved: dict[str, str] = {}
    names = {path: name for name, path in inner.items()}
    for step in plan.recipe.steps:
        chosen = {name: layer for name, layer in layers.items() if hasattr(step, "smooth") and step.wants(name)}
        if not chosen:
            continue
        for group in waves_of(block, chosen, flow):
            with watching({group[0]: layers[group[0]]}, {group[0]: step}, rows) as watch:
                for i in range(len(flow.states)):
                    flow.call(block, i)
                    watch.batch_ends()
            if group[0] not in watch.stats:
                continue
            producer = find(block, [layers[name] for name in group], flow)
            if producer is None:
                notes[group[0]].append(f"{step.method}: nothing before it can take the scales, left as it is")
                continue
            method = replace(step, scheme=rows[group[0]].scheme or step.scheme)
            weights = [layers[name].weight.detach() for name in group]
            s = method.smooth(weights, watch.stats[group[0]])  # type: ignore[attr-defined]
            s = producer.divide(s, plan.checkpoint.source.dtype(names[producer.path + ".weight"]))
            for name in group:
                layers[name].weight.data = layers[name].weight.data * s
                moved[name] = step.method
            for path in producer.parameters:
                moved[names[path]] = step.method
                notes[names[path]].append(f"divided by the scales of {step.method}")
    return moved


class Producer:
    """A module whose output channels can be scaled through its parameters: a norm (offset + w) or a Linear."""

    def __init__(self, path: str, module: Any, offset: float) -> None:
        self.path, self.module, self.offset = path, module, offset

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters that change."""
        return [f"{self.path}.{name}" for name, _ in self.module.named_parameters(recurse=False)]

    def multiply(self, d: torch.Tensor) -> None:
        """Scale the outputs by d [k]."""
        for name, parameter in self.module.named_parameters(recurse=False):
            offset = self.offset if name == "weight" else 0.0
            factor = d[:, None] if parameter.ndim == 2 else d
            parameter.data = (parameter.data + offset) * factor - offset

    def divide(self, s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Divide the outputs by s [k], in numbers of the stored dtype. Returns the scales that were really taken."""
        if self.module.weight.ndim == 2:
            self.multiply(1 / s)
            return s
        if any(name != "weight" for name, _ in self.module.named_parameters(recurse=False)):
            s = torch.exp2(torch.round(torch.log2(s)))  # powers of two: a weight and a bias are divided exactly
            self.multiply(1 / s)
            return s
        old = self.module.weight.data + self.offset
        self.module.weight.data = (old / s - self.offset).to(dtype).float()
        new = self.module.weight.data + self.offset
        taken = torch.where(new != 0, old / new, torch.ones_like(old))
        usable = (taken > s / 2) & (taken < s * 2)  # a channel that rounds away keeps its old weight
        self.module.weight.data = torch.where(usable, new, old) - self.offset
        return torch.where(usable, taken, torch.ones_like(old))


def find(block: torch.nn.Module, layers: list[Any], flow: Any) -> Producer | None:
    """What made the input of these layers and can take scales, by the probe; None when there is nothing."""
    k = layers[0].weight.shape[-1]
    d = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (k,), generator=torch.Generator().manual_seed(k))]
    x, y = taste(block, layers[0], flow)
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter) or module in layers or len(weight) != k or weight.ndim > 2:
            continue
        if weight.ndim == 2 and not isinstance(module, torch.nn.Linear):
            continue
        producer = Producer(path, module, offset_of(module, x) if weight.ndim == 1 else 0.0)
        kept = [(p, p.data) for m in (module, *layers) for p in m.parameters(recurse=False)]
        producer.multiply(d)
        scaled, _ = taste(block, layers[0], flow)
        right = near(scaled, x * d)
        if right:
            for layer in layers:
                layer.weight.data = layer.weight.data / d
            right = near(taste(block, layers[0], flow)[1], y)
        for parameter, data in kept:
            parameter.data = data
        if right:
            return producer
    return None


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the arithmetic."""
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def offset_of(norm: Any, x: torch.Tensor) -> float:
    """The c of a norm that multiplies by c + w: 0 for most, 1 for Gemma's."""
    kept = [(p, p.data) for p in norm.parameters(recurse=False)]
    outputs = []
    for value in (0.0, 1.0):
        for parameter, data in kept:
            parameter.data = torch.full_like(data, value) if parameter is norm.weight else torch.zeros_like(data)
        outputs.append(norm(x))
    for parameter, data in kept:
        parameter.data = data
    step = outputs[1] - outputs[0]
    return round(float((outputs[0] * step).sum() / step.square().sum().clamp(min=1e-12)), 3)


def taste(block: torch.nn.Module, layer: torch.nn.Module, flow: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's input and the block's output on the first window."""
    caught: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    y = flow.call(block, 0)
    handle.remove()
    return caught[0].reshape(-1, caught[0].shape[-1]), y
