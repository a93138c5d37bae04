"""Width: remove whole neurons, attention heads, channels and hidden lanes; what is left is a smaller plain model.

Source: which lanes go together: `wherry.dependency`, after DepGraph (Fang et al. 2023, arXiv:2301.12900); importance:
    `wherry.dependency.importance`; what stays makes up for what goes: `wherry.dependency.repair`.
Idea:   groups of lanes that depend on one another are scored, the least important go, and the layers that read them are
        solved again by least squares on the calibration inputs: W' = argmin |W x - W' x_K|^2.
Shapes: a Hugging Face folder keeps one width for all layers, as its configuration wants; a graph has any width each.
Cost:   one run to find the groups; one pass over the calibration data (taylor: with gradients); k^3 per reading layer.
Fails:  Unsupported: an operator that the graph of dependencies does not know; a width that the configuration cannot say
        (fewer heads at the same hidden size in BERT, ViT, GPT-2). BadInput: an amount that leaves nothing, a number of
        heads that breaks groups, a budget out of reach.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from wherry.checkpoint import Checkpoint
from wherry.dependency import choose, folder, importance, kinds
from wherry.dependency.cut import cut
from wherry.dependency.kinds import Family
from wherry.dependency.repair import repair
from wherry.dependency.statistics import inputs_of
from wherry.dependency.widths import Widths
from wherry.errors import BadInput
from wherry.recipe import Pass
from wherry.redraw import Drawn

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Width(Pass):
    """neurons, heads, hidden, channels: a share that goes (0.3) or how many stay (1024); "" leaves them.

    parameters, macs: a budget in place of these: the share of all parameters or multiply-accumulates that goes.
    by: heads go in whole "groups" over one head of keys, or single "queries" of each group.
    importance: magnitude, activation, taylor, hessian; "" is hessian, but taylor where a budget is shared among the
    layers of a graph, whose scores must be comparable. repair: solve the reading layers again.
    multiple: neurons, channels and hidden lanes are rounded to it; 0: 16 in graphs, whose convolutions ONNX Runtime
    computes 16 channels at a time (AVX-512; 24 take the time of 32), 8 elsewhere. uniform: a graph's layers lose equal
    shares.
    """

    neurons: str = ""
    heads: str = ""
    hidden: str = ""
    channels: str = ""
    parameters: float = 0.0
    macs: float = 0.0
    by: Literal["groups", "queries"] = "groups"
    importance: Literal["", "magnitude", "activation", "taylor", "hessian"] = ""
    repair: bool = True
    multiple: int = 0
    uniform: bool = False

    def __post_init__(self) -> None:
        budget = [self.parameters, self.macs]
        if not all(0 <= b < 1 for b in budget) or sum(map(bool, budget)) > 1 or self.multiple < 0:
            raise BadInput("width: parameters or macs is a share from 0 to 1, one of them; multiple is 0 or more")
        given = [self.neurons, self.heads, self.hidden, self.channels]
        if any(given) == any(budget):
            raise BadInput("width: give neurons, heads, hidden or channels, or one budget: parameters, or macs")

    calibrated = True

    def remake(
        self, checkpoint: Checkpoint, out: Path, batches: list[dict[str, np.ndarray]], progress: Progress
    ) -> None:
        """Write the smaller model into the folder `out`."""
        drawn = Drawn(checkpoint) if checkpoint.graph is not None else None
        module = drawn.module if drawn else folder.module(checkpoint)
        given = [tensors(batch) for batch in batches] or [example(checkpoint)]
        data = [drawn.called(batch) for batch in given] if drawn else given
        widths = self.widths(checkpoint).plan(module, few(data[0]))
        scores, grams = self.scored(module, widths, data, progress)
        stay = widths.stay or choose.ranked(
            widths.graph, widths.families, scores, widths.target, widths.of, widths.multiple
        )
        gone = choose.removed(stay, scores)
        if self.repair and batches:
            repair(module, gone, grams)
        progress(0, 1, "cutting")
        cut(module, widths.graph, gone)
        if drawn:
            drawn.save(out, few(given[0]))
        else:
            folder.save(checkpoint, module, widths.config(stay), out)

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """What the smaller model will hold; raises what can be known to fail. A graph's widths are found later."""
        widths = self.looked(checkpoint)
        if checkpoint.graph is not None:
            return checkpoint
        return folder.expected(checkpoint, widths.config(widths.stay), widths.shapes(widths.stay))

    def remarks(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Widths before and after, and what was rounded."""
        return {"": self.looked(checkpoint).told()}

    def looked(self, checkpoint: Checkpoint) -> Widths:
        """The plan, from a run on inputs of the model's own."""
        drawn = Drawn(checkpoint) if checkpoint.graph is not None else None
        module = drawn.module if drawn else folder.module(checkpoint)
        given = few(example(checkpoint))
        return self.widths(checkpoint).plan(module, drawn.called(given) if drawn else given)

    def widths(self, checkpoint: Checkpoint) -> Widths:
        """What is asked for."""
        given = {kind: str(getattr(self, kind)) for kind in kinds.KINDS}
        target, of = (self.parameters, "parameters") if self.parameters else (self.macs, "macs")
        multiple = self.multiple or (16 if checkpoint.graph is not None else 8)
        return Widths(checkpoint, given, target, of, self.by == "queries", multiple, self.uniform)

    def scored(
        self, module: nn.Module, widths: Widths, data: list[dict[str, Any]], progress: Progress
    ) -> tuple[dict[Family, np.ndarray], dict[str, torch.Tensor]]:
        """Importance of each family's groups, and the second moments that repair needs."""
        watched = {f: importance.readers(module, f.groups) for f in widths.families if f.kind != "hidden"}
        readers = {name: r for each in watched.values() for name, r in each.items()}
        chosen = self.importance or ("hessian" if widths.stay else "taylor")
        wanted = self.repair or chosen in ("activation", "hessian")
        grams = inputs_of(module, readers, data, lambda i, n: progress(i, n, "inputs of layers")) if wanted else {}
        scores = {}
        for family in widths.families:
            method: str = chosen
            if family.kind == "hidden" or method in ("activation", "hessian") and not watched[family]:
                method = "magnitude" if method == "magnitude" else "taylor"
            scores[family] = importance.score(method, module, family.groups, grams, data)
        return scores, grams


def tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch of inputs as tensors."""
    return {name: torch.as_tensor(array) for name, array in batch.items()}


def few(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Two examples, and 16 places of tokens: enough to see what depends on what."""
    return {n: t[:2, :16] if t.ndim == 2 and not t.is_floating_point() else t[:2] for n, t in batch.items()}


def example(checkpoint: Checkpoint) -> dict[str, Any]:
    """Inputs of the model's own: token ids, its task's examples, or noise of the shapes that a graph declares."""
    if checkpoint.task.kind == "text-generation":
        return {"input_ids": torch.arange(16).reshape(2, 8) % int(checkpoint.config.get("vocab_size", 16))}
    if checkpoint.task.modality == "arrays" and checkpoint.graph is not None:
        return tensors({str(value.name): noise(value) for value in checkpoint.graph.model.graph.inputs})
    return tensors(checkpoint.task.prepare(checkpoint.task.examples()))


def noise(value: Any) -> np.ndarray:
    """Two examples for an input of a graph; sizes that it leaves open are 16, whole numbers 0 and truths true."""
    sizes = [size if isinstance(size, int) else 16 if i else 2 for i, size in enumerate(value.shape)]
    kind = np.dtype(value.dtype.numpy())
    if kind.kind == "f":
        return np.random.default_rng(0).standard_normal(sizes).astype(kind)
    return np.full(sizes, kind.kind == "b", kind)
