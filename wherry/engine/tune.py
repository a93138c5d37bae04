"""Tune: the whole compressed model beside the original, after the last block; all units are written again.

Memory: both models in float32, gradients, Adam's moments and the latent codes: about 40 bytes per parameter.
A kill here costs the tuning, not the blocks: they lie in the journal.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from wherry.engine.unit import Unit, fact, original, store
from wherry.formats import compressed_tensors
from wherry.journal import Units
from wherry.ops.activation import round_inputs
from wherry.ops.latent import Latent, relative_error
from wherry.recipe import Plan, PlanRow
from wherry.scheme import QTensor
from wherry.tensorfile import TensorFile

Batch = dict[str, np.ndarray]


def run(
    plan: Plan, journal: Units, units: list[Unit], finished: list[TensorFile], batches: list[Batch]
) -> list[TensorFile]:
    """Do every `tune` pass on what the walk has finished. Returns the new units."""
    checkpoint, rows = plan.checkpoint, {row.name: row for row in plan.rows}
    pairs = [(row, done) for unit, done in zip(units, finished, strict=True) for row in unit.rows]
    held = {row.name: take(plan, row, done) for row, done in pairs}
    facts = {f["name"]: f for done in finished for f in journal.facts(done)["rows"]}
    module = checkpoint.module()
    teacher = checkpoint.module()
    places = checkpoint.places(module)
    names = {place: name for name, place in {n: p for p, n in reversed(places.items())}.items()}  # tied ones once
    for place, name in names.items():
        if isinstance(held[name], QTensor):
            round_inputs(module.get_submodule(place.rpartition(".")[0]), held[name])
    notes: list[str] = []
    for step in plan.recipe.steps:
        if not hasattr(step, "tune"):
            continue
        latents: dict[str, Latent] = {}
        free: dict[str, torch.Tensor] = {}
        fixed: dict[str, torch.Tensor] = {}
        for place, name in names.items():
            value, row = held[name], rows[name]
            moved = "moved" in facts[name]
            if isinstance(value, QTensor) and row.role == "linear" and step.wants(name):
                start = value.decode() if moved else checkpoint.weight(name)
                latents[place] = Latent(value, start, plan.rounding(row))
            elif row.role == "norm" and step.wants(name):
                free[place] = value.detach().float().clone().requires_grad_()
            else:
                fixed[place] = value.decode() if isinstance(value, QTensor) else value.float()
        loss = distance(plan, module, teacher, batches, latents, fixed | free)
        with torch.enable_grad():
            step.tune(loss, latents, list(free.values()), len(batches), notes)
        for place, latent in latents.items():
            old = held[names[place]]
            held[names[place]] = replace(
                latent.settle(), activation_scale=old.activation_scale, activation_zero=old.activation_zero
            )
        for place, tensor in free.items():
            held[names[place]] = tensor.detach().to(held[names[place]].dtype)
    return [write(plan, journal, unit, held, facts, notes if unit.path else []) for unit in units]


def take(plan: Plan, row: PlanRow, done: TensorFile) -> Any:
    """One weight as the walk left it."""
    scheme = row.scheme or plan.checkpoint.scheme(row.name)
    if scheme is None:
        return done.read(row.name)
    if row.role != "linear":
        return compressed_tensors.restore_table(row.name, scheme, done.read)
    return compressed_tensors.restore(row.name, scheme, done.entries, done.read)


def distance(
    plan: Plan, module: torch.nn.Module, teacher: torch.nn.Module, batches: list[Batch],
    latents: dict[str, Latent], others: dict[str, torch.Tensor],
) -> Any:  # fmt: skip
    """The loss of one batch: KL of the next token in nats, or the relative error of the last hidden state."""
    inputs = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]
    causal = plan.task.kind == "text-generation"
    options = {"use_cache": False} if causal else {}
    known: dict[int, torch.Tensor] = {}
    head: Any = teacher.get_output_embeddings() if causal else None  # type: ignore[operator]

    @torch.no_grad()
    def target(i: int) -> torch.Tensor:
        """What the original puts out; its last hidden states are kept where the head alone makes the logits of them."""
        if i in known:
            return known[i] if head is None else head(known[i])
        seen: list[torch.Tensor] = []
        handle = None if head is None else head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        out = teacher(**inputs[i], **options)
        if handle is not None:
            handle.remove()
        found = out.logits if causal else out.last_hidden_state
        if head is None:
            known[i] = found
        elif len(seen) == 1 and torch.equal(head(seen[0]), found):  # not so where logits are capped or scaled
            known[i] = seen[0]
        return found

    def loss(i: int) -> torch.Tensor:
        weights = others | {place: latent.weight() for place, latent in latents.items()}
        out = torch.func.functional_call(module, weights, (), {**inputs[i], **options})
        if not causal:
            return relative_error(out.last_hidden_state, target(i))
        p, q = target(i).flatten(0, 1).log_softmax(-1), out.logits.flatten(0, 1).log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)

    return loss


def write(
    plan: Plan, journal: Units, unit: Unit, held: dict[str, Any], facts: dict[str, Any], notes: list[str]
) -> TensorFile:
    """One unit again, with what tuning made of it."""
    tensors, found = {}, []
    for row in unit.rows:
        old = facts[row.name]
        w = original(plan.checkpoint, row)
        tensors.update(store(row, held[row.name]))
        new = fact(row, w.decode() if isinstance(w, QTensor) else w, held[row.name], [])
        touched = new["digest"] != old["digest"]
        moved = {"moved": "tune"} if touched and not row.scheme and "moved" not in old else {}
        error = old["error"] if "moved" in old and row.scheme else new["error"]
        found.append(old | {"digest": new["digest"], "error": error} | moved
                     | ({"notes": [*old["notes"], *notes]} if touched else {}))  # fmt: skip
    return journal.save(f"tuned-{unit.key}", tensors, {"rows": found})
