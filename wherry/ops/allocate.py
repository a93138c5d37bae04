"""Allocate: one choice for each thing, of least cost in sum, within a budget: an exact solver.

Source: the multiple-choice knapsack problem, solved as a mixed-integer program by HiGHS (Huangfu & Hall 2018) in scipy.
Shapes: cost, size [things, choices]. Cost: milliseconds for hundreds of things.
"""

import numpy as np

from wherry.errors import BadInput, Diverged

STEEP = 1e4  # the greatest cost that the solver sees; it stops within 1e-6 of the best, which scipy has no option for


def allocate(cost: np.ndarray, size: np.ndarray, budget: float) -> np.ndarray:
    """Index of the choice for each thing, int [things]: least sum of cost with a sum of size of at most `budget`.

    Raises:
        BadInput: even the smallest choices are larger than the budget. Diverged: costs are not finite.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    things, choices = cost.shape
    if not np.isfinite(cost).all():
        raise Diverged("a sensitivity is NaN or infinite: check the model and the calibration data")
    least = float(size.min(1).sum())
    if least > budget:
        raise BadInput(f"the smallest choices take {least:,.0f} where {budget:,.0f} are allowed: raise the budget")
    one = np.kron(np.eye(things), np.ones(choices))
    more = cost - cost.min(1, keepdims=True)
    scaled = more.ravel() * (STEEP / max(float(more.max()), 1e-300))
    found = milp(
        scaled, integrality=np.ones(things * choices), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size.reshape(1, -1) / budget, -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        raise Diverged(f"the solver found no allocation: {found.message}")
    return found.x.reshape(things, choices).argmax(1)
