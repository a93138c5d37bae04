"""Walk: block by block with calibration data. Each block sees what the compressed blocks before it put out.

Memory: one block's weights and statistics, and the activations between two blocks (windows * length * hidden * 4
bytes), independent of the number of blocks. The activations lie in the journal too, so that a killed run goes on
at the block where it was.
Source: the sequential scheme of the GPTQ authors' code (Frantar et al. 2022, arXiv:2210.17323).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from wherry import tensorfile
from wherry.checkpoint import put
from wherry.engine import assign, share, stream, tune
from wherry.engine.smooth import smooth
from wherry.engine.unit import Unit, fact, original, round_to_nearest, solved, sound, store, units
from wherry.engine.watch import Watch, refers, watching, waves, waves_of
from wherry.errors import Diverged
from wherry.journal import Units
from wherry.ops.activation import round_inputs
from wherry.ops.latent import Latent
from wherry.recipe import Plan, PlanRow, Progress, static_activations
from wherry.scheme import QTensor
from wherry.tensorfile import TensorFile

Batch = dict[str, np.ndarray]


class _Reached(Exception):
    """Ends a forward pass at the first block."""


@dataclass
class Flow:
    """What goes from block to block: hidden states per batch, and the other arguments that every block gets.

    reference: the states of the original model beside those of the compressed one, when a method asks for them.
    """

    states: list[torch.Tensor]
    others: list[dict[str, Any]]
    spare: list[tuple[Any, ...]]
    reference: list[torch.Tensor] | None = None

    def call(
        self, block: torch.nn.Module, i: int, parameters: dict[str, torch.Tensor] | None = None,
        states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The block's output for batch i, with some of its parameters replaced; on its own states or on others."""
        args = ((self.states if states is None else states)[i], *self.spare[i])
        out = torch.func.functional_call(block, parameters or {}, args, self.others[i])
        return out[0] if isinstance(out, tuple) else out

    def through(self, block: torch.nn.Module, states: list[torch.Tensor] | None = None) -> Iterator[torch.Tensor]:
        """The block's outputs, batch by batch."""
        for i in range(len(self.states)):
            yield self.call(block, i, states=states)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All states by name, for the journal."""
        reference = self.reference or []
        return {str(i): x for i, x in enumerate(self.states)} | {f"reference-{i}": x for i, x in enumerate(reference)}

    def carry(self, file: TensorFile) -> None:
        """Take the states from the journal."""
        self.states = [file.read(str(i)) for i in range(len(self.states))]
        if self.reference is not None:
            self.reference = [file.read(f"reference-{i}") for i in range(len(self.states))]


def run(plan: Plan, journal: Units, batches: list[Batch], progress: Progress) -> list[TensorFile]:
    """All units in order; what the journal holds is not done again."""
    for row in plan.rows:  # a NaN is found before the first expensive minute
        if row.step >= 0:
            tensor = plan.checkpoint.tensor(row.name)
            sound(row.name, tensor.scale if isinstance(tensor, QTensor) else tensor)
    assign.run(plan, journal, batches, progress)
    share.run(plan, journal, batches, progress)
    outside, *blocks = units(plan)
    total = len(blocks) + 1
    progress(0, total, "outside of the blocks")
    finished = [journal.done(outside.key) or stream.settle(plan, outside, journal)]
    if all(journal.done(f"tuned-{unit.key}") for unit in (outside, *blocks)):
        return [TensorFile(journal.path(f"tuned-{unit.key}")) for unit in (outside, *blocks)]
    module = plan.checkpoint.skeleton()
    first = next((i for i, unit in enumerate(blocks) if not journal.done(unit.key)), len(blocks))
    flow = None
    for i, unit in enumerate(blocks):
        progress(i + 1, total, unit.path)
        done = journal.done(unit.key)
        if i >= first or done is None:
            if flow is None:
                flow = enter(plan, module, blocks[0], batches, outside, finished[0])
                if i > 0:
                    flow.carry(TensorFile(journal.path(f"carry-{blocks[i - 1].key}")))
            done = settle(plan, unit, journal, module, flow, blocks[i - 1].key if i else None)
        finished.append(done)
    if any(hasattr(step, "tune") for step in plan.recipe.steps):
        progress(total, total, "tuning against the original")
        finished = tune.run(plan, journal, [outside, *blocks], finished, batches)
    progress(total, total, "")
    return finished


@torch.no_grad()
def enter(
    plan: Plan, module: torch.nn.Module, first: Unit, batches: list[Batch], outside: Unit, settled: TensorFile
) -> Flow:
    """Run all that lies before the first block, as it was and as it is settled, and catch what that is called with."""
    checkpoint, path = plan.checkpoint, first.path
    prefix = path.rpartition(".")[0] + "."
    checkpoint.fill(module, lambda name: not name.startswith(prefix))
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta and not name.startswith(prefix):
            put(module, name, torch.zeros(parameter.shape))
    beside = any(hasattr(step, "fit") or refers(step) for step in plan.recipe.steps)
    tables = {row.name: row for row in outside.rows if row.scheme and row.role == "embedding"}
    caught = calls(plan, module, path, batches) if beside or not tables else []
    states = [x for x, _, _ in caught]
    for place, name in checkpoint.places(module).items():  # a tied one has two places
        if name in tables:
            put(module, place, floats(tune.take(plan, tables[name], settled)))
    if tables:
        caught = calls(plan, module, path, batches)
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            put(module, name, torch.empty(parameter.shape, device="meta"))
    own = [x for x, _, _ in caught]
    return Flow(own, [c[2] for c in caught], [c[1] for c in caught], states if beside else None)


def calls(
    plan: Plan, module: torch.nn.Module, path: str, batches: list[Batch]
) -> list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]:
    """What the block at that path is called with for each batch: its states, other positional ones, and by name."""
    caught: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def catch(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            x, rest = args[0], args[1:]
        else:
            x, rest, kwargs = kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        caught.append((x, rest, kwargs))
        raise _Reached

    handle = module.get_submodule(path).register_forward_pre_hook(catch, with_kwargs=True)
    options = {"use_cache": False} if plan.task.kind == "text-generation" else {}
    for batch in batches:
        try:
            module(**{name: torch.from_numpy(array) for name, array in batch.items()}, **options)
        except _Reached:
            pass
    handle.remove()
    return caught


@torch.no_grad()
def settle(
    plan: Plan, unit: Unit, journal: Units, module: torch.nn.Module, flow: Flow, before: str | None
) -> TensorFile:
    """Do one block: smooth, statistics, codes, learning; then its outputs with the codes in place, to the journal."""
    block, checkpoint = module.get_submodule(unit.path), plan.checkpoint
    places = {weight: parameter for parameter, weight in checkpoint.places(module).items()}
    weights = {row.name: original(checkpoint, row) for row in unit.rows}
    rows = {row.name: row for row in unit.rows}
    for name in rows.keys() & places.keys():
        w = weights[name]
        put(module, places[name], floats(w))
    inner = {name: places[name].removeprefix(f"{unit.path}.") for name in rows.keys() & places.keys()}
    taken = [row for row in unit.rows if row.step >= 0]
    layers = {row.name: block.get_submodule(inner[row.name].removesuffix(".weight")) for row in taken}
    notes: dict[str, list[str]] = {row.name: [] for row in unit.rows}
    moved = smooth(plan, rows, block, inner, layers, flow, notes)
    for name in moved:
        w = block.get_parameter(inner[name]).detach()
        weights[name] = w if rows[name].scheme else w.to(checkpoint.source.dtype(name)).float()
    results: dict[str, torch.Tensor | QTensor] = dict(weights)
    twin = copy.deepcopy(block) if flow.reference is not None else None
    watched = {row.name: plan.recipe.steps[row.step] for row in taken}
    rounding: list[RemovableHandle] = []
    for wave in waves(block, layers, watched, flow):
        chosen = {name: layers[name] for name in wave}
        device = plan.device if all(watched[name].gait == "codes" for name in wave) else "cpu"
        with watching(chosen, watched, rows, twin, inner, device) as watch:
            for i in range(len(flow.states)):
                watch.reference(flow, i)
                flow.call(block, i)
                watch.batch_ends()
            watch.counting = any(
                static_activations(rows[n].scheme) and watched[n].ranging(graph=False) != "minmax" for n in wave
            )
            for i in range(len(flow.states) if watch.counting else 0):  # histograms want the extremes first
                flow.call(block, i)
                watch.batch_ends()
        for name in wave:
            w = weights[name]
            assert not isinstance(w, QTensor)
            results[name] = q = solve(plan, rows[name], w, watch, notes[name])
            put(module, places[name], floats(q))
            if isinstance(q, QTensor):
                rounding += round_inputs(layers[name], q)  # all that comes later sees what a kernel would put out
    if flow.reference is not None:
        assert twin is not None
        flow.reference = [checked(out, unit) for out in flow.through(twin, flow.reference)]
    improve(plan, rows, block, inner, weights, results, flow, notes)
    flow.states = [checked(out, unit) for out in flow.through(block)]
    for handle in rounding:
        handle.remove()
    tensors, facts = {}, []
    for row in unit.rows:
        result, w = results[row.name], weights[row.name]
        if row.name in moved and isinstance(result, torch.Tensor):
            result = result.to(checkpoint.source.dtype(row.name))
        tensors.update(store(row, result))
        found = fact(row, w.decode() if isinstance(w, QTensor) else w, result, notes[row.name])
        after = any(plan.steps(gait, row.name) for gait in ("fit", "tune", "correct"))
        learned = row.scheme and (refers(watched[row.name]) or after)
        facts.append(found | ({"moved": moved[row.name]} if row.name in moved else {}))
        facts[-1] |= {"learned": True} if learned else {}
        if row.name in places:
            put(module, places[row.name], torch.empty(row.shape, device="meta"))
    carry = journal.path(f"carry-{unit.key}")
    tensorfile.write(carry, flow.tensors())
    done = journal.save(unit.key, tensors, {"rows": facts})
    if before is not None:
        journal.path(f"carry-{before}").unlink(missing_ok=True)
    return done


def improve(
    plan: Plan, rows: dict[str, PlanRow], block: torch.nn.Module, inner: dict[str, str],
    weights: dict[str, Any], results: dict[str, Any], flow: Flow, notes: dict[str, list[str]],
) -> None:  # fmt: skip
    """Every `fit` and `correct` pass on the codes of the block's weights that it wants, in the recipe's order."""
    for step in plan.recipe.steps:
        names = [n for n, row in rows.items() if row.scheme and row.role == "linear" and step.wants(n)]
        if names and hasattr(step, "fit"):
            fit(step, plan, {n: rows[n] for n in names}, block, inner, weights, results, flow, notes)
        elif names and hasattr(step, "correct"):
            layers = {n: block.get_submodule(inner[n].removesuffix(".weight")) for n in names}
            for wave in waves_of(block, layers, flow):  # one input after the other: the next sees what is corrected
                with watching({n: layers[n] for n in wave}, dict.fromkeys(wave, step), rows) as watch:
                    for i in range(len(flow.states)):
                        flow.call(block, i)
                        watch.batch_ends()
                for n in wave:
                    results[n] = step.correct(weights[n], results[n], watch.stats.get(n), notes[n])
                    put(block, inner[n], results[n].decode())


def fit(
    step: Any, plan: Plan, rows: dict[str, PlanRow], block: torch.nn.Module, inner: dict[str, str],
    weights: dict[str, Any], results: dict[str, Any], flow: Flow, notes: dict[str, list[str]],
) -> None:  # fmt: skip
    """Let one `fit` pass improve the codes of these rows, all together."""
    latents = {inner[n]: Latent(results[n], weights[n], plan.rounding(row)) for n, row in rows.items()}

    def call(parameters: dict[str, torch.Tensor], i: int) -> torch.Tensor:
        return flow.call(block, i, parameters)

    with torch.enable_grad():
        step.fit(call, latents, flow.reference, notes[next(iter(rows))])
    for name in rows:
        settled = latents[inner[name]].settle()
        own = results[name]
        results[name] = replace(settled, activation_scale=own.activation_scale, activation_zero=own.activation_zero)
        put(block, inner[name], results[name].decode())


def checked(x: torch.Tensor, unit: Unit) -> torch.Tensor:
    """The block's output. Raises Diverged when it is not finite."""
    if not torch.isfinite(x).all():
        raise Diverged(f"{unit.path} puts out NaN or inf on the calibration data: check the model in float32 first")
    return x


def floats(w: torch.Tensor | QTensor) -> torch.Tensor:
    """A weight in float32, decoded where it is stored as codes."""
    return w.decode() if isinstance(w, QTensor) else w.float()


def solve(plan: Plan, row: PlanRow, w: torch.Tensor, watch: Watch, notes: list[str]) -> torch.Tensor | QTensor:
    """Codes of one weight, with the range of its input where the scheme wants it; or the weight with its zeros."""
    if plan.recipe.steps[row.step].gait == "zeros":
        stat = watch.stats.get(row.name)
        if stat is None and hasattr(plan.recipe.steps[row.step], "observe"):
            notes.append("no calibration input reached it: pruned by magnitude")
        return stream.zeroed(plan, row, w, stat, notes)
    assert row.scheme
    step = replace(plan.recipe.steps[row.step], scheme=row.scheme)
    if not hasattr(step, "observe"):
        q = solved(step, w, plan.device)
    elif row.name in watch.stats:
        q = solved(step, w, plan.device, watch.stats[row.name], notes)
    else:
        notes.append("no calibration input reached it: rounded to nearest")
        q = round_to_nearest(plan, row, w)
    found = watch.range(row.name, step.ranging(graph=False))
    if static_activations(row.scheme) and found is not None:
        low, high = found
        scale = max((high - low) / 255.0, 1e-8)
        zero = round(-128 - low / scale)
        q = replace(q, activation_scale=torch.tensor([scale]), activation_zero=torch.tensor([zero], dtype=torch.int8))
    return q
