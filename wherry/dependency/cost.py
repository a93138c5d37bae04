"""Cost: parameters and multiply-accumulates of a recorded module, whole and with groups removed.

Shapes: counts of one run on the example inputs, all of its batch. Products, convolutions and attention are counted;
the rest is small beside them.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wherry.dependency.record import Op, Value

if TYPE_CHECKING:
    from wherry.dependency import Graph, Group


class Cost:
    """Counts of a graph. Labels are looked up once, so that many sets of groups can be tried."""

    def __init__(self, graph: "Graph") -> None:
        self.graph = graph
        labels, self.sizes = graph.flow.labels, {}
        record = graph.flow.record
        for value in [*record.parameters.values(), *(v for op in record.ops for v in op.values)]:
            for d in range(value.rank):
                found = labels(value, d)
                if found is not None:
                    self.sizes[id(value), d] = np.unique(found[found >= 0], return_counts=True)
        self.counted = [(op, count(op)) for op in record.ops if count(op)]
        self.total = self.of([])

    def of(self, removed: "Sequence[Group]") -> dict[str, int]:
        """{"parameters": n, "macs": n} when these groups are gone."""
        gone = np.array(sorted(group.label for group in removed), np.int64)
        lost: dict[tuple[int, int], int] = {}

        def size(value: Value, d: int) -> int:
            key = id(value), d % value.rank
            if key not in self.sizes or not len(gone):
                return value.shape[d]
            if key not in lost:
                labels, counts = self.sizes[key]
                lost[key] = int(counts[np.isin(labels, gone)].sum())
            return value.shape[d] - lost[key]

        def whole(value: Value) -> int:
            return math.prod(size(value, d) for d in range(value.rank))

        parameters = sum(whole(value) for value in self.graph.flow.record.parameters.values())
        macs = 0
        for _, terms in self.counted:
            for out, (inner, dims) in terms:
                macs += whole(out) * math.prod(size(inner, d) for d in dims)
        return {"parameters": parameters, "macs": macs}


def count(op: Op) -> list[tuple[Value, tuple[Value, tuple[int, ...]]]]:
    """[(result, (tensor, its dimensions that are summed over for each element of the result))]."""
    tensors = [v for v in op.args if isinstance(v, Value)]
    if op.name in ("mm", "bmm", "mv", "matmul", "linear", "_grouped_mm"):
        return [(op.outputs[0], (tensors[0], (tensors[0].rank - 1,)))]
    if op.name in ("addmm", "baddbmm", "addmv"):
        return [(op.outputs[0], (tensors[1], (tensors[1].rank - 1,)))]
    if "convolution" in op.name:
        w = tensors[1]
        if op.given("transposed")[0]:
            return [(tensors[0], (w, tuple(range(1, w.rank))))]
        return [(op.outputs[0], (w, tuple(range(1, w.rank))))]
    if "scaled_dot_product" in op.name:
        q, k, _ = tensors[:3]
        return [(q, (k, (k.rank - 2,))), (op.outputs[0], (k, (k.rank - 2,)))]
    return []


__all__ = ["Cost"]
