"""Blocks: a stack of equal layers measured, shortened and merged; what `depth` decides by."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherry.dependency.statistics import Batches, main


def put(module: nn.Module, path: str, layers: list[nn.Module]) -> None:
    """Make these the layers of a stack, numbered anew."""
    owner, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.ModuleList(layers))
    for number, layer in enumerate(layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.__dict__["layer_idx"] = number


def influence(module: nn.Module, stack: Any, data: Batches) -> list[float]:
    """1 - mean cosine of what each layer is given and gives."""
    sums, counts = [0.0] * len(stack), [0] * len(stack)

    def hook(i: int) -> Callable[..., None]:
        def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y: Tensor = result if isinstance(result, Tensor) else result[0]
            sums[i] += float((1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).sum())
            counts[i] += x.shape[:-1].numel()

        return measure

    handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(stack)]
    try:
        with torch.no_grad():
            for batch in data:
                module(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [s / max(c, 1) for s, c in zip(sums, counts, strict=True)]


def labelled(data: Batches) -> bool:
    """Whether the inputs hold their own targets: tokens alone, of a language model."""
    return set(data[0]) == {"input_ids"}


def loss(module: nn.Module, data: Batches, whole: list[Tensor]) -> float:
    """Cross-entropy of next tokens, or the distance of the results from those of the whole model."""
    total, count = 0.0, 0
    with torch.no_grad():
        for i, batch in enumerate(data):
            out = main(module(**batch))
            if whole:
                total, count = total + float((out - whole[i]).square().sum()), count + out.numel()
                continue
            targets = batch["input_ids"][:, 1:]
            total -= float(out[:, :-1].gather(-1, targets[..., None]).sum())
            count += targets.numel()
    return total / max(count, 1)


def merge(stack: Any, gone: list[int]) -> None:
    """Add to the last layer that stays before each run of dropped ones what they differ from it."""
    with torch.no_grad():
        for keep in [i for i in range(len(stack)) if i not in gone and i + 1 in gone]:
            run = [i for i in range(keep + 1, len(stack)) if all(j in gone for j in range(keep + 1, i + 1))]
            own = {name: p.clone() for name, p in stack[keep].named_parameters()}
            for i in run:
                for name, p in stack[i].named_parameters():
                    if name in own:
                        stack[keep].get_parameter(name).add_(p - own[name])
