"""Allocate: one choice for each thing, of least cost in sum, within every budget: an exact solver.

Source: the multiple-choice knapsack problem, solved as a mixed-integer program by HiGHS (Huangfu & Hall 2018) in scipy.
Shapes: cost [things, choices]; size the same, or [budgets, things, choices]. Cost: milliseconds for hundreds of things.
"""

from collections.abc import Sequence

import numpy as np

from wherry.errors import BadInput, Diverged

STEEP = 1e4  # the greatest cost that the solver sees; it stops within 1e-6 of the best, which scipy has no option for

CLOSE = 1e-6  # its tolerance on a budget


def allocate(cost: np.ndarray, size: np.ndarray, budget: float | Sequence[float]) -> np.ndarray:
    """Index of the choice for each thing, int [things]: least sum of cost with sums of size of at most `budget`.

    Raises:
        BadInput: even the smallest choices are larger than a budget, or no choice fits all. Diverged: costs are not
            finite.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    things, choices = cost.shape
    if not np.isfinite(cost).all():
        raise Diverged("a sensitivity is NaN or infinite: check the model and the calibration data")
    sizes, most = size.reshape(-1, things, choices), np.atleast_1d(np.asarray(budget, float))
    for least, allowed in zip(sizes.min(2).sum(1), most, strict=True):
        if least > allowed:
            raise BadInput(f"the smallest choices take {least:,.0f} where {allowed:,.0f} are allowed: raise the budget")
    one = np.kron(np.eye(things), np.ones(choices))
    more = cost - cost.min(1, keepdims=True)
    scaled = more.ravel() * (STEEP / max(float(more.max()), 1e-300))
    share = sizes.reshape(len(most), -1) / most[:, None]
    for room in (1.0, 1 - CLOSE, 1 - 10 * CLOSE):  # what the solver calls full may be too much by so little
        found = milp(
            scaled, integrality=np.ones(things * choices), bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(share, -np.inf, room)],
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.x is None:
            break
        choice = found.x.reshape(things, choices).argmax(1)
        if (sizes[:, np.arange(things), choice].sum(1) <= most).all():
            return choice
    if found.status == 2:  # infeasible
        raise BadInput("no choice is within every budget at once: raise one of them")
    raise Diverged(f"the solver found no allocation: {found.message}")
