"""Walk: block by block with calibration data. Each block sees what the compressed blocks before it put out.

Memory: one block's weights and statistics, and the activations between two blocks (windows * length * hidden * 4
bytes), independent of the number of blocks. The activations lie in the journal too, so that a killed run goes on
at the block where it was.
Source: the sequential scheme of the GPTQ authors' code (Frantar et al. 2022, arXiv:2210.17323).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from wherry import tensorfile
from wherry.checkpoint import put
from wherry.engine import stream
from wherry.engine.unit import Unit, fact, original, round_to_nearest, sound, store, units
from wherry.errors import Diverged
from wherry.journal import Journal
from wherry.recipe import Pass, Plan, PlanRow, Progress, static_activations
from wherry.scheme import QTensor
from wherry.tensorfile import TensorFile

Batch = dict[str, np.ndarray]


class _Reached(Exception):
    """Ends a forward pass at the first block."""


@dataclass
class Flow:
    """What goes from block to block: hidden states per batch, and the other arguments that every block gets."""

    states: list[torch.Tensor]
    others: list[dict[str, Any]]
    spare: list[tuple[Any, ...]]

    def through(self, block: torch.nn.Module) -> Iterator[torch.Tensor]:
        """The block's outputs, batch by batch."""
        for x, args, kwargs in zip(self.states, self.spare, self.others, strict=True):
            out = block(x, *args, **kwargs)
            yield out[0] if isinstance(out, tuple) else out


def run(plan: Plan, journal: Journal, batches: list[Batch], progress: Progress) -> list[TensorFile]:
    """All units in order; what the journal holds is not done again."""
    for row in plan.rows:  # a NaN is found before the first expensive minute
        if row.scheme:
            tensor = plan.checkpoint.tensor(row.name)
            sound(row.name, tensor.scale if isinstance(tensor, QTensor) else tensor)
    outside, *blocks = units(plan)
    total = len(blocks) + 1
    progress(0, total, "outside of the blocks")
    finished = [journal.done(outside.key) or stream.settle(plan, outside, journal)]
    module = plan.checkpoint.skeleton()
    first = next((i for i, unit in enumerate(blocks) if not journal.done(unit.key)), len(blocks))
    flow = None
    for i, unit in enumerate(blocks):
        progress(i + 1, total, unit.path)
        done = journal.done(unit.key)
        if i >= first or done is None:
            if flow is None:
                flow = enter(plan, module, blocks[0], batches)
                if i > 0:
                    carried = tensorfile.TensorFile(journal.path(f"carry-{blocks[i - 1].key}"))
                    flow.states = [carried.read(str(b)) for b in range(len(flow.states))]
            done = settle(plan, unit, journal, module, flow, blocks[i - 1].key if i else None)
        finished.append(done)
    progress(total, total, "")
    return finished


@torch.no_grad()
def enter(plan: Plan, module: torch.nn.Module, first: Unit, batches: list[Batch]) -> Flow:
    """Run all that lies before the first block, and catch what it is called with."""
    checkpoint, path = plan.checkpoint, first.path
    prefix = path.rpartition(".")[0] + "."
    checkpoint.fill(module, lambda name: not name.startswith(prefix))
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta and not name.startswith(prefix):
            put(module, name, torch.zeros(parameter.shape))
    caught: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def catch(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            x, rest = args[0], args[1:]
        else:
            x, rest, kwargs = kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        caught.append((x, rest, kwargs))
        raise _Reached

    handle = module.get_submodule(path).register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
        options = {"use_cache": False} if plan.task.kind == "text-generation" else {}
        try:
            module(**inputs, **options)
        except _Reached:
            pass
    handle.remove()
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            put(module, name, torch.empty(parameter.shape, device="meta"))
    return Flow([c[0] for c in caught], [c[2] for c in caught], [c[1] for c in caught])


@torch.no_grad()
def settle(
    plan: Plan, unit: Unit, journal: Journal, module: torch.nn.Module, flow: Flow, before: str | None
) -> TensorFile:
    """Do one block: statistics, codes, then its outputs with the codes in place; write both to the journal."""
    block, checkpoint = module.get_submodule(unit.path), plan.checkpoint
    places = {weight: parameter for parameter, weight in checkpoint.places(module).items()}
    weights = {row.name: original(checkpoint, row) for row in unit.rows}
    for row in unit.rows:
        if row.name in places:
            w = weights[row.name]
            put(module, places[row.name], w.decode() if isinstance(w, QTensor) else w.float())
    layers = {
        row.name: module.get_submodule(places[row.name].removesuffix(".weight")) for row in unit.rows if row.scheme
    }
    watched = {row.name: plan.recipe.steps[row.step] for row in unit.rows if row.scheme}
    results: dict[str, torch.Tensor | QTensor] = dict(weights)
    notes: dict[str, list[str]] = {row.name: [] for row in unit.rows}
    rows = {row.name: row for row in unit.rows}
    with watching(layers, watched, rows) as watch:
        for _ in flow.through(block):
            watch.batch_ends()
    for row in unit.rows:
        if row.scheme:
            w = weights[row.name]
            assert not isinstance(w, QTensor)
            results[row.name] = q = solve(plan, row, w, watch, notes[row.name])
            put(module, places[row.name], q.decode())
    flow.states = [checked(out, unit) for out in flow.through(block)]
    tensors, facts = {}, []
    for row in unit.rows:
        tensors.update(store(row, results[row.name]))
        w = weights[row.name]
        facts.append(fact(row, w.decode() if isinstance(w, QTensor) else w, results[row.name], notes[row.name]))
        if row.name in places:
            put(module, places[row.name], torch.empty(row.shape, device="meta"))
    carry = journal.path(f"carry-{unit.key}")
    tensorfile.write(carry, {str(i): x for i, x in enumerate(flow.states)})
    done = journal.save(unit.key, tensors, {"rows": facts})
    if before is not None:
        journal.path(f"carry-{before}").unlink(missing_ok=True)
    return done


def checked(x: torch.Tensor, unit: Unit) -> torch.Tensor:
    """The block's output. Raises Diverged when it is not finite."""
    if not torch.isfinite(x).all():
        raise Diverged(f"{unit.path} puts out NaN or inf on the calibration data: check the model in float32 first")
    return x


def solve(plan: Plan, row: PlanRow, w: torch.Tensor, watch: "Watch", notes: list[str]) -> QTensor:
    """Codes of one weight, with the range of its input where the scheme wants it."""
    step = plan.recipe.steps[row.step]
    if not hasattr(step, "observe"):
        q = replace(step, scheme=row.scheme).solve(w)  # type: ignore[arg-type]
    elif row.name in watch.stats:
        q = step.solve(w, watch.stats[row.name], notes)
    else:
        notes.append("no calibration input reached it: rounded to nearest")
        q = round_to_nearest(plan, row, w)
    if static_activations(row.scheme) and row.name in watch.ranges:
        low, high = watch.ranges[row.name]
        scale = max((high - low) / 255.0, 1e-8)
        zero = round(-128 - low / scale)
        q = replace(q, activation_scale=torch.tensor([scale]), activation_zero=torch.tensor([zero], dtype=torch.int8))
    return q


class Watch:
    """Statistics of the inputs of the watched layers; layers that are given the same tensor share one."""

    def __init__(self) -> None:
        self.stats: dict[str, Any] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.leader: dict[str, str] = {}
        self.alive: list[tuple[torch.Tensor, Pass, str]] = []

    def batch_ends(self) -> None:
        """Forget the tensors of this batch; statistics of a leader count for those that follow it."""
        self.alive.clear()
        for name, leader in self.leader.items():
            if leader in self.stats:
                self.stats[name] = self.stats[leader]
            if leader in self.ranges:
                self.ranges[name] = self.ranges[leader]

    def see(self, name: str, step: Pass, row: PlanRow, x: torch.Tensor) -> None:
        """Fold one input x [..., k] into the statistic of the layer, or follow one that saw the same tensor."""
        leader = self.leader.get(name)
        if leader is None:
            leader = next((own for seen, other, own in self.alive if seen is x and other == step), name)
            self.leader[name] = leader
        self.alive.append((x, step, leader))
        if leader != name:
            return
        flat = x.reshape(-1, x.shape[-1])
        if hasattr(step, "observe"):
            self.stats[name] = step.observe(self.stats.get(name), flat)
        if static_activations(row.scheme):
            low, high = self.ranges.get(name, (0.0, 0.0))
            self.ranges[name] = (min(low, float(flat.min())), max(high, float(flat.max())))


@contextmanager
def watching(layers: dict[str, torch.nn.Module], steps: dict[str, Pass], rows: dict[str, PlanRow]) -> Iterator[Watch]:
    """Hook the layers while the block runs over the calibration data."""
    watch = Watch()

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args: watch.see(name, steps[name], rows[name], args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items() if steps[name].calibrated]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
