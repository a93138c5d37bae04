"""Budget: how many bytes each scheme of each weight takes in the files that a plan writes, and how many there may be.

A format counts by itself, `bytes_of(plan, row)` for a tensor and `besides(plan)` for all that is none: three bits live
in places of four in GGUF and ONNX. A format that does not is counted as the checkpoint. Raised here, when the plan is
made: a budget that the smallest choices miss.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wherry import shelf
from wherry.errors import BadInput
from wherry.rows import PlanRow

CHECKPOINT = "compressed_tensors"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def in_bytes(text: str) -> float:
    """"100MB", "1.5 GB" or "300MiB" as bytes. Raises BadInput."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]?i?)b?", text.strip().lower())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise BadInput(f"'{text}' is no size; write 100MB, 1.5GB or 300MiB")
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Budget:
    """What one file may take. sizes: bytes [weights, schemes]; rest: bytes of all else in it; most: of the weights.

    counted: number of weights that are chosen for, in parameters.
    """

    format: str
    sizes: np.ndarray
    rest: float
    most: float
    counted: int

    @property
    def least(self) -> float:
        """Bytes of the smallest choices."""
        return float(self.sizes.min(1).sum())


def chosen_for(plan: Any, step: Any) -> list[PlanRow]:
    """Rows of the linear weights whose scheme an `assign` step chooses."""
    return [row for row in plan.rows if row.scheme and row.role == "linear" and step.wants(row.name)]


def budgets(plan: Any, step: Any) -> list[Budget]:
    """One for each file that the plan writes for a runtime; of the checkpoint where it writes no other.

    Raises BadInput where there is no weight to choose for, and, naming the least that can be asked for, where the
    smallest schemes are larger.
    """
    rows = chosen_for(plan, step)
    if not rows:
        raise BadInput(f"no step gives codes to any weight that {step.method} is to choose for: see their targets=")
    counted = sum(math.prod(row.shape) for row in rows)
    mine = {row.name for row in rows}
    found = []
    for name in plan.formats or (CHECKPOINT,):
        module = shelf.find("formats", name)
        module = module if hasattr(module, "bytes_of") else shelf.find("formats", CHECKPOINT)
        rest = float(module.besides(plan) + sum(module.bytes_of(plan, r) for r in plan.rows if r.name not in mine))
        sizes = [[module.bytes_of(plan, replace(row, scheme=s)) for s in step.choices(row.scheme)] for row in rows]
        found.append(Budget(name, np.array(sizes, float), rest, step.most(counted, rest), counted))
    short = max(found, key=lambda budget: budget.least - budget.most)
    if short.least > short.most:
        raise BadInput(f"{step.method}: {step.short(short)}")
    return found
