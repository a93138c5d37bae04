"""Stream: tensor by tensor from disk to disk, for methods that need no data. Memory: one tensor and its codes."""

from wherry.engine.unit import Unit, fact, original, round_to_nearest, store, units
from wherry.journal import Journal
from wherry.recipe import Plan, Progress
from wherry.scheme import QTensor
from wherry.tensorfile import TensorFile


def settle(plan: Plan, unit: Unit, journal: Journal) -> TensorFile:
    """Do one unit without data and write it to the journal."""
    tensors, facts = {}, []
    for row in unit.rows:
        w = original(plan.checkpoint, row)
        result = w
        if row.scheme:
            assert not isinstance(w, QTensor)
            step = plan.recipe.steps[row.step]
            plain = row.role != "linear" or step.calibrated
            result = round_to_nearest(plan, row, w) if plain else step.solve(w)
        tensors.update(store(row, result))
        facts.append(fact(row, w.decode() if isinstance(w, QTensor) else w, result, []))
    return journal.save(unit.key, tensors, {"rows": facts})


def run(plan: Plan, journal: Journal, progress: Progress) -> list[TensorFile]:
    """All units, those that are done already left alone."""
    todo = units(plan)
    finished = []
    for i, unit in enumerate(todo):
        progress(i, len(todo), unit.path or unit.key)
        finished.append(journal.done(unit.key) or settle(plan, unit, journal))
    progress(len(todo), len(todo), "")
    return finished
