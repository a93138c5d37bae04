"""Summary: what a model is, for `wherry inspect`: its task, sizes, tensors, and whether a format could hold it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wherry import shelf
from wherry.errors import Error
from wherry.report import Report


def inspect(model: str | Path, target: str | None, default_recipe: Callable[[Any], str]) -> Report:
    """Architecture, task, parameters, bytes, and how many tensors are stored in which way. Reads no weights."""
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import roles

    checkpoint = Checkpoint.open(model)
    report = Report(f"{checkpoint.name}")
    config = checkpoint.config
    report.add("architecture", "", (config.get("architectures") or [config.get("model_type", "?")])[0])
    report.add("task", "", checkpoint.task.kind, note=f"judged by {', '.join(checkpoint.task.metrics)}")
    report.add("license", "", checkpoint.license or "not stated")
    report.add("parameters", "", checkpoint.params)
    report.add("bytes", "", checkpoint.source.bytes(), "B")
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if key in config:
            report.add(key, "config.json", config[key])
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, role, _ in roles(checkpoint):
        stored = checkpoint.scheme(name) or str(checkpoint.source.dtype(name)).removeprefix("torch.")
        kinds.setdefault((role, str(stored)), []).append(name)
    for (role, stored), names in kinds.items():
        count = sum(_count(checkpoint.shape(name)) for name in names)
        report.add("tensors", role, len(names), note=f"{stored}, {count:,} parameters, {names[0]} ...")
    if target:
        from wherry.recipe import Plan, Recipe

        shelf.find("formats", target)  # a name that is none is an error, not a "no"
        packed = any(checkpoint.scheme(name) for name in checkpoint.names())
        made = Plan.of(checkpoint) if packed else Recipe.parse(default_recipe(checkpoint)).plan(checkpoint)
        try:
            notes = made.legal(target)
            what = checkpoint.recipe or "these schemes" if packed else made.recipe
            report.add("target", target, True, note=f"can hold {what}; {len(notes)} notes")
        except Error as error:
            report.add("target", target, False, note=str(error))
    return report


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
