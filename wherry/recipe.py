"""Recipe: what to do, as text. Plan: what will happen to every single tensor, before any work.

    "gptq:scheme=W4A16_ASYM,group_size=64"            one pass
    "rtn:scheme=W8A16,targets=re:.*down_proj | gptq"  several, joined by |; a tensor belongs to the first that takes it
    "width:... | sparsegpt | heal:steps=200 | gptq"   stages: each step that prunes or remakes ends as a model
    recipe.yaml                                       the same as a list of {method: {knob: value}}

A Pass is a frozen dataclass that owns its knobs and its mathematics. By the methods that it defines, the engine
knows its gait: only `solve` streams; `observe` + `solve` walks block by block with calibration data; `smooth` comes
before a solver in the same block, `fit` after it; `tune` comes last, with the whole model. `prune` zeroes weights and
`remake` writes another model: such a step is a stage, and the steps after it are given the model that it left.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from wherry import shelf
from wherry.budget import budgets
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Corrupt, Unsupported
from wherry.gait import Pass as Pass
from wherry.gait import Pruner
from wherry.gait import matches as matches
from wherry.knobs import split
from wherry.roles import QUANTIZABLE, QUANTIZED
from wherry.roles import roles as roles
from wherry.rows import PlanRow as PlanRow
from wherry.rows import holds_zero, remade, row_of
from wherry.scheme import Scheme, Tensor
from wherry.shelf import suggest
from wherry.steps import build as build
from wherry.steps import shares

TILED = ("compressed_tensors", "compact")  # formats that hold one scale for several rows


@dataclass(frozen=True)
class Recipe:
    """Passes in order."""

    steps: tuple[Pass, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps))

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Read a recipe string or the path of a YAML file.

        Raises BadInput or Unsupported, naming what is wrong and the nearest that is right.
        """
        if text.endswith((".yaml", ".yml")):
            return cls.from_yaml(Path(text))
        steps: list[Pass] = []
        for method, knobs in split(text, "METHOD"):
            steps.append(build(method, knobs))
        return cls(tuple(steps))

    @classmethod
    def from_yaml(cls, path: Path) -> "Recipe":
        """Read `[{method: {knob: value}}, ...]`, alone or under the key `recipe`."""
        if not path.is_file():
            raise BadInput(f"no such recipe file: {path}")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
        steps = data.get("recipe") if isinstance(data, dict) else data
        if not isinstance(steps, list) or not steps:
            raise BadInput(f"{path} holds no recipe: a list of METHOD: {{knob: value}} is wanted")
        made: list[Pass] = []
        for step in steps:
            method, knobs = next(iter(step.items())) if isinstance(step, dict) and len(step) == 1 else (step, {})
            if not isinstance(method, str) or not isinstance(knobs or {}, dict):
                raise BadInput(f"{path}: '{step}' is not METHOD: {{knob: value}}")
            made.append(build(method, knobs or {}))
        return cls(tuple(made))

    def to_yaml(self) -> str:
        """The recipe as YAML; `from_yaml` reads it back to an equal recipe."""
        steps = []
        for step in self.steps:
            knobs: dict[str, Any] = {}
            for name in step.knobs():
                value = getattr(step, name)
                knobs[name] = list(value) if isinstance(value, tuple) else value
            scheme, *options = str(knobs.pop("scheme", "")).split(",")
            if step.solves:
                parts = [option.split("=") for option in options]
                knobs = {"scheme": scheme} | knobs | {k: int(v) if k == "group_size" else v for k, v in parts}
            steps.append({step.method: knobs})
        return yaml.safe_dump({"recipe": steps}, sort_keys=False)

    @property
    def calibrated(self) -> bool:
        """Whether any step needs calibration data."""
        return any(step.calibrated for step in self.steps)

    @property
    def stages(self) -> "list[Recipe]":
        """The steps in groups, each of which ends as a model: all that give codes, or one that prunes or remakes.

        Raises BadInput where codes would have to be pruned or remade.
        """
        groups: list[list[Pass]] = []
        for step in self.steps:
            before = groups[-1][-1] if groups else None
            if before is not None and before.gait == "codes" != step.gait:
                raise BadInput(
                    f"{step.method} stands after {before.method}, and works on float weights: write it before"
                )
            if before is not None and (shares(before, step) or before.gait == step.gait == "codes"):
                groups[-1].append(step)
            else:
                groups.append([step])
        if self.steps:
            shares(self.steps[-1], None)
        return [Recipe(tuple(group)) for group in groups]

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """What a stage will leave of a checkpoint, as far as it is known before: names, shapes and configuration."""
        for step in self.steps:
            checkpoint = step.expect(checkpoint) if hasattr(step, "expect") else checkpoint
        return checkpoint

    def spelled(self, graph: bool) -> "Recipe":
        """The recipe with every name for other steps replaced by them, as they are for an ONNX graph or a folder."""
        steps: list[Pass] = []
        for step in self.steps:
            steps += Recipe.parse(step.recipe(graph)).steps if hasattr(step, "recipe") else [step]
        return Recipe(tuple(steps))

    def plan(self, checkpoint: Checkpoint, formats: tuple[str, ...] = ()) -> "Plan":
        """Decide for every tensor, check it against every format, and raise what can be known to fail."""
        if any(hasattr(step, "recipe") for step in self.steps):
            return self.spelled(checkpoint.graph is not None).plan(checkpoint, formats)
        stages, current = self.stages, checkpoint
        plans: list[Plan] = []
        for stage in stages:
            dense = [s.method for s in stage.steps if s.dense and checkpoint.graph is None]
            if dense and any(plan.recipe.steps[-1].gait == "zeros" for plan in plans):
                raise BadInput(f"{dense[0]} changes all weights, which fills the zeros made before: leave it out")
            first = sum(len(plan.recipe.steps) for plan in plans)
            plans.append(stage.settle(current, formats if stage is stages[-1] else (), first))
            current = stage.expect(current)
        last = stages[0].steps[-1]
        if isinstance(last, Pruner):  # the only stage whose weights are there already
            last.foresee(plans[0])
        alone = len(plans) == 1 and not hasattr(stages[0].steps[-1], "remake")  # the work starts from what is there
        return plans[0] if alone else Plan.joined(checkpoint, self, plans)

    def settle(self, checkpoint: Checkpoint, formats: tuple[str, ...] = (), first: int = 0) -> "Plan":
        """The plan of one stage. first: how many steps of the whole recipe stand before it."""
        if checkpoint.graph is not None:
            self._fits_graphs()
        if hasattr(self.steps[-1], "remake"):
            made = self.expect(checkpoint)
            plan = Plan(made, self, remade(self.steps, checkpoint, made, first), formats, first)
        else:
            if checkpoint.graph is None and checkpoint.apart:
                self._whole(checkpoint)
            checkpoint = self._rewritten(checkpoint)
            rows = [row_of(self.steps, checkpoint, *item, first) for item in roles(checkpoint)]
            plan = Plan(checkpoint, self, rows, formats, first)
            self._changes(plan)
        always = ("onnx",) if checkpoint.graph is not None else ()  # what a graph is written as
        for name in dict.fromkeys((*always, *formats)):
            for trial in plan.trials():
                trial.legal(name)
            for tensor, note in plan.legal(name).items():
                plan.note(tensor, f"{name}: {note}")
        for step in self.steps:
            if hasattr(step, "assign"):
                budgets(plan, step)  # one that cannot be kept is told now
        if checkpoint.graph is None:
            for tensor, note in shelf.find("formats", "compressed_tensors").stock(plan).items():
                plan.note(tensor, note)
        return plan

    def _whole(self, checkpoint: Checkpoint) -> None:
        """Raise Unsupported for experts that are stored one by one and computed in one tensor."""
        try:
            checkpoint.places(checkpoint.skeleton())
        except Corrupt as error:
            raise Unsupported(
                f"{checkpoint.name} has fused experts, which {self.steps[-1].method} does not take: it is for Linear "
                "layers.\nexperts, width and depth make it smaller."
            ) from error

    def _rewritten(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as the steps that rewrite leave it. What fails without such a step too is told first."""
        for step in self.steps:
            try:
                checkpoint = step.rewrite(checkpoint) if hasattr(step, "rewrite") else checkpoint
            except Unsupported:
                if rest := tuple(other for other in self.steps if other is not step):
                    Recipe(rest).settle(checkpoint)
                raise
        return checkpoint

    def _changes(self, plan: "Plan") -> None:
        """Raise BadInput for a pattern that means no layer, a quantized graph, or a stage that takes nothing."""
        checkpoint = plan.checkpoint
        for step in self.steps:
            for pattern in (*step.targets, *step.ignore):
                layers = [row.name.removesuffix(".weight") for row in plan.rows if row.role in QUANTIZABLE]
                if not any(matches(pattern, layer) for layer in layers):
                    raise BadInput(f"'{pattern}' matches no layer of {checkpoint.name}{suggest(pattern, layers)}")
        if checkpoint.graph is not None and checkpoint.graph.quantized:
            raise BadInput(f"{checkpoint.path} is quantized already; compress the float model that it was made from")
        plan.trials()  # a group that fits no width is found here
        if not any(row.step >= 0 for row in plan.rows):
            raise BadInput(f"the recipe '{self}' changes nothing in {checkpoint.name}")

    def _fits_graphs(self) -> None:
        """Raise Unsupported for a step that walks a transformer's blocks: an ONNX graph has none."""
        for step in self.steps:
            walks = ("smooth", "correct", "fit", "tune", "assign", "allot")
            gait = next((name for name in walks if hasattr(step, name)), "")
            told = len(inspect.signature(step.observe).parameters) if hasattr(step, "observe") else 0
            if gait or told > 2:
                raise Unsupported(
                    f"{step.method} walks a transformer block by block, and an ONNX graph has no blocks.\n"
                    "On graphs there are rtn, gptq, hqq, and equalize before them."
                )

@dataclass
class Plan:
    """Every tensor of a checkpoint, with what will happen to it. Made and checked before any work.

    first: how many steps of the whole recipe stand before those of this plan. parts: the plans of the stages, when
    there are several; then `rows` show what all of them do, and the engine follows the parts. device: where solvers
    compute; everything else is done by the CPU.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    rows: list[PlanRow]
    formats: tuple[str, ...] = field(default=())
    first: int = 0
    parts: "tuple[Plan, ...]" = ()
    device: str = "cpu"

    @classmethod
    def joined(cls, checkpoint: Checkpoint, recipe: Recipe, plans: "list[Plan]") -> "Plan":
        """One plan of several stages: rows of the last, with the remarks of those before and the first's bytes."""
        left, gone = {row.name for row in plans[0].rows}, f"removed by step 1 ({plans[0].recipe.steps[0].method})"
        rows: dict[str, PlanRow] = {
            row.name: dataclasses.replace(row, after=0, reason=gone)
            for row in cls.of(checkpoint).rows
            if row.name not in left
        }
        for plan in plans:
            now = {row.name: row for row in plan.rows}
            for name, old in rows.items():
                if name not in now and old.after:
                    step = f"step {plan.first + 1} ({plan.recipe.steps[0].method})"
                    now[name] = dataclasses.replace(old, after=0, reason=f"removed by {step}")
            for name, row in now.items():
                if name in rows:
                    old, notes = rows[name], row.notes if row.after else ()
                    sparsity = row.sparsity or old.sparsity
                    if old.sparsity and row.scheme and not holds_zero(row.scheme):
                        sparsity, lost = 0.0, f"{row.scheme} has no zero: the zeros made before are rounded like others"
                        notes = (*notes, lost)
                    row = dataclasses.replace(row, before=old.before, notes=(*old.notes, *notes), sparsity=sparsity)
                rows[name] = row
        return cls(checkpoint, recipe, list(rows.values()), parts=tuple(plans))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Plan":
        """A checkpoint as it lies, as a plan that changes nothing: what a format checks before an export."""
        rows = []
        for name, role, why in roles(checkpoint):
            shape, dtype, stored = checkpoint.shape(name), checkpoint.source.dtype(name), checkpoint.scheme(name)
            why = "" if why == QUANTIZED else why
            size = stored.bytes(shape) if stored else torch.Size(shape).numel() * dtype.itemsize
            rows.append(PlanRow(name, shape, str(dtype).removeprefix("torch."), role, stored, -1, why, size, size))
        return cls(checkpoint, Recipe(()), rows)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        return self.checkpoint.config

    @property
    def task(self) -> Any:
        """The model's task."""
        return self.checkpoint.task

    @property
    def before(self) -> int:
        """Bytes of all tensors now."""
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        """Bytes of all tensors in the checkpoint that will be written."""
        return sum(row.after for row in self.rows)

    def row(self, name: str) -> PlanRow:
        """The row of one tensor."""
        return next(row for row in self.rows if row.name == name)

    def steps(self, gait: str, name: str) -> list[Pass]:
        """The passes that define `gait` and want the weight of that name, in order."""
        return [step for step in self.recipe.steps if hasattr(step, gait) and step.wants(name)]

    def rounding(self, row: "PlanRow") -> Any:
        """How the scales of a row's scheme are rounded by the step that takes it."""
        assert row.scheme
        return dataclasses.replace(self.recipe.steps[row.step], scheme=row.scheme).rounding

    def trials(self) -> "list[Plan]":
        """The plan with each scheme that an `assign` pass may choose, for a format to refuse before any work."""
        found = []
        for step in self.recipe.steps:
            for i in range(len(getattr(step, "schemes", ())) if hasattr(step, "assign") else 0):
                rows = [
                    dataclasses.replace(row, scheme=step.choices(row.scheme)[i])  # type: ignore[attr-defined]
                    if row.scheme and row.role == "linear" and step.wants(row.name)
                    else row
                    for row in self.rows
                ]
                whole = math.gcd(*(row.shape[-1] for row in rows if row.scheme and row.role == "linear"))
                for row in rows:
                    try:
                        _ = row.scheme and row.scheme.scales_per_row(row.shape[-1], whole)
                    except BadInput as error:
                        raise BadInput(f"{row.name}: {error}, as a knob of {step.method}") from error
                found.append(Plan(self.checkpoint, self.recipe, rows))
        return found

    def legal(self, format: str) -> dict[str, str]:
        """Notes of a format on the tensors, which sees tiles by rows if it has none. Raises what it cannot hold."""
        module = shelf.find("formats", format)
        tiled = {row.name: row.scheme for row in self.rows if row.scheme and row.scheme.tiled}
        if format in TILED or not tiled:
            return dict(module.check(self))
        rows = [dataclasses.replace(r, scheme=r.scheme.by_rows) if r.scheme else r for r in self.rows]
        notes = dict(module.check(dataclasses.replace(self, rows=rows)))
        for name, scheme in tiled.items():
            notes[name] = "; ".join(filter(None, [notes.get(name), f"{scheme}: each scale is repeated in its rows"]))
        return notes

    def note(self, name: str, text: str) -> None:
        """Add a remark to a tensor's row (an empty name: to the first row)."""
        for i, row in enumerate(self.rows):
            if row.name == name:
                self.rows[i] = dataclasses.replace(row, notes=(*row.notes, text))

    def taken(self, step: Pass | None = None) -> list[PlanRow]:
        """Rows that will be quantized (by that pass)."""
        return [row for row in self.rows if row.scheme and (step is None or self.recipe.steps[row.step] is step)]


def static_activations(scheme: Scheme | None) -> bool:
    """Whether a layer stored so needs the range of its inputs measured."""
    return bool(
        scheme
        and scheme.activations
        and not scheme.activations.dynamic
        and isinstance(scheme.activations.grain, Tensor)
    )


Progress = Callable[[int, int, str], None]
