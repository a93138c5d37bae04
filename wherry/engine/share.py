"""Share: before a stage that prunes, how much of each weight it takes, written into the plan's rows."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from wherry.engine.assign import information
from wherry.engine.tune import distance
from wherry.journal import Units
from wherry.recipe import Plan, Progress


def run(plan: Plan, journal: Units | None, batches: list[dict[str, Any]], progress: Progress) -> None:
    """Let every `share` and `allot` step of the stage say the sparsity of the weights that are taken.

    journal: where the answer is kept for a run that is killed; None: it is found again. The plan's rows change.
    """
    for number, step in enumerate(plan.recipe.steps):
        if not hasattr(step, "share") and not hasattr(step, "allot"):
            continue
        file = journal.folder / f"shares-{number}.json" if journal is not None else None
        if file is not None and file.exists():
            found = json.loads(file.read_text())
        else:
            shared = hasattr(step, "share")
            said: Any = step
            found = said.share(plan, batches, progress) if shared else allot(plan, step, batches, progress)
            if file is not None:
                fresh = file.with_suffix(".tmp")
                fresh.write_text(json.dumps(found))
                fresh.replace(file)
        for i, row in enumerate(plan.rows):
            if row.name in found:
                note = f"{100 * found[row.name]:.4g}% of it, by step {plan.first + number + 1} ({step.method})"
                plan.rows[i] = replace(row, sparsity=found[row.name], notes=(*row.notes, note))


def allot(plan: Plan, step: Any, batches: list[dict[str, Any]], progress: Progress) -> dict[str, float]:
    """The share of each weight by what each of the step's choices costs: in nats per token, or relative error."""
    progress(0, 1, "sensitivity of every weight")
    rows = [row for row in plan.rows if row.step >= 0]
    sparsity = float(plan.recipe.steps[-1].sparsity)  # type: ignore[attr-defined]
    choices = step.choices(sparsity)
    checkpoint = plan.checkpoint
    module = checkpoint.module()
    places = {name: place for place, name in reversed(checkpoint.places(module).items())}
    weights = [module.get_parameter(places[row.name]) for row in rows]
    if step.sensitivity == "kl" or plan.task.kind != "text-generation":
        loss = distance(plan, module, checkpoint.module(), batches[:1], {}, {})
        costs = []
        with torch.no_grad():
            for i, weight in enumerate(weights):
                progress(i, len(weights), rows[i].name)
                kept, measured = weight.data, []
                for share in choices:
                    weight.data = step.rounded(kept, share)
                    measured.append(float(loss(0)))
                weight.data = kept
                costs.append(measured)
    else:
        fisher = information(module, [*weights], batches)
        costs = [
            [0.5 * float((f * (w.detach() - step.rounded(w.detach(), share)).square()).sum()) for share in choices]
            for w, f in zip(weights, fisher, strict=True)
        ]
    size = np.array([weight.numel() for weight in weights], dtype=float)
    chosen = step.allot(np.array(costs), size, sparsity)
    return {row.name: choices[i] for row, i in zip(rows, chosen, strict=True)}
