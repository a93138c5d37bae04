"""What may be said of the served model: its facts, its runtime, and the proof that came with it."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import wherry
from wherry.artifact import Artifact
from wherry.report import Report
from wherry.session import GRADES, Session

# rows of a report that belong to the proof, in the order in which they are shown
PROOF = ("verdict", "bytes", "perplexity", "kl", "top-1", "spearman", "pearson", "cosine", "prefill", "decode", "peak")


def schemes(artifact: Artifact) -> list[tuple[str, int]]:
    """(scheme, tensors stored so), most frequent first; tensors that stay float are left out."""
    count = Counter(str(row["scheme"]) for row in artifact.manifest.get("plan", []) if row.get("scheme"))
    return count.most_common()


def facts(session: Session, artifact: Artifact, report: Report | None, context: int) -> dict[str, Any]:
    """Everything the page shows, as JSON values. Holds no path of this machine.

    proof: rows {what, where, value, unit, low, high, note, text}; text is the value as a person reads it.
    """
    manifest = artifact.manifest
    rows = [] if report is None else report.rows
    proof = [{**asdict(row), "text": row.text()} for name in PROOF for row in rows if row.what.lower().startswith(name)]
    return {
        "model": {
            "name": artifact.name,
            "task": artifact.task.kind,
            "format": artifact.format,
            "bytes": artifact.bytes,
            "params": manifest.get("params") or None,
            "schemes": [{"scheme": scheme, "tensors": tensors} for scheme, tensors in schemes(artifact)],
            "recipe": manifest.get("recipe") or "",
            "license": manifest.get("license") or "",
            "context": context,
            "sha256": manifest["files"].get(manifest["main"], {}).get("sha256", ""),
        },
        "runtime": dict(session.facts),
        "grade": {"grade": session.grade, "means": GRADES.get(session.grade, "")},
        "proof": {"title": "" if report is None else report.title, "rows": proof},
        "wherry": wherry.__version__,
    }
