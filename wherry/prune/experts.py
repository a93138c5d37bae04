"""Experts: drop the experts of a mixture that matter least, or merge them into those that stay.

Source: REAP (Lasby et al. 2025, arXiv:2510.13999): router-weighted activations; frequency and merging: MC-SMoE (Li et
    al. 2024, arXiv:2310.01334).
Idea:   saliency of expert e: the mean over the tokens that are sent to it of g_e(x) |f_e(x)|, g the router's weight;
        "frequency" counts these. The router's rows of dropped experts go, so that its softmax is over the others.
        merge: a dropped expert is averaged into the one that stays whose row of the router is nearest, by frequency.
Shapes: router [experts, hidden]; gate_up_proj [experts, 2 ffn, hidden]; down_proj [experts, hidden, ffn].
Cost:   one pass over the calibration data, and the outputs of the experts once more.
Fails:  Unsupported: no experts of that form. BadInput: fewer experts than each token is sent to; no data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherry.checkpoint import Checkpoint
from wherry.dependency import folder
from wherry.dependency.architecture import names
from wherry.dependency.kinds import amount
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Pass

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Experts(Pass):
    """experts: a share that goes (0.5), or how many stay in each layer (4).

    importance: reap or frequency. merge: dropped experts are merged into those that stay.
    """

    experts: str = "0.5"
    importance: Literal["reap", "frequency"] = "reap"
    merge: bool = False
    calibrated = True

    def remake(
        self, checkpoint: Checkpoint, out: Path, batches: list[dict[str, np.ndarray]], progress: Progress
    ) -> None:
        """Write the model with fewer experts into the folder `out`."""
        entry, stay = self.planned(checkpoint)
        if not batches:
            raise BadInput("experts: the router is watched on calibration data; give --data")
        module = folder.module(checkpoint)
        found = mixtures(module)
        if not found:
            raise Unsupported(f"{checkpoint.name}: its experts are not gate_up_proj and down_proj")
        data = [{n: torch.as_tensor(a) for n, a in batch.items()} for batch in batches]
        stats = watch(module, found, data, progress)
        for name, (router, experts) in found.items():
            score, count = stats[name]
            order = torch.argsort(score if self.importance == "reap" else count, descending=True, stable=True)
            kept = order[:stay].sort().values
            if self.merge:
                merge(router, experts, kept, count)
            for layer in (router, experts):
                for key, p in list(layer.named_parameters(recurse=False)):
                    if p.shape[0] == len(score):
                        setattr(layer, key, nn.Parameter(p.detach()[kept].contiguous(), requires_grad=False))
        folder.save(checkpoint, module, dict(checkpoint.config) | {entry: stay}, out)

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model with fewer experts; raises what can be known to fail."""
        entry, stay = self.planned(checkpoint)
        before, shapes = int(checkpoint.config[entry]), {}
        for name in checkpoint.names():
            number = [part for part in name.partition(".experts.")[2].split(".") if part.isdigit()][:1]
            if number and int(number[0]) >= stay:
                continue
            shape = checkpoint.shape(name)
            per = name.endswith(("gate.weight", "router.weight", "correction_bias", "gate_up_proj", "down_proj"))
            shapes[name] = (stay, *shape[1:]) if per and shape[0] == before and not number else shape
        return folder.expected(checkpoint, dict(checkpoint.config) | {entry: stay}, shapes)

    def remarks(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Experts before and after."""
        entry, stay = self.planned(checkpoint)
        return {"": f"experts {checkpoint.config[entry]} -> {stay} in each layer"}

    def planned(self, checkpoint: Checkpoint) -> tuple[str, int]:
        """The configuration's entry, and how many experts stay."""
        entry = next((e for e in names(checkpoint.config).experts if isinstance(checkpoint.config.get(e), int)), "")
        if checkpoint.graph is not None or not entry or not checkpoint.config[entry]:
            raise Unsupported(f"{checkpoint.name} is no mixture of experts: use width or depth")
        stay = round(amount(self.experts, int(checkpoint.config[entry]), "experts"))
        each = int(checkpoint.config.get("num_experts_per_tok", 1))
        if stay < max(each, 1):
            raise BadInput(f"experts={self.experts} leaves {stay}, and each token is sent to {each}: keep as many")
        return entry, stay


def mixtures(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """{path: (router, experts)} of the layers that are mixtures."""
    found = {}
    for path, layer in module.named_modules():
        experts = getattr(layer, "experts", None)
        router = getattr(layer, "gate", None) or getattr(layer, "router", None)
        if hasattr(experts, "gate_up_proj") and hasattr(experts, "down_proj") and hasattr(router, "weight"):
            found[path] = (router, experts)
    return found


def watch(
    module: nn.Module, found: dict[str, tuple[Any, Any]], data: list[dict[str, Any]], progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """{path: (mean of g |f| over the tokens that an expert gets [experts], number of these tokens [experts])}."""
    sums = {path: torch.zeros(2, len(router.weight), dtype=torch.float64) for path, (router, _) in found.items()}

    def hook(path: str) -> Callable[..., None]:
        def fold(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, index, weights = (*args, *kwargs.values())[:3]
            x = x.reshape(-1, x.shape[-1])
            for e in range(len(experts.down_proj)):
                row, place = torch.where(index.reshape(len(x), -1) == e)
                gate, up = F.linear(x[row], experts.gate_up_proj[e]).chunk(2, -1)
                size = F.linear(experts.act_fn(gate) * up, experts.down_proj[e]).norm(dim=-1)
                sums[path][0, e] += (weights.reshape(len(x), -1)[row, place] * size).sum()
                sums[path][1, e] += len(row)

        return fold

    handles = [experts.register_forward_pre_hook(hook(path), with_kwargs=True) for path, (_, experts) in found.items()]
    try:
        with torch.no_grad():
            for i, batch in enumerate(data):
                module(**batch)
                progress(i + 1, len(data), "router")
    finally:
        for handle in handles:
            handle.remove()
    return {path: (s[0] / s[1].clamp(min=1), s[1]) for path, s in sums.items()}


def merge(router: Any, experts: Any, kept: Tensor, count: Tensor) -> None:
    """Average each dropped expert into the nearest that stays, weighted by the tokens that each gets; in place."""
    rows = F.normalize(router.weight.detach().double(), dim=-1)
    nearest = kept[(rows @ rows[kept].T).argmax(-1)]
    weight = count.clamp(min=1e-6)
    with torch.no_grad():
        for p in (experts.gate_up_proj, experts.down_proj):
            old = p.clone()
            for e in kept.tolist():
                group = [i for i in range(len(count)) if i == e or (i not in kept.tolist() and int(nearest[i]) == e)]
                share = (weight[group] / weight[group].sum()).to(p.dtype)
                p[e] = (old[group] * share[:, None, None]).sum(0)
