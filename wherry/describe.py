"""Describe: write report.json, report.html and the model card (README.md) beside a finished result."""

import math
from pathlib import Path
from typing import Any

from wherry import card, page, shelf
from wherry.artifact import Artifact
from wherry.choose import artifacts
from wherry.prove import where
from wherry.report import Report, write_atomic

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data", ".xml", ".bin", ".ort", ".compact")


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
    manifest = Artifact.open(result).manifest
    if manifest["params"] != params:
        report.add("parameters", "result", manifest["params"])
    zeros = sum(row.get("sparsity", 0.0) * math.prod(row["shape"]) for row in manifest["plan"])
    if zeros:
        report.add("zeros", "result", 100 * zeros / manifest["params"], "%", note=f"of all parameters; {gain(result)}")
    for row in manifest["plan"]:
        for note in row["notes"]:
            report.add("note", row["name"], note)
    return report


def gain(result: Path) -> str:
    """What zeros buy in the artifacts of a result."""
    formats = {artifact.format for artifact in artifacts(result)}
    disk = f"{'the compact file alone' if 'compact' in formats else '--format compact'} is smaller for them"
    if "openvino" in formats:
        return f"{disk}; OpenVINO skips them in int8 matrices of 70% and more, where a CPU has AMX"
    return f"{disk}; no runtime here is faster, they are multiplied as other numbers"


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
