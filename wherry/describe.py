"""Describe: what a model is; write report.json, report.html and the model card (README.md) beside a finished result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from wherry import card, page, shelf
from wherry.artifact import Artifact
from wherry.choose import artifacts
from wherry.errors import Error
from wherry.prove import where
from wherry.report import Report, write_atomic

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data", ".xml", ".bin", ".ort")


def sizes(plan: Any, result: Path) -> Report:
    """Rows of bytes, bits per parameter, and the plan's remarks."""
    report, params = Report(), plan.checkpoint.params
    report.add("recipe", "", str(plan.recipe))
    report.add("parameters", "original", params)
    report.add("bytes", "original", plan.checkpoint.source.bytes(), "B")
    for artifact in artifacts(result):
        size = sum(entry["bytes"] for name, entry in artifact.manifest["files"].items() if name.endswith(WEIGHTS))
        report.add("bytes", where(artifact, result), size, "B", note="weight files")
        report.add("bits per parameter", where(artifact, result), 8 * size / params, "bits")
    for row in Artifact.open(result).manifest["plan"]:
        for note in row["notes"]:
            report.add("note", row["name"], note)
    return report


def write(result: Path, out: Path, report: Report, stamp: dict[str, Any]) -> None:
    """Write the three into `result`, which will be called `out`: paths in commands are the final ones."""
    lines, formats = [], []
    for artifact in artifacts(result):
        place = artifact.path.relative_to(result)
        lines += shelf.find("formats", artifact.format).command(Artifact(out / place, artifact.manifest))
        if artifact.path != result:
            formats.append(artifact.format)
    for key, value in stamp.items():
        if value is not None:
            report.add(f"made with: {key}", "", value if isinstance(value, str | int) else str(value))
    report.extend(page.facts(Artifact.open(result).manifest, lines, formats))
    report.save(result / "report.json")
    write_atomic(result / "report.html", page.render(report))
    write_atomic(result / "README.md", card.render(report))


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

        module, packed = shelf.find("formats", target), any(checkpoint.scheme(name) for name in checkpoint.names())
        made = Plan.of(checkpoint) if packed else Recipe.parse(default_recipe(checkpoint)).plan(checkpoint)
        try:
            notes = module.check(made)
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
