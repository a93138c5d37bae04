"""Stream: tensor by tensor from disk to disk, for methods that need no data. Memory: one tensor and its codes."""

from dataclasses import replace
from typing import Any

import torch

from wherry.engine import share
from wherry.engine.unit import Unit, fact, original, round_to_nearest, solved, store, units
from wherry.journal import Units
from wherry.recipe import Plan, PlanRow, Progress
from wherry.scheme import QTensor
from wherry.tensorfile import TensorFile


def settle(plan: Plan, unit: Unit, journal: Units) -> TensorFile:
    """Do one unit without data and write it to the journal."""
    tensors, facts = {}, []
    for row in unit.rows:
        w = original(plan.checkpoint, row)
        notes: list[str] = []
        result = w
        step = plan.recipe.steps[row.step]
        if row.step >= 0 and step.gait == "zeros":
            result = zeroed(plan, row, w, None, notes)
        elif row.scheme:
            assert not isinstance(w, QTensor)
            plain = row.role != "linear" or step.calibrated
            result = round_to_nearest(plan, row, w) if plain else solved(step, w, plan.device)
        tensors.update(store(row, result))
        facts.append(fact(row, w.decode() if isinstance(w, QTensor) else w, result, notes))
    return journal.save(unit.key, tensors, {"rows": facts})


def zeroed(plan: Plan, row: PlanRow, w: Any, stat: Any, notes: list[str]) -> torch.Tensor:
    """One weight with its zeros, in the dtype in which it is stored."""
    step: Any = plan.recipe.steps[row.step]
    step = replace(step, sparsity=row.sparsity) if 0 < row.sparsity < 1 and not step.pattern else step
    found = step.prune(w.float(), stat, notes).to(w.dtype)
    found = torch.where(found == 0, torch.zeros_like(found), found)  # -0.0 is another value to whoever codes bits
    if not row.sparsity and torch.equal(found, w):
        notes.append(f"{step.method} took nothing here")
    return found


def run(plan: Plan, journal: Units, progress: Progress) -> list[TensorFile]:
    """All units, those that are done already left alone."""
    share.run(plan, journal, [], progress)
    todo = units(plan)
    finished = []
    for i, unit in enumerate(todo):
        progress(i, len(todo), unit.path or unit.key)
        finished.append(journal.done(unit.key) or settle(plan, unit, journal))
    progress(len(todo), len(todo), "")
    return finished
