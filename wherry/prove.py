"""Prove: reload artifacts on the runtimes that will run them, check every tensor, measure against the original."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wherry import data, shelf
from wherry.artifact import Artifact
from wherry.choose import artifacts, load, measured
from wherry.errors import BadInput, Error, Missing
from wherry.evaluate import drift, outputs, proof, similarity
from wherry.report import Report
from wherry.session import GRADES, Sampling, Session

Progress = Callable[[int, int, str], None]
WINDOWS, LENGTH = 8, 256  # of the evaluation text: 2040 predictions
EXAMPLES = 512  # of evaluation data, for models that are no language models
SAMPLE = "What is the capital of France?"
CHECKPOINT = "checkpoint"
Limits = tuple[float, float]
LIMITS: Limits = (proof.KL_LIMIT, proof.RATIO_LIMIT)
LOSS = 0.05  # of Spearman's correlation: it is still this model; a promise of quality is the user's to set
RUNTIME_OF = {
    "compressed_tensors": "torch", "safetensors": "torch", "gptq": "torch", "awq": "torch",
    "gguf": "llamacpp", "onnx": "onnxruntime",
    "onnx_half": "onnxruntime", "ort": "onnxruntime", "openvino": "openvino", "compact": "compact",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One artifact, the runtime that runs it, and the name that the report calls it."""

    artifact: Artifact
    runtime: str
    where: str


def prove(
    items: Sequence[Item],
    original: Any = None,
    source: data.Data | None = None,
    behave: bool = True,
    speed: bool = True,
    limits: Limits = LIMITS,
    progress: Progress = lambda done, total, text: None,
) -> Report:
    """All checks and measures of some artifacts, with the rows' `where` naming each.

    Args:
        items: what to prove; one that is called "checkpoint" and runs in torch is also what the others' arithmetic
            is compared with, since all hold the same codes.
        original: the Checkpoint that they were made from, or None: then only structure and finite outputs are proved.
        source: data to judge on; None takes what the package ships.
        behave: also run each and judge what it says; without it the result is the same at every run.
        speed: also time each, in a process of its own.
        limits: (KL in nats/token, perplexity ratio) that an artifact may be from the original, at the bad end of
            the interval.
        progress: called as progress(done, total, text).
    """
    report = Report("proof")
    source_of = original  # a graph comes rewritten already
    if original is not None and original.graph is None:
        source_of = turned(original, items[0].artifact)
    weight = None if original is None else lambda name: source_of.weight(name).numpy()
    fewer = any(row.get("remade") for item in items for row in item.artifact.manifest.get("plan") or [])
    for item in items:
        module = shelf.find("formats", item.artifact.format)
        decoded = module.decode(item.artifact)
        allowed = set(original.names()) if original is not None else set()
        first = item is items[0]  # all hold the same weights: one row per error is enough
        options: dict[str, Any] = {"allowed": allowed, "errors": first, "progress": progress}
        report.extend(proof.structure(item.artifact, decoded, weight, item.where, **options))
        if original is not None:
            template = module.template(item.artifact) if hasattr(module, "template") else None
            report.extend(proof.same_task(item.artifact.task, original.task, template, item.where, fewer))
    if any(row.value is False for row in report):
        progress(1, 1, "")
        for item in items:  # what is damaged is not run: a bad file can take the runtime down with it
            report.add("check: finite outputs", item.where, None, note="not run: the structure is wrong")
        return proof.conclude(report)
    if not behave:
        return proof.conclude(report)
    judge = judge_of(items[0].artifact)
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for item in items:
            session = load(item.artifact, item.runtime)
            stack.callback(session.close)
            sessions[item.where] = session
            _facts(report, session, item.where)
            kept = item.artifact.manifest.get("kv_cache")
            if kept and "kv cache" not in session.facts:
                note = f"{kept} is recorded, and {item.runtime} does not read it: keys and values stay float"
                report.add("kv cache", item.where, "float", note=note)
        reference = None
        if original is not None:
            name = "torch" if original.graph is None else "onnxruntime"
            reference = shelf.find("runtimes", name).over(original)
            stack.callback(reference.close)
        judge(report, items, sessions, reference, original, source, limits, progress)
    if speed:
        exports = [item for item in items if item.where != CHECKPOINT]  # torch decodes it: its speed says nothing
        for i, item in enumerate(exports or items):
            progress(i, len(exports or items), f"timing {item.where}")
            report.extend(measured(item.artifact, item.runtime, item.where))
    return proof.conclude(report)


def _facts(report: Report, session: Session, where: str) -> None:
    for key, value in session.facts.items():
        report.add(f"fact: {key}", where, value)
    report.add("grade", where, session.grade, note=GRADES[session.grade])


def text_windows(task: Any, source: data.Data | None) -> tuple[data.Data, np.ndarray]:
    """The text that judges a language model, and its windows [n, length] of ids. Raises BadInput: too little text."""
    source = source or data.read(data.shipped("evaluation"))
    return source, data.windows(source, task, min(LENGTH, task.max_length), WINDOWS)


def _text(
    report: Report, items: Sequence[Item], sessions: dict[str, Session], reference: Session | None, original: Any,
    source: data.Data | None, limits: Limits, progress: Progress,
) -> None:  # fmt: skip
    """Perplexity, KL and top-1 against the original; KL against our own checkpoint; a sample."""
    task = (original or items[0].artifact).task
    source, windows = text_windows(task, source)
    report.add("evaluation data", "", source.name, note=f"{windows.size} tokens, sha256 {source.digest[:16]}")
    scored: dict[str, Any] = {
        name: drift.record(s, windows.tolist(), progress=progress) if s.grade == "B" else s
        for name, s in sessions.items()
    }
    if reference is not None:
        report.extend(drift.compare_all(reference, scored, windows.tolist(), progress=progress))
    else:
        from wherry.evaluate import perplexity

        for name, s in scored.items():
            report.extend(perplexity.perplexity(s, windows.tolist(), name, progress)[1])
    own = scored.get(CHECKPOINT)
    others = {name: s for name, s in scored.items() if name != CHECKPOINT}
    if own is not None and others:
        for row in drift.compare_all(own, others, windows.tolist(), original=CHECKPOINT, progress=progress):
            if row.what in ("kl", "top-1 agreement") and row.where in others:
                note = "between this runtime and torch, with the same weights: what its arithmetic adds"
                report.rows.append(replace(row, what=f"{row.what} to the checkpoint", note=note))
    for item in items:
        if kept := sessions[item.where].facts.get("kv cache"):
            plain = load(item.artifact, f"{item.runtime.partition(':')[0]}:cache=float")
            found = drift.compare_all(plain, {item.where: scored[item.where]}, windows.tolist(), progress=progress)
            plain.close()
            row = next(row for row in found if row.what == "kl")
            report.rows.append(replace(row, what="kl of the kv cache", note=f"{kept} against floats, same weights"))
        report.extend(proof.behaviour(report, item.where, *limits))
        prompt = task.tokenizer.encode(task.chat([{"role": "user", "content": SAMPLE}]), add_special_tokens=False).ids
        answer = list(sessions[item.where].generate(prompt, Sampling(max_tokens=32, stop=task.stop)))
        report.add("sample", item.where, task.tokenizer.decode(answer).strip() or "(nothing)", note=f"asked: {SAMPLE}")


def _pairs(
    report: Report, items: Sequence[Item], sessions: dict[str, Session], reference: Session | None, original: Any,
    source: data.Data | None, limits: Limits, progress: Progress,
) -> None:  # fmt: skip
    """Spearman and Pearson on sentence pairs, paired with the original's; cosine of the embeddings."""
    task = (original or items[0].artifact).task
    source = source or data.read(data.shipped("pairs"))
    if not source.pairs:
        raise BadInput(f"{source.name} holds no sentence pairs: a .csv or .tsv of sentence, sentence, score is wanted")
    report.add("evaluation data", "", source.name, note=f"{len(source.pairs)} pairs, sha256 {source.digest[:16]}")
    base = None
    if reference is not None:
        base, rows = similarity.measure(reference, task, source.pairs, "original", progress=progress)
        report.extend(rows)
    for item in items:
        found, rows = similarity.measure(
            sessions[item.where], item.artifact.task, source.pairs, item.where, progress=progress
        )
        report.extend(rows)
        finite = bool(np.isfinite(found.embeddings).all())
        report.add("check: finite outputs", item.where, finite, note="every embedding")
        if base is not None:
            report.extend(similarity.compare(base, found, item.where))
            row = report.get("spearman difference", item.where)
            if row is not None and row.low is not None:
                good = row.low >= -LOSS
                report.add(
                    "check: near the original", item.where, good, note=f"Spearman lost at most {LOSS} at the bad end"
                )


def judge_of(artifact: Artifact) -> Callable[..., None]:
    """What measures the behaviour of an artifact: by its task, or by its outputs alone."""
    if artifact.task.kind == "text-generation":
        return _text
    return _pairs if artifact.task.kind == "sentence-similarity" else _outputs


def _outputs(
    report: Report, items: Sequence[Item], sessions: dict[str, Session], reference: Session | None, original: Any,
    source: data.Data | None, limits: Limits, progress: Progress,
) -> None:  # fmt: skip
    """How far the outputs are from the original's, and how often the largest output is the same."""
    for item in items:
        for found in item.artifact.manifest.get("checks", []):
            report.add(f"when exported: {found['what']}", item.where, found["value"], found["unit"], note=found["note"])
    if source is None:
        for item in items:
            report.add("check: finite outputs", item.where, None, note="no data to judge on: give --eval DATA")
        return
    task = (original or items[0].artifact).task
    batches = data.inputs(source, task, EXAMPLES)
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    report.add("evaluation data", "", source.name, note=f"{count} examples, sha256 {source.digest[:16]}")
    base = [reference.predict(batch) for batch in batches] if reference is not None else None
    for i, item in enumerate(items):
        progress(i, len(items), f"outputs of {item.where}")
        found = [sessions[item.where].predict(batch) for batch in batches]
        report.extend(outputs.compare(base, found, item.where, task.kind.endswith("classification")))


def rewritten(original: Any, artifact: Artifact) -> Any:
    """The graph with the weights that the artifact's recipe gave it before it rounded them (equalize)."""
    return original if original is None or original.graph is None else turned(original, artifact)


def turned(original: Any, artifact: Artifact) -> Any:
    """The original after what the artifact's recipe does to all weights before it rounds them (rotation, equalize)."""
    recipe = artifact.manifest.get("recipe", "")
    if not recipe:
        return original
    from wherry.recipe import Recipe

    try:
        steps = Recipe.parse(recipe).steps
    except Error:  # a method that is not installed here: the weights are compared as they were
        return original
    for step in steps:
        original = step.rewrite(original) if hasattr(step, "rewrite") else original
    return original


def where(artifact: Artifact, root: Path) -> str:
    """What a report calls an artifact: "checkpoint" for the folder itself, else the folder inside of it."""
    return CHECKPOINT if artifact.path == root and artifact.format in RUNTIME_OF else artifact.path.name


def item(artifact: Artifact, root: Path, runtime: str = "auto") -> Item:
    """An artifact with the named runtime, or with the usual one of its format."""
    name = (
        artifact.format if artifact.path == root and artifact.format != "compressed_tensors" else where(artifact, root)
    )
    return Item(artifact, RUNTIME_OF[artifact.format] if runtime == "auto" else runtime, name)


def prove_folder(
    root: Path, original: Any, judged: data.Data | None, full: bool, limits: Limits, progress: Progress
) -> Report:
    """Prove a delivered folder and all exports in it; `full` also runs and times them, and the original."""
    report = prove([item(a, root) for a in artifacts(root)], original, judged, full, full, limits, progress)
    return report.extend(time_original(original)) if full and original.graph is None else report


def time_original(original: Any) -> Report:
    """Speed of the float original in torch; nothing where there are no float weights on disk to time."""
    if not (original.path / "config.json").exists() or original.config.get("quantization_config"):
        return Report()
    try:
        artifact = shelf.find("runtimes", "torch").wrap(original.path)
    except Missing:  # side files of a GGUF file, without weights
        return Report()
    note = "torch, float32: slow on some CPUs; ONNX Runtime float32 is the fairer baseline"
    return Report("", [replace(row, note=note) for row in measured(artifact, "torch", "original")])
