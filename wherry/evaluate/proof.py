"""Proof: is an artifact what its plan says, is it still the original, and does it behave like it?

Every check is a row "check: ..." with the value True, False, or None (not made, the note says why), and the reason.
`verdict` is PASS when no check is False and at least one is True. A manifest with right hashes proves nothing by
itself: who can write the files can write the hashes. Hence the checks against the original's weights and task.

Cost:   every tensor is decoded once and, with the original at hand, compared with it; one tensor in memory at a time.
"""

import hashlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wherry.artifact import BESIDE, MANIFEST, Artifact
from wherry.errors import Corrupt, Error
from wherry.evaluate import tokenizer, weights
from wherry.evaluate.perplexity import Progress, silent
from wherry.report import Report
from wherry.scheme import Scheme
from wherry.task import Task

SLACK_BYTES = 8 << 20  # tokenizer, graph and headers inside of weight files
SLACK = 1.02
WEIGHT_FILES = (".gguf", ".safetensors", ".onnx", ".data", ".bin", ".pt", ".npz", ".compact")
# Defaults of `behaviour`; reasons in its docstring.
KL_LIMIT = 0.5
RATIO_LIMIT = 1.5
SAME_KL_LIMIT = 1e-3
SAME_TOP1_LIMIT = 99.0


@dataclass
class Findings:
    """Problems of one check, and whether it was made at all."""

    problems: list[str] = field(default_factory=list)
    made: int = 0

    def see(self, problem: str) -> None:
        """Count one thing that was looked at; an empty text means that it was right."""
        self.made += 1
        if problem:
            self.problems.append(problem)

    def add(self, report: Report, what: str, where: str, good: str, absent: str) -> None:
        """Append the row of this check."""
        if self.problems:
            more = len(self.problems) - 3
            note = "; ".join(self.problems[:3]) + (f"; and {more} more" if more > 0 else "")
            report.add(f"check: {what}", where, False, note=note)
        elif self.made:
            report.add(f"check: {what}", where, True, note=good)
        else:
            report.add(f"check: {what}", where, None, note=absent)


def digest(weight: np.ndarray) -> str:
    """First 16 hex digits of the sha256 of a weight's float32 bytes, little endian, row by row."""
    return hashlib.sha256(np.ascontiguousarray(weight, dtype="<f4").tobytes()).hexdigest()[:16]


def structure(
    artifact: Artifact,
    decoded: Iterator[tuple[str, np.ndarray]],
    original: Callable[[str], np.ndarray] | None = None,
    where: str = "",
    exact: bool = True,
    allowed: Container[str] = (),
    slack_bytes: int = SLACK_BYTES,
    errors: bool = True,
    progress: Progress = silent,
) -> Report:
    """Check the files and every tensor of an artifact.

    Args:
        artifact: what is to be proven.
        decoded: its tensors as float32, under the plan's names; by foreign code where there is some.
        original: the original's weight [n, k] float32 by name, after what the recipe does before it rounds (rotation);
            None when it is not at hand.
        where: name of the artifact in the rows; its format by default.
        exact: the format promises exactly the plan's weights: digests must agree.
        allowed: names that may be there beside the plan's.
        slack_bytes: what weight files may hold beside weights.
        errors: also give a row "weight error" for each quantized tensor (measured, or as recorded).
        progress: called with (done, total, name).

    Returns rows "check: ...", and the errors.
    """
    where = where or artifact.format
    report = Report()
    if not _files(artifact, report, where):
        report.add("check: weights", where, None, note="not read: the files differ from their manifest")
        return report
    plan = {row["name"]: row for row in artifact.manifest.get("plan") or []}
    found = {
        name: Findings()
        for name in ("present", "once", "quantized", "finite", "scales", "portable", "digest", "same", "zeros")
    }
    seen: set[str] = set()
    portable = (
        bool(plan) and not artifact.manifest.get("graph") and "portable=" not in artifact.manifest.get("recipe", "")
    )
    try:
        for name, tensor in decoded:
            found["once"].see(_unexpected(name, seen, plan, allowed))
            seen.add(name)
            progress(len(seen), max(len(plan), len(seen)), name)
            if name in plan or not plan:
                _tensor(
                    name, np.asarray(tensor), plan.get(name), original, found, report if errors else Report(), where
                )
            if portable and (scheme := _scheme(plan.get(name, {}))) and found["quantized"].made:
                found["portable"].see(_name(name, weights.unrounded_scales(np.asarray(tensor), scheme)))
    except Error as error:
        report.add("check: readable", where, False, note=str(error))
        return report
    for name in plan:
        found["present"].see("" if name in seen else f"{name} is missing")
    if not exact:
        found["digest"] = Findings()
    count, taken = len(seen), sum(1 for row in plan.values() if row.get("scheme"))
    made = bool(artifact.manifest.get("wherry"))
    no_plan = "this format keeps no weights by name" if made else "no plan: this file was not made by wherry"
    found["present"].add(report, "all tensors present", where, f"{count} tensors decoded", no_plan)
    found["once"].add(report, "no second copy", where, f"{count} tensors, each once, none beside the plan", no_plan)
    found["quantized"].add(
        report, "quantized as planned", where, f"{taken} tensors hold no more values than codes", no_plan
    )
    found["finite"].add(report, "no NaN or infinity", where, f"{count} tensors", "nothing was decoded")
    found["scales"].add(report, "no zero scale", where, "no group lost its values", no_plan)
    found["portable"].add(
        report, "scales as they were rounded", where, "7 significant bits each", "not a portable recipe"
    )
    no_digest = no_plan if exact else "this format does not promise the plan's weights bit by bit"
    found["digest"].add(
        report, "decodes to the plan's weights", where, f"{found['digest'].made} digests agree", no_digest
    )
    if found["zeros"].made:
        found["zeros"].add(report, "zeros kept", where, f"{found['zeros'].made} pruned tensors", no_plan)
    good = f"{found['same'].made} tensors: error and scale within what their schemes allow"
    found["same"].add(report, "weights of the original", where, good, "the original was not at hand (--against MODEL)")
    _size(artifact, plan, slack_bytes, report, where)
    return report


def _files(artifact: Artifact, report: Report, where: str) -> bool:
    files = artifact.manifest["files"]
    if not artifact.manifest.get("wherry"):
        report.add("check: hashes", where, None, note="no manifest: there is nothing to compare with")
        return True
    try:
        artifact.verify()
    except Corrupt as error:
        report.add("check: hashes", where, False, note=str(error))
        return False
    inner = [file.parent for file in artifact.path.rglob(MANIFEST) if file.parent != artifact.path]
    for file in sorted(artifact.path.rglob("*")):
        name = file.relative_to(artifact.path).as_posix()
        own = file.is_file() and not any(file.is_relative_to(folder) for folder in inner)
        if own and file.name not in BESIDE and name not in files:
            report.add("check: hashes", where, False, note=f"{name} is not listed in the manifest")
            return False
    report.add("check: hashes", where, True, note=f"{len(files)} files agree with the manifest")
    return True


def _unexpected(name: str, seen: set[str], plan: dict[str, Any], allowed: Container[str]) -> str:
    if name in seen:
        return f"{name} is there twice"
    return f"{name} is not in the plan" if plan and name not in plan and name not in allowed else ""


def _tensor(
    name: str,
    v: np.ndarray,
    row: dict[str, Any] | None,
    original: Callable[[str], np.ndarray] | None,
    found: dict[str, Findings],
    report: Report,
    where: str,
) -> None:
    bad = v.size - int(np.isfinite(v).sum())
    found["finite"].see(f"{name} has {bad} such values" if bad else "")
    if row is None or bad:
        return
    if list(v.shape) != list(row["shape"]):
        found["quantized"].see(f"{name} is {list(v.shape)} where the plan says {row['shape']}")
        return
    if row.get("digest"):
        found["digest"].see("" if digest(v) == row["digest"] else f"{name} decodes to other weights")
    moved = row.get("moved")  # it took scales from its neighbours, or was tuned: compared as far as that can be undone
    pruned, whole = row.get("sparsity") or 0.0, not row.get("remade")  # what was remade has no weight to compare with
    w = None if original is None or not whole else np.asarray(original(name), dtype=np.float32)
    scheme = _scheme(row)
    if pruned:
        share = float(1 - np.count_nonzero(v) / max(v.size, 1))
        found["zeros"].see(f"{name} has {share:.2%} zeros, not {pruned:.2%}" if share < pruned - 1e-5 else "")
        w = None if w is None else np.where(v == 0, np.float32(0), w)
    if scheme:
        found["quantized"].see(_name(name, weights.off_grid(v, scheme)))
        lost = weights.lost_scales(v, scheme, w)
        if lost is not None:
            found["scales"].see(f"{name}: {lost} group(s) hold one single value, the original's do not" if lost else "")
    error = row.get("error")
    if w is not None and pruned and moved:  # what was left was moved to make up for what went
        gap = weights.compare(w, v, None).error
        found["same"].see("" if gap < weights.PRUNED_MOST else f"{name}: error {gap:.3g} over the weights that stayed")
        return
    if w is not None:
        error = None if pruned else error
        if moved and scheme is None and w.ndim < 2:
            found["same"].see(_name(name, weights.strayed(w, v, moved == "tune")))
            return
        seen = weights.compare(weights.undone(w, v) if moved else w, v, scheme)
        problem = seen.problem
        if problem.startswith("scaled") and (row.get("learned") or moved):  # it follows outputs, or scales were fitted
            problem = ""
        if not problem and not moved and error is not None and abs(seen.error - error) > 0.02 * error + 1e-4:
            problem = f"error {seen.error:.4g} where the plan recorded {error:.4g}"
        found["same"].see(_name(name, problem))
        error = seen.error if np.isfinite(seen.error) else None
    if scheme and error is not None:
        note = "relative RMS, " + ("as recorded when it was made" if w is None else f"measured on {where}")
        report.add("weight error", name, float(error), note=f"{note}; {row['scheme']}")


def _scheme(row: dict[str, Any]) -> Scheme | None:
    """The scheme of a plan's row; a custom one that cannot be parsed is only known to be one."""
    if not row.get("scheme"):
        return None
    text = str(row["scheme"])
    return Scheme(kind="codebook") if text.startswith("custom:") else Scheme.parse(text)


def _name(name: str, problem: str) -> str:
    return f"{name}: {problem}" if problem else ""


def _size(artifact: Artifact, plan: dict[str, Any], slack_bytes: int, report: Report, where: str) -> None:
    """Weight files against the plan, in the widest container that a format may use: 4 or 8 bits, groups of 32."""
    if not plan:
        report.add("check: size as forecast", where, None, note="the manifest has no plan")
        return
    widest = 0
    for row in plan.values():
        scheme, count = _scheme(row), int(np.prod(row["shape"]))
        if scheme is None or scheme.kind != "int":
            widest += max(row["after"], 4 * count)
            continue
        k = row["shape"][-1]
        group = min(32, weights.size(scheme, tuple(row["shape"])) or k)
        scales = -(-k // group) * (count // k)
        widest += max(
            row["after"], count * (4 if scheme.bits <= 4 else 8) // 8 + scales * (4 if scheme.bits <= 4 else 6)
        )
    held = sum(entry["bytes"] for name, entry in artifact.manifest["files"].items() if name.endswith(WEIGHT_FILES))
    limit = int(widest * SLACK) + slack_bytes
    forecast = sum(row["after"] for row in plan.values())
    note = (
        f"{held:,} B in weight files; plan {forecast:,} B, at most {limit:,} B in this format's blocks with its headers"
    )
    report.add("check: size as forecast", where, held <= limit, note=note)


def same_task(a: Task, b: Task, chat_template: str | None = None, where: str = "", fewer: bool = False) -> Report:
    """Check that an artifact's task is the original's: what goes in and what ends an answer.

    Args:
        a: the artifact's task. b: the original's. fewer: the recipe drops tokens: those that stay are compared.
        chat_template: the template that the artifact's main file itself carries (GGUF metadata), if it carries one.
        where: name of the artifact in the rows.
    """
    report = Report()

    def row(what: str, same: bool, good: str, bad: str) -> None:
        report.add(f"check: {what}", where, same, note=good if same else bad)

    fields = ("kind", "pooling", "normalize", "max_length", "inputs")
    other = [
        f"{name} {getattr(a, name)!r}, not {getattr(b, name)!r}"
        for name in fields
        if getattr(a, name) != getattr(b, name)
    ]
    row("task", not other, a.kind, "; ".join(other))
    parts, good = tokenizer.differs(a.folder, b.folder, fewer)
    row("tokenizer", not parts, good, f"tokenizer.json differs in {', '.join(parts)}")
    special = ("bos_token", "eos_token", "pad_token", "unk_token")
    words = [name for name in special if _text(a, name) != _text(b, name)]
    texts = [f"{name} {_text(a, name)!r}, not {_text(b, name)!r}" for name in words]
    row("special tokens", not words, "the same", "; ".join(texts))
    if a.kind != "text-generation":
        return report
    row("stop tokens", set(a.stop) == set(b.stop), f"{sorted(a.stop)}", f"{sorted(a.stop)}, not {sorted(b.stop)}")
    wanted = b.tokenizer_config.get("chat_template") or ""
    carried = {"its folder": a.tokenizer_config.get("chat_template") or ""}
    if chat_template is not None:
        carried["its main file"] = chat_template
    wrong = [f"that of {place} {_first_difference(text, wanted)}" for place, text in carried.items() if text != wanted]
    row("chat template", not wrong, "the same" if wanted else "none, as in the original", "; ".join(wrong))
    return report


def _text(task: Task, name: str) -> str:
    token = task.tokenizer_config.get(name)
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


def _first_difference(text: str, wanted: str) -> str:
    if not text or not wanted:
        return "is missing" if wanted else "is there, the original has none"
    at = next((i for i, (x, y) in enumerate(zip(text, wanted, strict=False)) if x != y), min(len(text), len(wanted)))
    return f"differs at character {at}: {text[at : at + 24]!r} where the original has {wanted[at : at + 24]!r}"


def behaviour(
    report: Report,
    where: str,
    kl_limit: float = KL_LIMIT,
    ratio_limit: float | None = RATIO_LIMIT,
    top1_limit: float | None = None,
    original: str = "the original",
) -> Report:
    """Checks on the rows that drift.compare wrote for `where`: finite outputs, and limits on the intervals' bad ends.

    Defaults: KL <= 0.5 nats/token and perplexity ratio <= 1.5 say that it is still this model, no more; they are no
    promise of quality, which is a budget of your own. Measured on SmolLM2-135M-Instruct and the shipped text: plain
    rounding to 4 bits (groups of 64) has KL 0.32 and ratio 1.25, to 3 bits 1.15 and 2.3; the 4-bit model with one
    swapped q_proj 1.26 and 3.1, with one swapped up_proj 1.04 and 2.5.
    Against a model with the very same weights (one runtime against another) use SAME_KL_LIMIT and SAME_TOP1_LIMIT:
    what remains is rounding of the arithmetic.
    """
    out = Report()
    perplexity = report.get("perplexity", where)
    if perplexity is None or (perplexity.value is None and "grade C" in perplexity.note):
        why = perplexity.note if perplexity else "no text was scored"
        for what in ("finite outputs", "near the original"):
            out.add(f"check: {what}", where, None, note=why)
        return out
    kl = report.get("kl", where)
    finite = perplexity.value is not None and (kl is None or kl.value is not None)
    why = "every scored token" if finite else (perplexity.note if perplexity.value is None else kl.note if kl else "")
    out.add("check: finite outputs", where, finite, note=why)
    limits = (
        ("kl", kl_limit, 1, "nats/token"),
        ("perplexity ratio", ratio_limit, 1, ""),
        ("top-1 agreement", top1_limit, -1, "%"),
    )
    for what, limit, sign, unit in limits:
        row = report.get(what, where)
        if limit is None or row is None:
            continue
        if not isinstance(row.value, float | int):
            out.add(f"check: {what}", where, False, note=f"no finite value: {row.note}")
            continue
        worst = (row.high if sign > 0 else row.low) if row.low is not None and row.high is not None else row.value
        assert worst is not None
        word = "at most" if sign > 0 else "at least"
        bound = ", a lower bound" if row.note.startswith("lower bound") else ""
        note = (
            f"{worst:.4g} at the bad end of its interval{bound}; {word} {limit:g} {unit}".rstrip() + f" to {original}"
        )
        out.add(f"check: {what}", where, bool(sign * worst <= sign * limit), note=note)
    return out


def verdict(report: Report) -> bool:
    """True when no check failed and at least one was made."""
    made = [row.value for row in report if row.what.startswith("check: ") and row.value is not None]
    return bool(made) and all(made)


def conclude(report: Report, where: str = "") -> Report:
    """Append the row "verdict": PASS or FAIL, with the reason in its note. Returns the report."""
    checks = [row for row in report if row.what.startswith("check: ")]
    failed = [row.what.removeprefix("check: ") for row in checks if row.value is False]
    skipped = sum(row.value is None for row in checks)
    passed = len(checks) - len(failed) - skipped
    note = f"{passed} checks passed" + (f", {skipped} not made" if skipped else "")
    if failed:
        note = f"{len(failed)} failed: {', '.join(dict.fromkeys(failed))}; {note}"
    report.add("verdict", where, "PASS" if verdict(report) else "FAIL", note=note)
    return report
