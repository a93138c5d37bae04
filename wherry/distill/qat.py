"""QAT: train with the weights (and inputs) on their grid, so that what is learned survives the rounding.

Source: Bengio et al. 2013, arXiv:1308.3432 (straight through); Esser et al. 2020 (LSQ, arXiv:1902.08153) and Bhalgat et
    al. 2020 (LSQ+, arXiv:2004.09576) for learned scales and zeros; Rastegari et al. 2016, arXiv:1603.05279 (binary);
    Li & Liu 2016, arXiv:1605.04711 (ternary); Liu et al. 2023 (LLM-QAT, arXiv:2305.17888): the float model teaches.
Idea:   w_hat = s (q - z), q = round(clamp(w / s + z)): gradients pass the rounding unchanged; s, z are learned beside
        w, s in the rounding in which it will be stored. At the end the weights are w_hat, exactly: `rtn` with the
        same scheme finds that grid again, and every export holds these codes.
Shapes: w [n, k], s and z [n, g]; a convolution's [o, i, h, w] as [o, i h w] with one scale per output.
Cost:   the float weights, gradients and optimizer states as in any training; 15 elementwise operations per weight.
Fails:  Unsupported for grids without a step (k-quants, NF4, floats, planes); BadInput when a group divides no row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn.utils import parametrize

from wherry.errors import BadInput
from wherry.gait import matches
from wherry.objective import Step
from wherry.ops import grid
from wherry.ops.learned_grid import LearnedGrid, LearnedRange, trainable
from wherry.recipe import roles
from wherry.scheme import PRESETS, QTensor, Scheme

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class QAT(Step):
    """scheme: as for compressing: W8A8_STATIC, W4A16_ASYM, W2A16, W1.58A16 (ternary), W1A16 (binary), with group_size.

    scales: learned (LSQ), or fixed where they begin (ste). portable: scales of 7 significant bits, as rtn makes them;
    graphs take false. targets, ignore: layers by name, last part, or `re:` pattern; by default all linear layers of the
    blocks, and all linear layers and convolutions of a graph. A layer that lies on a grid already keeps its scheme.
    """

    scheme: Scheme = PRESETS["W4A16_ASYM"]
    scales: Literal["learned", "fixed"] = "learned"
    portable: bool = True
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def prepare(self, module: torch.nn.Module, checkpoint: Any = None) -> None:
        """Put the weights of all wanted layers on their grid, and roundings before their inputs."""
        trainable(self.scheme)
        found = list(self.layers(module, checkpoint))
        if not found:
            raise BadInput(f"qat: no layer to quantize fits targets={';'.join(self.targets) or 'all'}")
        layer: Any
        for path, layer, stored in found:
            if parametrize.is_parametrized(layer, "weight") and any(
                isinstance(step, LearnedGrid)
                for step in layer.parametrizations["weight"]
            ):
                continue  # tied to a layer that was done
            scheme = stored.scheme if stored is not None else self.fitting(layer, path)
            rounding = grid.stored(scheme, grid.portable if self.portable else None)
            start = None if stored is None else (stored.scale.to(layer.weight.device), stored.zero)
            w = layer.weight.detach()
            first = not parametrize.is_parametrized(layer, "weight")
            own = LearnedGrid(w, scheme, rounding, self.scales == "learned", start, held_in_codes=first)
            parametrize.register_parametrization(layer, "weight", own.to(w.device), unsafe=True)
            inputs = scheme.activations
            if inputs is not None and (not inputs.dynamic or isinstance(layer, torch.nn.Linear)):
                layer.add_module("input_range", LearnedRange(inputs).to(w.device))
                layer.register_forward_pre_hook(round_input)

    def finish(self, module: torch.nn.Module, checkpoint: Any = None) -> None:
        """Plain weights again, each exactly a value of its grid; inputs are float again until they are compressed."""
        for layer in list(module.modules()):
            if parametrize.is_parametrized(layer, "weight"):
                steps = layer.parametrizations["weight"]  # type: ignore[index]
                if grids := [step for step in steps if isinstance(step, LearnedGrid)]:
                    small = self.portable and all(own.scheme.bits <= 4 for own in grids)
                    held = getattr(module, "held_by", torch.float16)
                    whole: Any = module
                    whole.held_by = held if small else torch.float32  # the least dtype that holds the values
                    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            if hasattr(layer, "input_range"):
                del layer.input_range
                for key, hook in list(layer._forward_pre_hooks.items()):
                    if hook is round_input:
                        del layer._forward_pre_hooks[key]

    def layers(self, module: torch.nn.Module, checkpoint: Any) -> Iterator[tuple[str, torch.nn.Module, QTensor | None]]:
        """(path, layer, its codes if the checkpoint holds some) of what will be on a grid."""
        linear: set[str] | None = None
        places: dict[str, str] = {}
        if checkpoint is not None and checkpoint.graph is None:
            places = checkpoint.places(module)
            wanted = {name for name, role, _ in roles(checkpoint) if role == "linear"}
            outside = {name for name, role, why in roles(checkpoint) if role == "linear" and why == OUTSIDE}
            linear = {place.removesuffix(".weight") for place, name in places.items() if name in wanted - outside}
        for path, layer in module.named_modules():
            if not isinstance(layer, LAYERS) or (linear is not None and path not in linear):
                continue
            if self.targets and not any(matches(p, path) for p in self.targets):
                continue
            if any(matches(p, path) for p in self.ignore):
                continue
            name = places.get(f"{path}.weight")
            tensor = checkpoint.tensor(name) if name is not None and checkpoint.scheme(name) is not None else None
            yield path, layer, tensor

    def fitting(self, layer: Any, path: str) -> Scheme:
        """The scheme of one layer: a convolution has one scale per output. Raises BadInput."""
        if not isinstance(layer, torch.nn.Linear):
            return replace(self.scheme.with_group(-1))
        try:
            self.scheme.scales_per_row(layer.weight.flatten(1).shape[-1])
        except BadInput as error:
            raise BadInput(f"qat, {path}: {error}") from error
        return self.scheme


def round_input(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the layer's input on its grid."""
    return (layer.input_range(inputs[0]), *inputs[1:])


OUTSIDE = "outside of the blocks"
