"""Share: before a stage that prunes, how much of each weight it takes, written into the plan's rows."""

import json
from dataclasses import replace
from typing import Any

from wherry.journal import Units
from wherry.recipe import Plan, Progress


def run(plan: Plan, journal: Units | None, batches: list[dict[str, Any]], progress: Progress) -> None:
    """Let every `share` step of the stage say the sparsity of the weights that are taken; the plan's rows change.

    journal: where the answer is kept for a run that is killed; None: it is found again.
    """
    for number, step in enumerate(plan.recipe.steps):
        if not hasattr(step, "share"):
            continue
        file = journal.folder / f"shares-{number}.json" if journal is not None else None
        if file is not None and file.exists():
            found = json.loads(file.read_text())
        else:
            found = step.share(plan, batches, progress)
            if file is not None:
                fresh = file.with_suffix(".tmp")
                fresh.write_text(json.dumps(found))
                fresh.replace(file)
        for i, row in enumerate(plan.rows):
            if row.name in found:
                note = f"{100 * found[row.name]:.4g}% of it, by step {plan.first + number + 1} ({step.method})"
                plan.rows[i] = replace(row, sparsity=found[row.name], notes=(*row.notes, note))
