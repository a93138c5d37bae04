"""Depth: drop whole layers, or merge a layer into its neighbour.

Source: influence: ShortGPT (Men et al. 2024, arXiv:2403.03853); perplexity: Shortened LLaMA (Kim et al. 2024,
    arXiv:2402.02834); search: the same measured again after each layer that went, as in SLEB (Song et al. 2024,
    arXiv:2402.09025); merge: LaCo (Yang et al. 2024, arXiv:2402.11187).
Idea:   influence of layer l: 1 - mean cos(x_l, x_{l+1}): a layer that hardly turns its input is hardly missed.
        perplexity, search: the loss without the layer: cross-entropy of next tokens, or the distance of an encoder's
        results from those of the whole model. merge: theta_l + sum_k (theta_{l+k} - theta_l), l+k dropped.
Shapes: x [tokens, hidden] before and after a layer.
Cost:   influence one pass; perplexity one pass per layer; search one per layer and round.
Fails:  BadInput: all layers, or a layer that is not there. Unsupported: a graph, or no list of layers that the
        configuration counts. A layer that holds what the others lack (T5's first, with the biases) stays.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from wherry.checkpoint import Checkpoint
from wherry.dependency import folder
from wherry.dependency.architecture import blocks, fewer
from wherry.dependency.blocks import influence, labelled, loss, merge, put
from wherry.dependency.kinds import amount
from wherry.dependency.statistics import Batches, main
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Pass

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Depth(Pass):
    """layers: a share that goes (0.25), or how many stay (4). drop: which go, `2;5`, in place of importance.

    importance: influence, perplexity, search. merge: dropped layers are merged into the one before.
    stack: of encoder-decoders, "encoder" or "decoder"; "" means both, each by itself.
    """

    layers: str = ""
    drop: tuple[str, ...] = ()
    importance: Literal["influence", "perplexity", "search"] = "influence"
    merge: bool = False
    stack: Literal["", "encoder", "decoder"] = ""

    def __post_init__(self) -> None:
        if bool(self.layers) == bool(self.drop):
            raise BadInput("depth: give layers (a share that goes, or how many stay) or drop (which), not both")
        if not all(item.isdigit() for item in self.drop):
            raise BadInput(f"depth: drop={';'.join(self.drop)} is no list of numbers like 2;5")
        if len(set(map(int, self.drop))) < len(self.drop):
            raise BadInput(f"depth: drop={';'.join(self.drop)} names a layer twice")

    calibrated = True

    def remake(
        self, checkpoint: Checkpoint, out: Path, batches: list[dict[str, np.ndarray]], progress: Progress
    ) -> None:
        """Write the shallower model into the folder `out`."""
        stay = self.planned(checkpoint)
        if not self.drop and not batches:
            raise BadInput("depth: layers are chosen on calibration data; give --data, or name them: drop=2;5")
        module = folder.module(checkpoint)
        data: Batches = [{n: torch.as_tensor(a) for n, a in batch.items()} for batch in batches]
        config = dict(checkpoint.config)
        paths = blocks(config, [name for name, _ in module.named_parameters()])  # a folder may name them otherwise
        for entry, (_, keep) in stay.items():
            path = paths[entry]
            stack: Any = module.get_submodule(path)
            gone = sorted(map(int, self.drop)) or self.chosen(module, path, len(stack) - keep, data, progress)
            kept = [i for i in range(len(stack)) if i not in gone]
            if self.merge:
                merge(stack, gone)
            put(module, path, [stack[i] for i in kept])
            config = fewer(config, entry, kept)
        folder.save(checkpoint, module, config, out)

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model with fewer layers; raises what can be known to fail."""
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
        config = dict(checkpoint.config)
        for entry, (path, keep) in self.planned(checkpoint).items():
            pattern = re.compile(rf"(?:.*\.)?{re.escape(path)}\.(\d+)\.")
            shapes = {n: s for n, s in shapes.items() if not (m := pattern.match(n)) or int(m[1]) < keep}
            config = fewer(config, entry, list(range(keep)))
        return folder.expected(checkpoint, config, shapes)

    def remarks(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Layers before and after."""
        stay = self.planned(checkpoint)
        said = [f"{path}: layers {checkpoint.config[entry]} -> {keep}" for entry, (path, keep) in stay.items()]
        return {"": ", ".join(said)}

    def planned(self, checkpoint: Checkpoint) -> dict[str, tuple[str, int]]:
        """{entry of the configuration: (path of the stack, how many layers stay)}."""
        if checkpoint.graph is not None:
            raise Unsupported("depth drops layers of Hugging Face folders; a graph is pruned by width: width:macs=0.3")
        found = blocks(checkpoint.config, checkpoint.names())
        stay = {}
        for entry, path in found.items():
            if self.stack and self.stack not in path.split("."):
                continue
            before = int(checkpoint.config[entry])
            if bad := [i for i in self.drop if int(i) >= before]:
                raise BadInput(f"depth: there is no layer {bad[0]}; {path} has 0 to {before - 1}")
            keep = before - len(set(self.drop)) if self.drop else round(amount(self.layers, before, "layers"))
            if keep < 1:
                raise BadInput("depth would remove every layer: keep one at least")
            stay[entry] = (path, keep)
        if not stay:
            raise BadInput(f"depth: {checkpoint.name} has no {self.stack}")
        if all(keep == int(checkpoint.config[entry]) for entry, (_, keep) in stay.items()):
            raise BadInput(f"depth: layers={self.layers} leaves {checkpoint.name} as it is: ask for fewer layers")
        return stay

    def chosen(self, module: nn.Module, path: str, count: int, data: Batches, progress: Progress) -> list[int]:
        """The layers that go, of least importance. A layer whose weights the others lack stays."""
        stack: Any = module.get_submodule(path)
        common = {tuple(n for n, _ in block.named_parameters()) for block in stack[1:]}
        free = [i for i, b in enumerate(stack) if tuple(n for n, _ in b.named_parameters()) in common or len(stack) < 2]
        if count > len(free):
            raise BadInput(f"{path}: {len(stack) - len(free)} layers must stay, {count} are to go")
        if self.importance == "influence":
            scores = influence(module, stack, data)
            return sorted(sorted(free, key=lambda i: scores[i])[:count])
        with torch.no_grad():
            whole = [main(module(**batch)) for batch in data] if not labelled(data) else []
        gone: list[int] = []
        rounds = count if self.importance == "search" else 1
        for n in range(rounds):
            left = [i for i in free if i not in gone]
            losses = {}
            for done, i in enumerate(left):
                put(module, path, [b for j, b in enumerate(stack) if j != i and j not in gone])
                losses[i] = loss(module, data, whole)
                progress(n * len(left) + done, rounds * len(left), "loss without a layer")
            put(module, path, list(stack))
            gone += sorted(left, key=lambda i: losses[i])[: 1 if self.importance == "search" else count]
        return sorted(gone)
