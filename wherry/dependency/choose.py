"""Choose: how many lanes of each family stay, by shares, by numbers, or until a budget of parameters or work is met.

Widths that one entry of a configuration counts stay equal in all layers; layers of a graph may have any width each.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from wherry.dependency import Graph, Group
from wherry.dependency.cost import Cost
from wherry.dependency.kinds import Family, amount, lowest, rounded
from wherry.errors import BadInput

MOST = 0.9  # of a layer, where a budget decides: what is left must still pass something on
STEPS = 200


def counts(
    families: Sequence[Family], given: Mapping[str, str], multiples: Mapping[str, int]
) -> dict[Family, int]:
    """How many groups stay in each family by the knobs given ({kind: amount as text}).

    Raises BadInput: an amount that is no number, keeps nothing, or breaks groups of heads.
    """
    stay = {}
    for family in families:
        text = given.get(family.kind, "")
        if not text:
            continue
        before = len(family.groups) * family.each
        wanted = amount(text, before, family.kind)
        if family.kind == "heads" and float(text) >= 1 and wanted % family.each:
            raise BadInput(
                f"heads={text} breaks groups: {family.each} query heads share one head of keys.\n"
                f"Give a multiple of {family.each}, or by=queries with a multiple of {len(family.groups)}."
            )
        wanted /= family.each
        if wanted < 0.5:
            raise BadInput(f"{family.kind}={text} leaves nothing of {family.place}: keep one at least")
        stay[family] = rounded(wanted, len(family.groups), multiples.get(family.kind, 1))
    for kind, text in given.items():
        if text and not any(family.kind == kind for family in families):
            raise BadInput(f"{kind}={text}: this model has no {kind} that can go")
    return stay


def uniform(
    graph: Graph, families: Sequence[Family], target: float, by: str, multiples: Mapping[str, int]
) -> dict[Family, int]:
    """The smallest equal share of all these families that saves `target` (0 to 1) of the parameters or macs.

    Raises BadInput when even the largest share does not.
    """
    cost, found = Cost(graph), 0.0
    for step in range(1, STEPS):
        share = MOST * step / (STEPS - 1)
        stay = {f: rounded(len(f.groups) * (1 - share), len(f.groups), multiples.get(f.kind, 1)) for f in families}
        gone = [g for f, n in stay.items() for g in f.groups[n:]]  # which ones does not matter to the count
        found = 1 - cost.of(gone)[by] / cost.total[by]
        if found >= target:
            return stay
    kinds = ", ".join(dict.fromkeys(f.kind for f in families)) or "nothing"
    raise BadInput(
        f"{by}={target}: {kinds} can save {found:.0%} at most.\nAdd depth, hidden, or vocabulary, or ask for less."
    )


def reach(graph: Graph, families: Sequence[Family], target: float, by: str, multiple: int) -> None:
    """Raise BadInput where all that may go of all families saves less than `target` of the parameters or macs."""
    cost = Cost(graph)
    stay = {f: rounded(int(np.ceil(len(f.groups) * (1 - MOST))), len(f.groups), multiple) for f in families}
    most = 1 - cost.of([g for f, n in stay.items() for g in f.groups[n:]])[by] / cost.total[by]
    if most < target:
        raise BadInput(f"{by}={target}: the channels that may go save {most:.0%} at most; ask for less")


def ranked(
    graph: Graph, families: Sequence[Family], scores: Mapping[Family, np.ndarray], target: float, by: str, multiple: int
) -> dict[Family, int]:
    """Layers of any width each: groups that matter least for what they cost go, until the budget is met.

    Source: saliency per cost as in HALP (Shen et al. 2022, arXiv:2110.10811), by one level in place of a knapsack.
    Scores are divided by what one group of the family saves of the budget, so they must mean the same in all layers:
    taylor's do. No family loses more than MOST; widths are rounded to `multiple`.
    Raises BadInput when the budget cannot be met.
    """
    cost = Cost(graph)
    each = {f: max(1, cost.total[by] - cost.of([f.groups[0]])[by]) for f in families}
    scaled = {f: np.sort(s / each[f]) for f, s in scores.items()}
    levels = np.unique(np.concatenate([s for s in scaled.values()]))

    def kept(level: float) -> dict[Family, int]:
        stay = {}
        for family in families:
            n = len(family.groups)
            wanted = max(n - int(np.searchsorted(scaled[family], level)), int(np.ceil(n * (1 - MOST))))
            stay[family] = rounded(wanted, n, multiple)
        return stay

    def saved(level: float) -> float:
        gone = [g for f, n in kept(level).items() for g in f.groups[n:]]
        return 1 - cost.of(gone)[by] / cost.total[by]

    reach(graph, families, target, by, multiple)
    low, high = 0, len(levels)
    while low < high:  # the lowest level that meets the budget
        middle = (low + high) // 2
        if saved(levels[middle] if middle < len(levels) else np.inf) >= target:
            high = middle
        else:
            low = middle + 1
    return kept(levels[low] if low < len(levels) else np.inf)


def removed(stay: Mapping[Family, int], scores: Mapping[Family, np.ndarray]) -> list[Group]:
    """The groups that go."""
    return [group for family, n in stay.items() for group in lowest(family.groups, scores[family], n)]
