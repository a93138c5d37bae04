"""Kinds: what families of groups are in a transformer: hidden size, heads, neurons; and how many of each may stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wherry.dependency import Graph, Group, of_record
from wherry.dependency.architecture import names, pick
from wherry.errors import BadInput

KINDS = ("neurons", "heads", "hidden", "channels")


@dataclass(eq=False)
class Family:
    """Groups that can stand for one another. entry: of the configuration that counts them, "" where none does.

    each: how many of the entry's things one group is (the query heads over one group of keys).
    keys: whether heads of keys go with them.
    """

    kind: str
    groups: list[Group]
    entry: str = ""
    each: int = 1
    keys: bool = True

    @property
    def place(self) -> str:
        """A weight that it lies in."""
        return min(self.groups[0].lanes)[0]


def families(graph: Graph, config: Mapping[str, Any] | None) -> list[Family]:
    """The families of a graph that can be pruned. config: None for a model that has none: all are channels."""
    if config is None:
        return [Family("hidden" if f[0].inexact else "channels", f) for f in graph.families()]
    entries = names(config)
    hidden = int(config[pick(entries.hidden, config, "")])
    heads = int(config[pick(entries.heads, config, "")])
    width = int(config.get(entries.width) or hidden // heads)
    found = []
    for groups in graph.families():
        one = max(len(index) for index in groups[0].lanes.values())
        place = min(groups[0].lanes)[0]
        if groups[0].inexact:
            if len(groups) == hidden:
                found.append(Family("hidden", groups, pick(entries.hidden, config, "")))
            continue
        entry = pick(entries.heads, config, place)
        count = int(config[entry])
        if width > 2 and one % width == 0 and count % len(groups) == 0:
            found.append(Family("heads", groups, entry, count // len(groups)))
            continue
        sizes = {e: config.get(e) or (4 * hidden if e == "n_inner" else None) for e in entries.neurons}
        mine = pick(entries.neurons, config, place)
        match = next((e for e in (mine, *entries.neurons) if sizes.get(e) == len(groups)), None)
        if match is not None:
            found.append(Family("neurons", groups, match))
    return found


def by_query(graph: Graph, config: Mapping[str, Any]) -> tuple[Graph, list[Family]]:
    """Heads over shared keys one by one: the n-th query head of every group goes, the keys stay."""
    found = families(graph, config)
    shared = [family for family in found if family.kind == "heads" and family.each > 1]
    parameters = graph.flow.record.parameters
    seeds = {(name, d): np.arange(n) for name, value in parameters.items() for d, n in enumerate(value.shape)}
    for family in shared:
        lanes = family.groups[0].lanes
        place = max((p for p in lanes if p[1] == 1), key=lambda p: len(lanes[p]))
        width = graph.shapes[place[0]][1] // (family.each * len(family.groups))
        seeds = {p: labels for p, labels in seeds.items() if p not in lanes}
        seeds[place] = np.tile(np.repeat(np.arange(family.each), width), len(family.groups))
    graph = of_record(graph.flow.record, seeds, graph.outputs)
    found = families(graph, config)
    for family in found:
        if family.kind == "heads":
            family.keys = False
    if sum(not family.keys for family in found) < len(shared):
        raise BadInput("the query heads of some layers cannot go alone; prune whole groups of them: by=groups")
    return graph, found


def rounded(wanted: float, before: int, multiple: int) -> int:
    """How many stay: the nearest multiple, at least one of it, never more than there are."""
    if multiple <= 1 or before < multiple:
        return min(before, max(1, round(wanted)))
    return min(before, max(multiple, multiple * round(wanted / multiple)))


def amount(text: str, before: int, what: str) -> float:
    """How many stay by a knob: a share that goes (0.3), or a number that stays (1024). Raises BadInput."""
    try:
        value = float(text)
    except ValueError as error:
        raise BadInput(f"{what}={text} is no number: a share that goes (0.3) or how many stay (1024)") from error
    if not np.isfinite(value) or value < 0:
        raise BadInput(f"{what}={text}: a share below 1 that goes, or how many stay")
    if value == 0:
        raise BadInput(f"{what}={text} takes nothing: a share below 1 that goes (0.3), or how many stay of {before}")
    if value < 1:
        return before * (1 - value)
    if value == 1 and "." in text:
        raise BadInput(f"{what}={text} leaves nothing: a share below 1 goes, or a whole number stays ({what}=1)")
    if value != int(value) or value > before:
        raise BadInput(f"{what}={text}: there are {before}; give fewer that stay, or a share below 1 that goes")
    return value


def lowest(groups: Sequence[Group], scores: np.ndarray, stay: int) -> list[Group]:
    """The groups of least score, so that `stay` are left."""
    order = np.argsort(scores, kind="stable")
    return [groups[i] for i in sorted(order[: len(groups) - stay])]
