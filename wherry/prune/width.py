"""Width: remove whole neurons, attention heads, channels and hidden lanes; what is left is a smaller plain model.

Source: which lanes go together: `wherry.dependency`, after DepGraph (Fang et al. 2023, arXiv:2301.12900); importance:
    `wherry.dependency.importance`; what stays makes up for what goes: `wherry.dependency.repair`.
Idea:   groups of lanes that depend on one another are scored, the least important go, and the layers that read them are
        solved again by least squares on the calibration inputs: W' = argmin |W x - W' x_K|^2.
Shapes: a Hugging Face folder keeps one width for all layers, as its configuration wants; a graph has any width each.
Cost:   one run to find the groups; one pass over the calibration data (taylor: with gradients); k^3 for a reading layer.
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

from wherry import dependency
from wherry.checkpoint import Checkpoint
from wherry.dependency import Graph, choose, folder, importance, kinds
from wherry.dependency.architecture import expressed, names
from wherry.dependency.cost import Cost
from wherry.dependency.cut import cut
from wherry.dependency.kinds import Family
from wherry.dependency.repair import repair
from wherry.dependency.statistics import inputs_of
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Pass
from wherry.redraw import Drawn

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Width(Pass):
    """neurons, heads, hidden, channels: a share that goes (0.3) or how many stay (1024); "" leaves them.

    parameters, macs: a budget in place of these: the share of all parameters or multiply-accumulates that goes.
    by: heads go in whole "groups" over one head of keys, or single "queries" of each group.
    importance: magnitude, activation, taylor, hessian. repair: solve the reading layers again.
    multiple: neurons, channels and hidden lanes are rounded to it. uniform: a graph's layers lose equal shares.
    """

    neurons: str = ""
    heads: str = ""
    hidden: str = ""
    channels: str = ""
    parameters: float = 0.0
    macs: float = 0.0
    by: Literal["groups", "queries"] = "groups"
    importance: Literal["magnitude", "activation", "taylor", "hessian"] = "hessian"
    repair: bool = True
    multiple: int = 8
    uniform: bool = False

    def __post_init__(self) -> None:
        budget = [self.parameters, self.macs]
        if not all(0 <= b < 1 for b in budget) or sum(map(bool, budget)) > 1 or self.multiple < 1:
            raise BadInput("width: parameters or macs is a share from 0 to 1, one of them; multiple is 1 or more")
        given = [self.neurons, self.heads, self.hidden, self.channels]
        if any(given) == any(budget):
            raise BadInput("width: give neurons, heads, hidden or channels, or one budget: parameters, or macs")

    def remake(self, checkpoint: Checkpoint, out: Path, batches: list[dict[str, np.ndarray]], progress: Progress) -> None:
        """Write the smaller model into the folder `out`."""
        drawn = Drawn(checkpoint) if checkpoint.graph is not None else None
        module = drawn.module if drawn else folder.module(checkpoint)
        given = [tensors(batch) for batch in batches] or [example(checkpoint)]
        data = [drawn.called(batch) for batch in given] if drawn else given
        graph, found, stay = self.planned(checkpoint, module, drawn, data)
        scores, grams = self.scored(module, graph, found, data, progress)
        if not stay:
            stay = choose.ranked(graph, found, scores, *self.budget, self.multiple)
        gone = choose.removed(stay, scores)
        if self.repair and batches:
            repair(module, gone, grams)
        progress(0, 1, "cutting")
        cut(module, graph, gone)
        if drawn:
            drawn.save(out, few(given[0]))
        else:
            folder.save(checkpoint, module, self.config(checkpoint, stay), out)

    def forecast(self, checkpoint: Checkpoint) -> list[dict[str, Any]]:
        """What will stay, before any work: rows of what, where, value, note; raises what can be known to fail."""
        drawn = Drawn(checkpoint) if checkpoint.graph is not None else None
        module = drawn.module if drawn else folder.module(checkpoint)
        given = example(checkpoint)
        graph, found, stay = self.planned(checkpoint, module, drawn, [drawn.called(given) if drawn else given])
        rows = []
        for family, n in stay.items():
            before, after = len(family.groups) * family.each, n * family.each
            note = "" if not (text := getattr(self, family.kind)) else f"asked for {text}"
            rows.append({"what": family.kind, "where": family.place, "value": f"{before} -> {after}", "note": note})
        cost = Cost(graph)
        after = cost.of([g for f, n in stay.items() for g in f.groups[n:]])
        if stay:
            rows += [{"what": k, "where": "model", "value": f"{cost.total[k]:,} -> {after[k]:,}", "note": ""} for k in after]
        return rows

    @property
    def budget(self) -> tuple[float, str]:
        """The share to save, and of what."""
        return (self.parameters, "parameters") if self.parameters else (self.macs, "macs")

    def planned(
        self, checkpoint: Checkpoint, module: nn.Module, drawn: Drawn | None, data: list[dict[str, Any]]
    ) -> tuple[Graph, list[Family], dict[Family, int]]:
        """Groups, families that may go, and how many of each stay; {} where importance decides."""
        given = {kind: getattr(self, kind) for kind in kinds.KINDS}
        if drawn:
            graph, config = dependency.graph(module, few(data[0])), None
        else:
            graph, config = dependency.graph(module, few(data[0]), outputs=bool(self.hidden)), checkpoint.config
        found = kinds.families(graph, config)
        if self.by == "queries" and config is not None:
            graph, found = kinds.by_query(graph, config)
        multiples = {"neurons": self.multiple, "hidden": self.multiple, "channels": self.multiple}
        target, by = self.budget
        if target:
            found = [f for f in found if f.kind != "hidden"]
            if config is not None and not self.sayable(checkpoint, graph, [f for f in found if f.kind == "heads"]):
                found = [f for f in found if f.kind != "heads"]
            stay = {} if config is None and not self.uniform else choose.uniform(graph, found, target, by, multiples)
        else:
            stay = choose.counts(found, given, multiples)
            found = [f for f in found if f in stay]
        if config is not None:
            self.check(checkpoint, graph, stay)
        elif not found:
            raise BadInput(f"{checkpoint.name} has no channels that can go")
        return graph, found, stay

    def sayable(self, checkpoint: Checkpoint, graph: Graph, heads: list[Family]) -> bool:
        """Whether the configuration can tell fewer heads: found by trying one less."""
        try:
            self.check(checkpoint, graph, {f: len(f.groups) - 1 for f in heads})
        except Unsupported:
            return False
        return True

    def check(self, checkpoint: Checkpoint, graph: Graph, stay: Mapping[Family, int]) -> None:
        """Raise Unsupported where the configuration cannot say the result."""
        masks = graph.kept([g for f, n in stay.items() for g in f.groups[n:]])
        shapes = {name: list(shape) for name, shape in graph.shapes.items()}
        for (name, d), mask in masks.items():
            shapes[name][d] = int(mask.sum())
        what = "heads" if any(f.kind == "heads" for f in stay) else "hidden" if self.hidden else "neurons"
        expressed(checkpoint, self.config(checkpoint, stay), {n: tuple(s) for n, s in shapes.items()}, what)

    def config(self, checkpoint: Checkpoint, stay: Mapping[Family, int]) -> dict[str, Any]:
        """The configuration with the new widths."""
        config, entries = dict(checkpoint.config), names(checkpoint.config)
        hidden = int(config[next(e for e in entries.hidden if e in config)])
        if entries.width and any(f.kind in ("heads", "hidden") for f in stay) and not config.get(entries.width):
            config[entries.width] = hidden // int(config[next(e for e in entries.heads if e in config)])
        for family, n in stay.items():
            config[family.entry] = n * family.each
            if family.kind == "hidden":
                config |= {e: n for e in entries.hidden if e in config}
            if family.kind == "heads" and family.keys and "num_key_value_heads" in config:
                config["num_key_value_heads"] = n
        return config

    def scored(
        self, module: nn.Module, graph: Graph, found: list[Family], data: list[dict[str, Any]], progress: Progress
    ) -> tuple[dict[Family, np.ndarray], dict[str, torch.Tensor]]:
        """Importance of each family's groups, and the second moments that repair needs."""
        watched = {f: importance.readers(module, f.groups) for f in found if f.kind != "hidden"}
        readers = {name: r for each in watched.values() for name, r in each.items()}
        wanted = self.repair or self.importance in ("activation", "hessian")
        grams = inputs_of(module, readers, data, lambda i, n: progress(i, n, "inputs of layers")) if wanted else {}
        scores = {}
        for family in found:
            method = self.importance
            if family.kind == "hidden" or method in ("activation", "hessian") and not watched[family]:
                method = "taylor" if method in ("taylor", "hessian") else "magnitude"
            scores[family] = importance.score(method, module, graph, family.groups, grams, data)
        return scores, grams


def tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch of inputs as tensors."""
    return {name: torch.as_tensor(array) for name, array in batch.items()}


def few(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Two examples, and 16 places of tokens: enough to see what depends on what."""
    return {n: t[:2, :16] if t.ndim == 2 and not t.is_floating_point() else t[:2] for n, t in batch.items()}


def example(checkpoint: Checkpoint) -> dict[str, Any]:
    """Inputs of the model's own: token ids, or its task's examples."""
    if checkpoint.task.kind == "text-generation":
        return {"input_ids": torch.arange(16).reshape(2, 8) % int(checkpoint.config.get("vocab_size", 16))}
    return tensors(checkpoint.task.prepare(checkpoint.task.examples()))
