"""Recipe: what to do, as text. Plan: what will happen to every single tensor, before any work.

    "gptq:scheme=W4A16_ASYM,group_size=64"            one pass
    "rtn:scheme=W8A16,targets=re:.*down_proj | gptq"  several, joined by |; a tensor belongs to the first that takes it
    recipe.yaml                                       the same as a list of {method: {knob: value}}

A Pass is a frozen dataclass that owns its knobs and its mathematics. By the methods that it defines, the engine
knows its gait: only `solve` streams; `observe` + `solve` walks block by block with calibration data; `smooth` comes
before a solver in the same block, `fit` after it; `tune` comes last, with the whole model.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml

from wherry import shelf
from wherry.checkpoint import Checkpoint, stack
from wherry.errors import BadInput, Unsupported
from wherry.gait import Pass as Pass
from wherry.gait import coerce, corrected
from wherry.gait import matches as matches
from wherry.scheme import PRESETS, Scheme, Tensor
from wherry.shelf import suggest


def build(method: str, knobs: dict[str, Any]) -> Pass:
    """A pass from its name and its knobs as text or YAML values.

    Raises:
        Unsupported: no such method; BadInput: no such knob, or a value of the wrong type.
    """
    kind = shelf.load("quant", method)
    hints, known = get_type_hints(kind), [item.name for item in dataclasses.fields(kind)]
    knobs = dict(knobs)
    options = [(key, knobs.pop(key)) for key in ("group_size", "scale") if key in knobs]
    values: dict[str, Any] = {}
    for name, value in knobs.items():
        if name not in known:
            near, every = suggest(str(name), [*known, "group_size"]), ", ".join(known)
            raise BadInput(f"{method} has no knob '{name}'{near}; it has: group_size, scale, {every}")
        values[name] = coerce(method, name, value, hints[name])
    for key, value in options:
        scheme = values.get("scheme", next(f.default for f in dataclasses.fields(kind) if f.name == "scheme"))
        sized = key == "group_size"
        values["scheme"] = scheme.with_group(coerce(method, key, value, int)) if sized else scheme.with_scale(value)
    made: Pass = kind(**values)
    if made.embedding != "keep":
        Scheme.parse(made.embedding)
    return made


def expand(step: Pass) -> tuple[Pass, ...]:
    """The steps that a pass stands for: itself, or those of its recipe."""
    return Recipe.parse(step.recipe()).steps if hasattr(step, "recipe") else (step,)


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
        for part in text.split("|"):
            method, _, rest = part.strip().partition(":")
            if not method:
                raise BadInput(f"recipe '{text}' has an empty step; write METHOD:knob=value,knob=value")
            knobs = {}
            for item in filter(None, re.split(r",(?=[A-Za-z_]\w*=)", rest)):
                key, equals, value = item.partition("=")
                if not equals:
                    raise BadInput(f"recipe '{text}': '{item}' is not knob=value")
                knobs[key.strip()] = value.strip()
            steps += expand(build(method.strip(), knobs))
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
            made += expand(build(method, knobs or {}))
        return cls(tuple(made))

    def to_yaml(self) -> str:
        """The recipe as YAML; `from_yaml` reads it back to an equal recipe."""
        steps = []
        for step in self.steps:
            knobs: dict[str, Any] = {}
            for item in dataclasses.fields(step):
                value = getattr(step, item.name)
                knobs[item.name] = list(value) if isinstance(value, tuple) else value
            scheme, *options = str(knobs.pop("scheme")).split(",")
            if step.solves:
                parts = [option.split("=") for option in options]
                knobs = {"scheme": scheme} | knobs | {k: int(v) if k == "group_size" else v for k, v in parts}
            steps.append({step.method: knobs})
        return yaml.safe_dump({"recipe": steps}, sort_keys=False)

    @property
    def calibrated(self) -> bool:
        """Whether any step needs calibration data."""
        return any(step.calibrated for step in self.steps)

    def plan(self, checkpoint: Checkpoint, formats: tuple[str, ...] = ()) -> "Plan":
        """Decide for every tensor, check it against every format, and raise what can be known to fail."""
        if checkpoint.graph is not None:
            self._fits_graphs()
        for step in self.steps:
            checkpoint = step.rewrite(checkpoint) if hasattr(step, "rewrite") else checkpoint
        plan = Plan(checkpoint, self, rows=[self._row(checkpoint, *item) for item in roles(checkpoint)])
        for step in self.steps:
            for pattern in (*step.targets, *step.ignore):
                layers = [row.name.removesuffix(".weight") for row in plan.rows if row.role in QUANTIZABLE]
                if not any(matches(pattern, layer) for layer in layers):
                    raise BadInput(f"'{pattern}' matches no layer of {checkpoint.name}{suggest(pattern, layers)}")
        if checkpoint.graph is not None and checkpoint.graph.quantized:
            raise BadInput(f"{checkpoint.path} is quantized already; compress the float model that it was made from")
        plan.trials()  # a group that fits no width is found here
        if not any(row.scheme for row in plan.rows):
            raise BadInput(f"the recipe '{self}' changes nothing in {checkpoint.name}")
        always = ("onnx",) if checkpoint.graph is not None else ()  # what a graph is written as
        for name in dict.fromkeys((*always, *formats)):
            for trial in plan.trials():
                shelf.find("formats", name).check(trial)
            for tensor, note in shelf.find("formats", name).check(plan).items():
                plan.note(tensor, f"{name}: {note}")
        return plan

    def _fits_graphs(self) -> None:
        """Raise Unsupported for a step that walks a transformer's blocks: an ONNX graph has none."""
        for step in self.steps:
            gait = next((name for name in ("smooth", "correct", "fit", "tune", "assign") if hasattr(step, name)), "")
            told = len(inspect.signature(step.observe).parameters) if hasattr(step, "observe") else 0
            if gait or told > 2:
                raise Unsupported(
                    f"{step.method} walks a transformer block by block, and an ONNX graph has no blocks.\n"
                    "On graphs there are rtn, gptq, hqq, and equalize before them."
                )

    def _row(self, checkpoint: Checkpoint, name: str, role: str, why: str) -> "PlanRow":
        shape, dtype = checkpoint.shape(name), checkpoint.source.dtype(name)
        stored = checkpoint.scheme(name)
        before = stored.bytes(shape) if stored else torch.Size(shape).numel() * dtype.itemsize
        row = PlanRow(name, shape, str(dtype).removeprefix("torch."), role, None, -1, why, before, before)
        if role not in QUANTIZABLE or why == QUANTIZED:
            return row
        reasons = []
        solvers = [(i, step) for i, step in enumerate(self.steps) if step.solves]
        wanting = [item for item in solvers if item[1].wants(name) and not hasattr(item[1], "smooth")]
        for i, step in wanting[:1] or solvers:  # one that smooths leaves the codes to a later step, if there is one
            if step.targets and not any(matches(p, name) for p in step.targets):
                reasons.append(f"not among the targets of step {i + 1}")
                continue
            if any(matches(p, name) for p in step.ignore):
                reasons.append(f"ignored by step {i + 1}")
                continue
            if role != "linear" and step.embedding == "keep":
                reasons.append("embedding=keep")
                continue
            scheme = step.scheme if role in MULTIPLIED else Scheme.parse(step.embedding)
            if checkpoint.graph is not None:
                scheme, note = in_graph(scheme, role, step)
            elif role == "linear" and why != OUTSIDE:
                scheme = corrected(self.steps, name, scheme, shape)
            try:
                scheme.scales_per_row(shape[-1])
            except BadInput as error:
                if role not in MULTIPLIED:
                    reasons.append(str(error))
                    continue
                raise BadInput(f"{name}: {error}") from error
            scale_bytes = 4 if scheme.bits > 4 or not step.portable else 2
            after = scheme.bytes(shape, scale_bytes)
            notes: tuple[str, ...] = ()
            if checkpoint.graph is not None:
                notes = (note,) if note else ()
            elif role != "linear":
                after = 2 * torch.Size(shape).numel()  # what transformers can load is float: exact values in fp16
                notes = (f"{scheme}, rounded to nearest; held in the checkpoint as fp16 of exactly these values",)
            elif step.calibrated and why == OUTSIDE:
                notes = ("outside of the blocks: rounded to nearest, without data",)
            else:
                notes = tuple(
                    f"{word} by step {j + 1} ({other.method})"
                    for word, gait in (
                        ("smoothed", "smooth"), ("corrected", "correct"), ("codes learned", "fit"), ("tuned", "tune"),
                    )  # fmt: skip
                    for j, other in enumerate(self.steps)
                    if hasattr(other, gait) and other.wants(name) and (i != j or gait == "smooth")
                )
            return dataclasses.replace(row, scheme=scheme, step=i, reason="", after=after, notes=notes)
        return dataclasses.replace(row, reason="; ".join(reasons))


MULTIPLIED = ("linear", "convolution", "recurrent")
QUANTIZABLE = (*MULTIPLIED, "embedding", "head")
OUTSIDE = "outside of the blocks"
QUANTIZED = "already quantized"


@dataclass(frozen=True)
class PlanRow:
    """What will happen to one tensor.

    role: "linear", "embedding", "head", "norm", "bias" or "other". scheme None: left as it is, for `reason`.
    step: index of the pass that takes it, -1 if none. before, after: bytes in the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    scheme: Scheme | None
    step: int
    reason: str
    before: int
    after: int
    notes: tuple[str, ...] = ()


@dataclass
class Plan:
    """Every tensor of a checkpoint, with what will happen to it. Made and checked before any work."""

    checkpoint: Checkpoint
    recipe: Recipe
    rows: list[PlanRow]
    formats: tuple[str, ...] = field(default=())

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
                for row in rows:
                    if row.scheme:
                        row.scheme.scales_per_row(row.shape[-1])
                found.append(Plan(self.checkpoint, self.recipe, rows))
        return found

    def note(self, name: str, text: str) -> None:
        """Add a remark to a tensor's row (an empty name: to the first row)."""
        for i, row in enumerate(self.rows):
            if row.name == name:
                self.rows[i] = dataclasses.replace(row, notes=(*row.notes, text))

    def taken(self, step: Pass | None = None) -> list[PlanRow]:
        """Rows that will be quantized (by that pass)."""
        return [row for row in self.rows if row.scheme and (step is None or self.recipe.steps[row.step] is step)]


def in_graph(scheme: Scheme, role: str, step: Pass) -> tuple[Scheme, str]:
    """The scheme that a weight of an ONNX graph gets, and a remark where it is not the one asked for."""
    if role == "linear":
        return scheme, ""
    row = PRESETS["W8A16"].with_group(-1)
    if role == "convolution" and scheme.activations is not None:
        if not scheme.activations.dynamic:
            return scheme, ""
        return row, f"{row}: dynamic int8 convolutions run several times slower than float on CPUs; take W8A8_STATIC"
    if role == "recurrent" and scheme.activations is not None:
        return row, f"no integer product of recurrent layers: {row}, computed in float"
    return row, "" if row == scheme else f"{row} in place of {scheme}: ONNX has no blocks for a {role} weight"


def roles(checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """(name, role, reason to leave it alone or "") of every tensor, found from the module's structure on meta."""
    if checkpoint.graph is not None:
        return checkpoint.graph.roles()
    module = checkpoint.skeleton()
    inside = stack(module) + "."
    places = checkpoint.places(module)
    role: dict[str, tuple[str, str]] = {}
    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    vocabulary = max((m.num_embeddings for m in tables), default=0)
    for path, child in module.named_modules():
        for leaf, _ in child.named_parameters(recurse=False):
            name = places.get(f"{path}.{leaf}" if path else leaf)
            if name is None:
                continue
            if isinstance(child, torch.nn.Embedding):
                large = child.num_embeddings == vocabulary
                found = ("embedding", "") if large else ("other", "a small table of positions or types")
            elif child is head:
                found = ("head", "") if leaf == "weight" else ("bias", "biases stay float")
            elif isinstance(child, torch.nn.Linear) and leaf == "weight":
                found = ("linear", "" if path.startswith(inside) else OUTSIDE)
            elif leaf == "bias":
                found = ("bias", "biases stay float")
            elif "norm" in type(child).__name__.lower():
                found = ("norm", "norms stay float")
            else:
                found = ("other", f"a parameter of {type(child).__name__}: only Linear and Embedding are quantized")
            if name not in role or role[name][0] == "head":
                role[name] = found
    out = []
    for name in checkpoint.names():
        kind, why = role.get(name, ("other", "not a parameter of the module"))
        if kind in QUANTIZABLE and checkpoint.scheme(name) is not None:
            why = QUANTIZED
        if "pooler" in name and kind == "linear":
            kind, why = "other", "the pooler is not used by this task"
        out.append((name, kind, why))
    return out


def static_activations(scheme: Scheme | None) -> bool:
    """Whether a layer stored so needs the range of its inputs measured."""
    return bool(
        scheme
        and scheme.activations
        and not scheme.activations.dynamic
        and isinstance(scheme.activations.grain, Tensor)
    )


Progress = Callable[[int, int, str], None]
