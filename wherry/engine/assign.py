"""Assign: measure what every scheme costs every weight on the whole model, and write the choice into the plan."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from wherry.budget import budgets, chosen_for
from wherry.engine.tune import distance
from wherry.journal import Units
from wherry.recipe import Plan, PlanRow, Progress
from wherry.scheme import Scheme

Batch = dict[str, np.ndarray]


def run(plan: Plan, journal: Units, batches: list[Batch], progress: Progress) -> None:
    """Let every `assign` pass choose the schemes of the linear weights that it wants; the plan's rows change."""
    for number, step in enumerate(plan.recipe.steps):
        if not hasattr(step, "assign"):
            continue
        rows, limits = chosen_for(plan, step), budgets(plan, step)
        options = [step.choices(row.scheme) for row in rows]  # type: ignore[attr-defined]
        file = journal.folder / f"assigned-{number}.json"
        if not file.exists():
            progress(0, 1, "sensitivity of every weight")
            costs = sensitivities(plan, step, rows, options, batches)
            chosen = step.assign(costs, limits)
            fresh = file.with_suffix(".tmp")
            fresh.write_text(json.dumps([[int(c), float(costs[i, c])] for i, c in enumerate(chosen)]))
            fresh.replace(file)
        picked = json.loads(file.read_text())
        for row, own, (c, cost) in zip(rows, options, picked, strict=True):
            note = f"{own[c]} chosen by step {number + 1} ({step.method}); it costs {cost:.3g}"
            new = replace(row, scheme=own[c], after=own[c].bytes(row.shape), notes=(*row.notes, note))
            plan.rows[plan.rows.index(row)] = new
        for limit in limits:
            taken = sum(sizes[c] for sizes, (c, _) in zip(limit.sizes, picked, strict=True))
            told = f"of {limit.most:,.0f} B for the {len(rows)} weights that step {number + 1} chose for"
            plan.note(rows[0].name, f"{limit.format}: {taken:,.0f} B {told}")


def sensitivities(
    plan: Plan, step: Any, rows: list[PlanRow], options: list[list[Scheme]], batches: list[Batch]
) -> np.ndarray:
    """Cost [weights, schemes] in nats per token (relative error for a model without logits)."""
    checkpoint = plan.checkpoint
    module = checkpoint.module()
    places = {name: place for place, name in reversed(checkpoint.places(module).items())}
    weights = {row.name: module.get_parameter(places[row.name]) for row in rows}
    rounded = [[step.rounded(weights[r.name].detach(), s) for s in o] for r, o in zip(rows, options, strict=True)]
    if step.sensitivity == "kl" or plan.task.kind != "text-generation":
        loss = distance(plan, module, checkpoint.module(), batches[:1], {}, {})
        costs = []
        with torch.no_grad():
            for row, found in zip(rows, rounded, strict=True):
                kept, measured = weights[row.name].data, []
                for q in found:
                    weights[row.name].data = q
                    measured.append(float(loss(0)))
                weights[row.name].data = kept
                costs.append(measured)
        return np.array(costs)
    fisher = information(module, list(weights.values()), batches)
    return np.array([
        [0.5 * float((f * (q - weights[row.name]).square()).sum()) for q in found]
        for row, f, found in zip(rows, fisher, rounded, strict=True)
    ])  # fmt: skip


def information(module: torch.nn.Module, weights: list[torch.Tensor], batches: list[Batch]) -> list[torch.Tensor]:
    """Diagonal of the Fisher information per token for each weight, with labels drawn from the model itself, seeded."""
    g = torch.Generator().manual_seed(0)
    total, tokens = [torch.zeros_like(w) for w in weights], 0
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        for batch in batches:
            for i in range(len(next(iter(batch.values())))):  # a window at a time: squares of its own gradient
                inputs = {name: torch.from_numpy(array[i : i + 1]) for name, array in batch.items()}
                logits = module(**inputs, use_cache=False).logits[0]
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=g).flatten()
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                for sum_, grad in zip(total, torch.autograd.grad(loss, weights), strict=True):
                    sum_ += grad.square()
                tokens += len(labels)
    for weight in weights:
        weight.requires_grad_(False)
    return [t / tokens for t in total]
