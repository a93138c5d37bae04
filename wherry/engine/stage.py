"""Stage: a recipe whose steps prune or remake goes from model to model; each stage ends as a folder and is done once.

    .NAME.partial-FINGERPRINT/stage-0/model     what the first stage left: a Hugging Face folder, or a graph's
                             /stage-1/...       units of the stage that is being done
A finished stage is a rename; the folder of the one before is removed then. A killed run goes on in the stage where it
was, at the unit (block) where it was; what a `remake` step keeps beside `out` is there again when it is called again.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from wherry import cargo, shelf, tensorfile
from wherry.checkpoint import Checkpoint
from wherry.engine.unit import assemble, digest, zeros
from wherry.errors import Corrupt
from wherry.journal import Units
from wherry.recipe import Plan, Progress, roles
from wherry.rows import holds_zero
from wherry.scheme import QTensor, Scheme
from wherry.task import Task

Facts = list[dict[str, Any]]
History = dict[str, dict[str, Any]]


def run(plan: Plan, given: Checkpoint, batches: list[Any], work: Units, out: Path, progress: Progress) -> Facts:
    """Do one stage with the model `given`, and write the model that it leaves into `out`; facts of every tensor.

    work: where finished units lie; `out` is made anew.
    """
    shutil.rmtree(out, ignore_errors=True)
    step: Any = plan.recipe.steps[-1]
    if step.gait == "model":
        out.mkdir(parents=True)
        cargo.beside(given.path, given.task, out)
        progress(0, 1, step.method)
        step.remake(given, out, batches, progress)
        return remade(given, opened(out, given), step.method)
    if given.graph is not None:
        found: Facts = shelf.find("engine", "graph").prune(plan, batches, out, progress)
        return found
    if plan.recipe.calibrated and batches:
        done = shelf.find("engine", "walk").run(plan, work, batches, progress)
    else:
        done = shelf.find("engine", "stream").run(plan, work, progress)
    return assemble(plan, work, done, out)


def lead(
    plan: Plan, batches: list[Any], folder: Path, progress: Progress
) -> tuple[Plan, Checkpoint, list[Any], History]:
    """Do all stages but the last: the last one's plan with the model that is really there, that model, the batches
    in its tokens, its history.
    """
    stages, given = plan.parts, plan.checkpoint
    history: History = {}
    if not stages:
        return plan, given, batches, history
    first_batches = batches
    first = max((i for i in range(len(stages) - 1) if (folder / f"stage-{i}" / "model").exists()), default=-1)
    for i, part in enumerate(stages):
        work = folder / f"stage-{i}"
        if i > first:
            now = part if i == 0 else part.recipe.settle(given, part.formats, part.first)
            now.device = plan.device
            batches = recut(first_batches, plan.checkpoint.task, given.task)
            if i == len(stages) - 1:
                return now, given, batches, history
            units = Units(work)
            say = staged(progress, i, len(stages), part.recipe.steps[-1].method)
            facts = run(now, given, batches, units, work / "making", say)
            facts = merged(facts, history, now.first)
            text = json.dumps({fact["name"]: {k: fact[k] for k in KEPT if k in fact} for fact in facts})
            tensorfile.write_pieces(work / "facts.json", [text.encode()])
            (work / "making").rename(work / "model")
        if (work / "model").exists():
            shutil.rmtree(folder / f"stage-{i - 1}", ignore_errors=True)
            for path in work.iterdir():
                if path.name not in ("model", "facts.json"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            given = opened(work / "model", plan.checkpoint)
            history = json.loads((work / "facts.json").read_text())
    raise AssertionError("the last stage is returned")


def recut(batches: list[Any], before: Task, now: Task) -> list[Any]:
    """Calibration inputs in the tokens of a stage's model, where a stage has dropped tokens of the tokenizer."""
    files = [task.folder / "tokenizer.json" for task in (before, now)]
    if not batches or "input_ids" not in batches[0] or not all(file.is_file() for file in files):
        return batches
    if before.tokenizer.get_vocab_size() == now.tokenizer.get_vocab_size():
        return batches
    texts = (before.tokenizer.decode_batch(batch["input_ids"].tolist()) for batch in batches)
    return [now.batch(each) for each in texts]


KEPT = ("sparsity", "moved", "remade")


def merged(facts: Facts, history: History, first: int = 0) -> Facts:
    """The facts of a stage with what those before did to the same tensors: zeros stay, what moved has moved."""
    out = []
    for fact in facts:
        before = history.get(fact["name"], {})
        step = fact["step"] + first if fact["step"] >= 0 else -1
        if fact["scheme"] and not holds_zero(Scheme.parse(fact["scheme"])):
            before = {key: value for key, value in before.items() if key != "sparsity"}
        out.append({**before, **fact, "step": step})
    return out


def remade(given: Checkpoint, made: Checkpoint, method: str) -> Facts:
    """Facts of every tensor that a `remake` step wrote."""
    have, facts = set(given.names()), []
    for name, role, reason in roles(made):
        tensor = made.tensor(name)
        if isinstance(tensor, QTensor):
            raise Corrupt(f"{method} left codes in {name}: a step that remakes a model writes floats")
        old = given.shape(name) if name in have else ()
        before = int(given.source.dtype(name).itemsize) * numel(old) if name in have else 0
        after = tensor.numel() * tensor.element_size()
        share = zeros(tensor) if tensor.ndim > 1 and role != "embedding" else 0.0
        facts.append({
            "name": name, "shape": list(tensor.shape), "role": role, "step": 0, "scheme": None,
            "reason": reason or f"float, by {method}", "before": before, "after": after, "notes": [], "error": None,
            "digest": digest(tensor), "remade": method, "sparsity": share,
        })  # fmt: skip
    return facts


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    total = 1
    for extent in shape:
        total *= extent
    return total


def opened(folder: Path, original: Checkpoint) -> Checkpoint:
    """The model of a stage, under the name, licence and origin of the one that the recipe started from."""
    found = Checkpoint.open(folder)
    origin = original.origin or original.name
    return replace(found, name=original.name, license=original.license, origin=origin, original=original)


def staged(progress: Progress, i: int, count: int, method: str) -> Progress:
    """The progress of one stage, named."""
    return lambda done, total, text: progress(done, total, f"{i + 1}/{count} {method}: {text}".rstrip(": "))
