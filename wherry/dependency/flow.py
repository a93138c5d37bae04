"""Flow: which lanes of which tensors go together. A lane is one index of one dimension of one tensor.

Idea:   every lane of every parameter starts with a label of its own. Each operator ties lanes of what it reads to lanes
        of what it makes (`rules`); tied lanes share a label. When nothing changes any more, the lanes of one label can
        only be removed together. What cannot be removed is pinned, with the reason; what can, but where removing is
        not the same as zeroing (a mean over the lanes), is `inexact`.
Shapes: labels int64 [size of the dimension], -1 where a lane belongs to no parameter.
Cost:   sweeps over the operators, three to six, each linear in the lanes: about a second for a thousand operators.
Source: the dependency graph of Fang et al. 2023 (DepGraph, arXiv:2301.12900), with lanes in place of layers and
        operators in place of module types.
"""

import math
from collections.abc import Callable

import numpy as np

from wherry.dependency.record import Op, Record, Value
from wherry.errors import Unsupported

Rule = Callable[["Flow", Op], None]
NONE = -1


class Flow:
    """Labels of a record's lanes.

    seeds: {(parameter, dimension): labels [size], NONE for lanes that take no part}; by default every lane of every
    parameter has its own. factor: {operator that reshapes: which of the dimensions moves}.
    """

    def __init__(
        self, record: Record, rules: dict[str, Rule], seeds: dict[tuple[str, int], np.ndarray] | None = None,
        factor: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.record, self.rules, self.factor = record, rules, factor or {}
        self.lanes: dict[tuple[int, int], np.ndarray] = {}
        self.keep: dict[int, Value] = {}
        self.parent = np.zeros(0, np.int64)
        self.pinned: dict[int, str] = {}
        self.inexact: dict[int, str] = {}
        self.splits: dict[int, int] = {}  # operator -> how many ways there are to split its lanes
        self.choice: dict[tuple[int, int, int], int] = {}  # reshape and side -> the dimension that moves
        self.changed = False
        self.handled: set[tuple[int, int]] = set()
        for name, value in record.parameters.items():
            for d in range(value.rank):
                if seeds is None:
                    self.lanes[self.key(value, d)] = self.fresh(value.shape[d])
                elif (name, d) in seeds:
                    given = np.asarray(seeds[name, d], np.int64)
                    start = len(self.parent)
                    self.fresh(int(given.max(initial=-1)) + 1)
                    self.lanes[self.key(value, d)] = np.where(given >= 0, given + start, NONE)
        self.settle()

    def key(self, value: Value, d: int) -> tuple[int, int]:
        """Place of a dimension's labels."""
        self.keep[id(value)] = value
        return id(value), d % max(value.rank, 1)

    def fresh(self, n: int) -> np.ndarray:
        """New labels."""
        start = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(start, start + n)])
        return np.arange(start, start + n)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The labels under which these go now."""
        out = labels.copy()
        real = out >= 0
        out[real] = self.parent[out[real]]
        return out

    def labels(self, value: Value, d: int) -> np.ndarray | None:
        """Labels of a dimension as they are now; None when no lane has one."""
        found = self.lanes.get(self.key(value, d))
        return None if found is None else self.find(found)

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Make labels equal, pair by pair; pairs with NONE are left out."""
        real = (a >= 0) & (b >= 0)
        a, b = self.parent[a[real]], self.parent[b[real]]
        if (a == b).all():
            return
        self.changed = True
        while (a != b).any():  # hook the larger root below the smaller, then flatten
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self.parent, high, low)
            while (self.parent != self.parent[self.parent]).any():
                self.parent = self.parent[self.parent]
            a, b = self.parent[a], self.parent[b]

    def put(self, value: Value, d: int, labels: np.ndarray) -> None:
        """Give labels to lanes; a lane that has one already ties the two."""
        key = self.key(value, d)
        self.handled.add(key)
        old = self.lanes.get(key)
        if old is None:
            if (labels >= 0).any():
                self.lanes[key], self.changed = labels.copy(), True
            return
        self.union(old, labels)
        new = (old < 0) & (labels >= 0)
        if new.any():
            self.lanes[key], self.changed = np.where(new, labels, old), True

    def tie(self, a: Value, i: int, b: Value, j: int, where: np.ndarray | None = None) -> None:
        """Lane `where[n]` of b's dimension j is lane n of a's dimension i (NONE: it has no such lane)."""
        n, m = a.shape[i], b.shape[j]
        self.handled |= {self.key(a, i), self.key(b, j)}
        where = np.arange(n) if where is None else where
        assert where.shape == (n,), (a.shape, i, b.shape, j)
        real = where >= 0
        if (mine := self.labels(a, i)) is not None:
            there = np.full(m, NONE)
            there[where[real]] = mine[real]
            self.put(b, j, there)
            self.union(mine[real], there[where[real]])  # two lanes that meet in one
        if (theirs := self.labels(b, j)) is not None:
            here = np.full(n, NONE)
            here[real] = theirs[where[real]]
            self.put(a, i, here)

    def together(self, value: Value, d: int, block: np.ndarray) -> None:
        """Lanes with the same number in `block` [size] go together, when one of them has a label."""
        labels = self.labels(value, d)
        if labels is None:
            return
        count = int(block.max()) + 1
        first = np.full(count, np.iinfo(np.int64).max)
        real = labels >= 0
        np.minimum.at(first, block[real], labels[real])
        first[first == np.iinfo(np.int64).max] = NONE
        self.put(value, d, first[block])

    def pin(self, value: Value, d: int, why: str) -> None:
        """The lanes of a dimension stay."""
        self.handled.add(self.key(value, d))
        labels = self.labels(value, d)
        for label in () if labels is None else np.unique(labels[labels >= 0]):
            self.pinned.setdefault(int(label), why)

    def note(self, value: Value, d: int, why: str) -> None:
        """Removing these lanes is not the same as zeroing them."""
        self.handled.add(self.key(value, d))
        labels = self.labels(value, d)
        for label in () if labels is None else np.unique(labels[labels >= 0]):
            self.inexact.setdefault(int(label), why)

    def reshape(self, a: Value, b: Value, op: Op) -> None:
        """Lanes through a view of other sizes: dimensions that are merged or split, in groups of equal product.

        Of several dimensions that become one (heads and their width) one moves, the others are pinned: the one on whose
        index alone the labels hang; else the first, or the one that `factor` names.
        """
        for left, right in factors(a.shape, b.shape):
            if len(left) == len(right) == 1:
                self.tie(a, left[0], b, right[0])
                continue
            self.handled |= {self.key(a, i) for i in left} | {self.key(b, j) for j in right}
            mine, theirs = self.pick(a, left, b, right, op), self.pick(b, right, a, left, op)
            for value, dims, chosen in ((a, left, mine), (b, right, theirs)):
                for d in dims:
                    if d != chosen and self.key(value, d) in self.lanes:
                        self.pin(value, d, f"{op} lays it beside others that move")
            if mine is not None and theirs is not None:
                self.regroup(a, left, mine, b, right, theirs)
                self.regroup(b, right, theirs, a, left, mine)

    def pick(self, a: Value, left: list[int], b: Value, right: list[int], op: Op) -> int | None:
        """The dimension among `left` that moves; None when nothing has a label yet, or there is only one lane."""
        wide = [d for d in left if a.shape[d] > 1]
        if len(wide) < 2:
            return wide[0] if wide else None
        place = (id(op), id(a), left[0])
        if place not in self.choice:
            labelled = [d for d in wide if self.key(a, d) in self.lanes]
            others = [d for d in right if b.shape[d] > 1 and self.key(b, d) in self.lanes]
            if not labelled and not others:
                return None
            found = labelled[0] if len(labelled) == 1 and not others else None
            if len(others) == 1:
                spread = self.spread(b, right, others[0]).reshape([a.shape[d] for d in left])
                found = next((d for d in wide if constant(spread, left.index(d))), None)
            if found is None:
                self.splits[id(op)] = max(self.splits.get(id(op), 0), len(wide))
                found = wide[min(self.factor.get(id(op), 0), len(wide) - 1)]
            self.choice[place] = found
        return self.choice[place]

    def spread(self, a: Value, dims: list[int], moving: int) -> np.ndarray:
        """Labels of the moving dimension at each place of the product of `dims`."""
        labels = self.labels(a, moving)
        assert labels is not None
        shape = [a.shape[d] if d == moving else 1 for d in dims]
        return np.broadcast_to(labels.reshape(shape), [a.shape[d] for d in dims])

    def regroup(self, a: Value, left: list[int], mine: int, b: Value, right: list[int], theirs: int) -> None:
        """Labels of a's dimension `mine`, spread over the product of `left`, gathered in b's dimension `theirs`."""
        if self.key(a, mine) not in self.lanes:
            return
        spread = self.spread(a, left, mine).reshape([b.shape[d] for d in right])
        rows = np.moveaxis(spread, right.index(theirs), 0).reshape(b.shape[theirs], -1)
        first = np.where(rows >= 0, rows, np.iinfo(np.int64).max).min(1)
        first[first == np.iinfo(np.int64).max] = NONE
        self.union(rows.ravel(), np.repeat(first, rows.shape[1]))
        self.put(b, theirs, first)

    def settle(self) -> None:
        """Sweep over the operators until nothing changes, then pin what is left over."""
        self.changed = True
        backwards = False
        while self.changed:
            self.changed = False
            for op in reversed(self.record.ops) if backwards else self.record.ops:
                self.apply(op, last=False)
            backwards = not backwards
        for op in self.record.ops:
            self.apply(op, last=True)
        for value in self.keep.values():
            if value.kind in ("input", "constant"):
                for d in range(value.rank):
                    what = "an input of the module" if value.kind == "input" else "a constant of the code"
                    self.pin(value, d, f"it is as wide as {what}")

    def apply(self, op: Op, last: bool) -> None:
        """One operator's rule. The last time, what it did not handle is pinned.

        Raises Unsupported for an operator without a rule that touches a labelled lane.
        """
        values = op.values
        places = [(v, d) for v in values for d in range(v.rank) if self.key(v, d) in self.lanes]
        if not places:
            return
        self.handled = set()
        rule = self.rules.get(op.name) or (self.rules["pointwise"] if op.pointwise else None)
        if rule is None:
            raise Unsupported(
                f"pruning does not know which channels the operator {op.name} keeps together"
                f"{f' (in {op.where})' if op.where else ''}.\n"
                "Write it with operators that are known, or leave that part out of the model that is pruned."
            )
        rule(self, op)
        if last:
            for value, d in places:
                if self.key(value, d) not in self.handled:
                    self.pin(value, d, f"{op} needs them all")


def constant(spread: np.ndarray, axis: int) -> bool:
    """Whether labels depend on the index of one axis alone."""
    rows = np.moveaxis(spread, axis, 0).reshape(spread.shape[axis], -1)
    return bool((rows == rows[:, :1]).all())


def factors(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of two shapes of equal product, in the smallest groups of equal product."""
    found, i, j = [], 0, 0
    if 0 in a or 0 in b:
        return []
    while i < len(a) or j < len(b):
        left, right = [], []
        p = q = 1
        if i < len(a):
            left, p, i = [i], a[i], i + 1
        if j < len(b):
            right, q, j = [j], b[j], j + 1
        while p != q:
            if p < q:
                left, p, i = [*left, i], p * a[i], i + 1
            else:
                right, q, j = [*right, j], q * b[j], j + 1
        found.append((left, right))
    assert math.prod(a) == math.prod(b)
    return found


__all__ = ["NONE", "Flow", "Rule"]
