"""What may be said of the served model: its facts, its runtime, and the proof that came with it."""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import wherry
from wherry.artifact import Artifact
from wherry.report import Report
from wherry.session import GRADES, Session
from wherry.task import Task

# measures of a report that are shown, in this order
PROOF = (
    "bytes", "perplexity", "perplexity ratio", "kl", "top-1 agreement", "same class", "spearman", "spearman difference",
    "embedding agreement", "accuracy", "top-5 accuracy", "macro f1", "token f1", "map", "frame f1",
    "relative difference", "latency", "examples", "prefill", "decode", "sentences", "peak memory",
)  # fmt: skip


def facts(session: Session, artifact: Artifact, report: Report | None, context: int) -> dict[str, Any]:
    """Everything the page shows, as JSON values. Holds no path of this machine."""
    manifest = artifact.manifest
    schemes = Counter(str(row["scheme"]) for row in manifest.get("plan", []) if row.get("scheme"))
    return {
        "model": {
            "name": artifact.name,
            "task": artifact.task.kind,
            "format": artifact.format,
            "bytes": artifact.bytes,
            "params": manifest.get("params") or None,
            "schemes": [{"scheme": scheme, "tensors": tensors} for scheme, tensors in schemes.most_common()],
            "recipe": manifest.get("recipe") or "",
            "license": manifest.get("license") or "",
            "context": context,
            "sha256": manifest["files"].get(manifest["main"], {}).get("sha256", ""),
        },
        "runtime": dict(session.facts),
        "grade": {"grade": session.grade, "means": GRADES.get(session.grade, "")},
        "proof": proof(artifact, report or Report()),
        "wherry": wherry.__version__,
    }


def proof(artifact: Artifact, report: Report) -> dict[str, Any]:
    """The part of a report that proves this artifact: its own rows and the original's.

    here: what the report calls this artifact. verdict: {value, note} or None. runtime, grade: of the measuring.
    rows: {what, where, value, unit, low, high, note, text}; text is the value as a person reads it.
    """
    places = {row.where for row in report}
    here = next((name for name in (artifact.path.name, artifact.format, "checkpoint") if name in places), "")
    rows = [
        {**asdict(row), "text": row.text()}
        for what in PROOF
        for row in report
        if row.what == what and row.where in ("original", here)
    ]
    verdict, grade = report.get("verdict"), report.get("grade", here)
    runtime = [row.text() for what in ("fact: runtime", "fact: version") if (row := report.get(what, here))]
    return {
        "here": here,
        "verdict": verdict and {"value": verdict.text(), "note": verdict.note},
        "runtime": " ".join(runtime),
        "grade": grade and f"{grade.text()}, {grade.note}",
        "rows": rows,
    }


def own_sampling(task: Task) -> dict[str, float]:
    """What the model itself asks for in generation_config.json: temperature and top_p, where it does."""
    file = task.folder / "generation_config.json"
    own = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
    return {name: float(own[name]) for name in ("temperature", "top_p") if own.get("do_sample") and own.get(name)}
