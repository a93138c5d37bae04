"""Dependency: which channels of which weights can only be removed together, found from a run of the model.

    graph = dependency.graph(module, {"x": torch.randn(2, 3, 32, 32)})
    for group in graph.groups:            # lanes of weights that go together
        group.lanes                       # {("conv1.weight", 0): array([5]), ("bn1.weight", 0): array([5]), ...}
    dependency.cut(module, graph, removed=[group, ...])       # smaller weights, in place

No table of architectures: the model runs once on example inputs, each tensor operator that it calls ties lanes
(`flow`), and the lanes that are tied are one group. Residuals, concatenations, splits, heads, grouped queries, gates,
grouped and depthwise convolutions, tied tables and flattened pictures are nothing special.

Raises Unsupported for an operator that it does not know, with its name, when lanes of a weight reach it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from wherry.dependency import layers, places, rules  # noqa: F401 - the first two fill the table of rules
from wherry.dependency.flow import NONE, Flow
from wherry.dependency.record import Record, run

Place = tuple[str, int]  # a parameter's name and a dimension


@dataclass(eq=False)
class Group:
    """Lanes that can only be removed together.

    lanes: {(parameter, dimension): indices}. pinned: why they cannot be removed, or "". inexact: why removing them is
    not the same as setting their weights to zero, or "".
    """

    lanes: dict[Place, np.ndarray]
    label: int
    pinned: str = ""
    inexact: str = ""

    @property
    def places(self) -> frozenset[Place]:
        """Where its lanes are."""
        return frozenset(self.lanes)


@dataclass
class Graph:
    """Groups of a module's lanes. `alias`: second names of tied parameters. shapes: of the parameters."""

    groups: list[Group]
    shapes: dict[str, tuple[int, ...]]
    alias: dict[str, str]
    parameters: frozenset[str]
    flow: Flow = field(repr=False)
    outputs: bool = False

    def families(self) -> list[list[Group]]:
        """Groups that lie in the same places and so can stand for one another: the channels of a layer, its heads.

        Pinned groups are left out, and a group that is alone in its places, which would take a whole layer.
        """
        found: dict[frozenset[Place], list[Group]] = {}
        for group in self.groups:
            if not group.pinned:
                found.setdefault(group.places, []).append(group)
        return [groups for groups in found.values() if len(groups) > 1]

    def kept(self, removed: Sequence[Group]) -> dict[Place, np.ndarray]:
        """Masks (True: stays) of the places that lose a lane."""
        masks: dict[Place, np.ndarray] = {}
        for group in removed:
            for (name, d), index in group.lanes.items():
                mask = masks.setdefault((name, d), np.ones(self.shapes[name][d], bool))
                mask[index] = False
        return masks

    def empty(self, removed: Sequence[Group]) -> str:
        """The name of a parameter that would lose all its lanes, or ""."""
        return next((name for (name, _), mask in self.kept(removed).items() if not mask.any()), "")


def graph(
    module: nn.Module, inputs: Mapping[str, Any], seeds: dict[Place, np.ndarray] | None = None, outputs: bool = False
) -> Graph:
    """Groups of the module's lanes, from one run on example inputs (by name of forward's arguments).

    seeds: labels of the lanes to follow, see `Flow`; by default all lanes of all parameters.
    outputs: whether lanes of the module's results may go as well.
    """
    record = run(module, inputs)
    return of_record(record, seeds, outputs)


def of_record(record: Record, seeds: dict[Place, np.ndarray] | None = None, outputs: bool = False) -> Graph:
    """Groups of a recorded run. Where several dimensions of a view may move, the choice that frees most is taken."""
    flow = trial(record, seeds, outputs, {})
    best = free(flow)
    for op, ways in flow.splits.items():
        for way in range(1, ways):
            other = trial(record, seeds, outputs, flow.factor | {op: way})
            if (found := free(other)) > best:
                flow, best = other, found
    shapes = {name: value.shape for name, value in (record.parameters | record.buffers).items()}
    return Graph(gather(flow), shapes, record.alias, frozenset(record.parameters), flow, outputs)


def trial(
    record: Record, seeds: dict[Place, np.ndarray] | None, outputs: bool, factor: dict[int, int]
) -> Flow:
    """Labels under one choice of what moves."""
    flow = Flow(record, rules.RULES, seeds, factor)
    for value in () if outputs else record.outputs:
        for d in range(value.rank):
            flow.pin(value, d, "it is as wide as an output of the module")
    return flow


def free(flow: Flow) -> int:
    """How many lanes of parameters can be removed."""
    stays = np.zeros(len(flow.parent), bool)
    stays[flow.parent[list(flow.pinned)]] = True
    values = (flow.record.parameters | flow.record.buffers).values()
    found = (flow.labels(value, d) for value in values for d in range(value.rank))
    return sum(int((~stays[labels[labels != NONE]]).sum()) for labels in found if labels is not None)


def gather(flow: Flow) -> list[Group]:
    """The groups of a flow, in the order of their first parameter."""
    pinned = {int(flow.parent[label]): why for label, why in reversed(list(flow.pinned.items()))}
    inexact = {int(flow.parent[label]): why for label, why in reversed(list(flow.inexact.items()))}
    groups: dict[int, Group] = {}
    for name, value in (flow.record.parameters | flow.record.buffers).items():
        for d in range(value.rank):
            labels = flow.labels(value, d)
            if labels is None:
                continue
            order = np.argsort(labels, kind="stable")
            order = order[labels[order] != NONE]
            bounds = np.flatnonzero(np.diff(labels[order], prepend=-2))
            for index in np.split(order, bounds[1:]):
                label = int(labels[index[0]])
                group = groups.setdefault(label, Group({}, label, pinned.get(label, ""), inexact.get(label, "")))
                group.lanes[name, d] = index
    return list(groups.values())


__all__ = ["Graph", "Group", "Place", "graph", "of_record"]
