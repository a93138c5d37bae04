"""Made: rows about what was made and how, from an artifact's manifest, for the page and the model card."""

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wherry.page.figure import size_of
from wherry.report import Report

PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf", "xllamacpp", "onnx", "onnxruntime", "numpy")


def facts(manifest: dict[str, Any], commands: Sequence[str] = (), formats: Sequence[str] = ()) -> Report:
    """Rows about what was made: model, licence, plan, files, versions, and the lines that make it and load it.

    Args:
        manifest: of the artifact, or of the checkpoint that holds the exports.
        commands: copy-paste lines that load the result.
        formats: names of the exports beside it.
    """
    report = Report()
    report.add("model", "", manifest["model"])
    report.add("task", "", manifest["task"]["kind"])
    report.add("format", "", manifest["format"])
    report.add(
        "license",
        "",
        manifest.get("license") or None,
        note="" if manifest.get("license") else "not stated by the source",
    )
    report.add("source", "", manifest.get("source") or manifest["model"])
    plan = manifest.get("plan") or []
    for scheme in dict.fromkeys(row["scheme"] for row in plan if row["scheme"]):
        rows = [row for row in plan if row["scheme"] == scheme]
        size = f"{size_of(r['before'] for r in rows)} before, {size_of(r['after'] for r in rows)} after"
        report.add("stored as", scheme, len(rows), "tensors", note=size)
    for reason in dict.fromkeys(row["reason"] or "no scheme" for row in plan if not row["scheme"]):
        rows = [row for row in plan if not row["scheme"] and (row["reason"] or "no scheme") == reason]
        report.add("left as it is", reason, len(rows), "tensors", note=size_of(r["after"] for r in rows))
    recipe = manifest.get("recipe") or ""
    if recipe:
        # a source may say more than its name: "model.gguf, decoded from Q4_1"
        source = shlex.quote(str(manifest.get("source") or "MODEL").partition(", ")[0])
        more = f" --format {','.join(formats)}" if formats else ""
        report.add("made by", "", f"wherry compress {source} -o OUT --recipe {shlex.quote(recipe)}{more}")
    for i, line in enumerate(commands, 1):
        report.add("loaded by", str(i), line)
    for name, entry in manifest["files"].items():
        report.add("file", name, entry["bytes"], "B", note=f"sha256 {entry['sha256']}")
    report.add("version", "wherry", manifest.get("wherry") or None)
    report.add("version", "python", platform.python_version())
    for package in PACKAGES:
        try:
            report.add("version", package, version(package))
        except PackageNotFoundError:
            continue
    return report
