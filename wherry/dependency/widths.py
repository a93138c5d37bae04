"""Widths: what may go of a model, and how much of each stays, checked against what its configuration can say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wherry import dependency
from wherry.checkpoint import Checkpoint
from wherry.dependency import Graph, choose, kinds
from wherry.dependency.architecture import expressed, names
from wherry.dependency.cost import Cost
from wherry.dependency.kinds import Family
from wherry.errors import BadInput, Unsupported

ROUNDED = ("neurons", "hidden", "channels")


@dataclass
class Widths:
    """given: {kind: amount as text}. target, of: the share of "parameters" or "macs" to save; 0: none.

    queries: heads go one by one from each group. multiple: of neurons, channels, hidden lanes. uniform: equal shares.
    """

    checkpoint: Checkpoint
    given: Mapping[str, str]
    target: float
    of: str
    queries: bool
    multiple: int
    uniform: bool
    graph: Graph = field(init=False, repr=False)
    families: list[Family] = field(init=False, repr=False)
    stay: dict[Family, int] = field(init=False, repr=False)

    def plan(self, module: nn.Module, inputs: Mapping[str, Any]) -> "Widths":
        """Find the families and how many of each stay: `stay` is empty where importance will decide.

        Raises:
            Unsupported: an operator that is not known, or widths that the configuration cannot say.
            BadInput: an amount that leaves nothing, breaks groups of heads, or a budget out of reach.
        """
        config = None if self.checkpoint.graph is not None else self.checkpoint.config
        self.graph = dependency.graph(module, inputs, outputs=config is not None and bool(self.given.get("hidden")))
        self.families = kinds.families(self.graph, config)
        if self.queries and config is not None:
            self.graph, self.families = kinds.by_query(self.graph, config)
        multiples = dict.fromkeys(ROUNDED, self.multiple)
        if self.target:
            self.families = [f for f in self.families if f.kind != "hidden"]
            if config is not None and not self.sayable([f for f in self.families if f.kind == "heads"]):
                self.families = [f for f in self.families if f.kind != "heads"]
            ranked = config is None and not self.uniform
            self.stay = {} if ranked else choose.uniform(self.graph, self.families, self.target, self.of, multiples)
        else:
            self.stay = choose.counts(self.families, self.given, multiples)
            self.families = list(self.stay)
        if not self.families:
            raise BadInput(f"{self.checkpoint.name} has nothing of that kind that can go")
        if self.target and not self.stay:
            choose.reach(self.graph, self.families, self.target, self.of, self.multiple)
        if self.stay and all(n == len(family.groups) for family, n in self.stay.items()):
            asked = ", ".join(f"{kind}={text}" for kind, text in self.given.items() if text)
            raise BadInput(f"width: {asked} leaves {self.checkpoint.name} as it is, once rounded: let more go")
        if config is not None:
            self.check(self.stay)
        return self

    def sayable(self, heads: list[Family]) -> bool:
        """Whether the configuration can tell fewer heads: found by trying one less."""
        try:
            self.check({family: len(family.groups) - 1 for family in heads})
        except Unsupported:
            return False
        return True

    def shapes(self, stay: Mapping[Family, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights once that many of each family stay."""
        shapes = {name: list(shape) for name, shape in self.graph.shapes.items()}
        for (name, d), mask in self.graph.kept(first(stay)).items():
            shapes[name][d] = int(mask.sum())
        return {name: tuple(shape) for name, shape in shapes.items()}

    def check(self, stay: Mapping[Family, int]) -> None:
        """Raise Unsupported where the configuration cannot say the result."""
        found = {family.kind for family in stay}
        what = "heads" if "heads" in found else "hidden" if "hidden" in found else "neurons"
        expressed(self.checkpoint, self.config(stay), self.shapes(stay), what)

    def config(self, stay: Mapping[Family, int]) -> dict[str, Any]:
        """The configuration with the new widths."""
        config, entries = dict(self.checkpoint.config), names(self.checkpoint.config)
        hidden = int(config[next(e for e in entries.hidden if e in config)])
        if entries.width and any(f.kind in ("heads", "hidden") for f in stay) and not config.get(entries.width):
            config[entries.width] = hidden // int(config[next(e for e in entries.heads if e in config)])
        for family, n in stay.items():
            config[family.entry] = n * family.each
            if family.kind == "hidden":
                config |= {entry: n for entry in entries.hidden if entry in config}
            if family.kind == "heads" and family.keys and "num_key_value_heads" in config:
                config["num_key_value_heads"] = n
        return config

    def told(self) -> str:
        """The plan in words: widths before and after, what was rounded, parameters and work."""
        if not self.stay:
            layers = len(self.families)
            return f"channels of least importance in {layers} layers, until {self.target:.0%} of {self.of} are saved"
        said: dict[str, None] = {}
        for family, n in self.stay.items():
            before, after = len(family.groups) * family.each, n * family.each
            asked = self.given.get(family.kind, "")
            wanted = kinds.amount(asked, before, family.kind) if asked else after
            note = f" (asked for {wanted:g}, rounded)" if wanted != after else ""
            said[f"{family.kind} {before} -> {after}{note}"] = None
        cost = Cost(self.graph)
        left = cost.of(first(self.stay))
        saved = [f"{key} {cost.total[key]:,} -> {left[key]:,}" for key in left]
        return ", ".join([*said, *saved])


def first(stay: Mapping[Family, int]) -> list[dependency.Group]:
    """As many groups as will go: for counts, where it does not matter which."""
    return [group for family, n in stay.items() for group in family.groups[n:]]
