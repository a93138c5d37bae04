"""Zeros in weights: wherry's methods and llm-compressor's, same calibration ids in, same ruler out.

    python bench/pruning.py --model smollm2 --peer-python PEER/bin/python
    python bench/pruning.py --table

Every row is cached in bench/results/pruning.json with its date and a hash of its inputs, and is measured again only
with --refresh or when that hash has changed. Models and data: bench/reference.py (WHERRY_DATA must be set). The ruler:
bench/measure.py. The peer's environment: bench/peers/llm_compressor.py. The rows of Deep Compression's line are made by
bench/deep_compression.py.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from reference import MODELS, fingerprint, prepare, windows
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pruning.json"
CODE = ("ops/solve.py", "ops/sparse.py", "engine/walk.py", "prune/magnitude.py", "prune/wanda.py", "prune/sparsegpt.py")
ENTRIES = (
    ("wherry", "magnitude", ""), ("wherry", "magnitude", "scope=global"), ("wherry", "wanda", ""),
    ("wherry", "sparsegpt", ""), ("wherry", "sparsegpt", "refit=0"), ("llm-compressor", "wanda", ""),
    ("llm-compressor", "sparsegpt", ""),
)  # fmt: skip
FREE = ("magnitude",)  # methods that see no data
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[])
    parser.add_argument("--share", nargs="+", default=["0.5", "2:4"], help="sparsity, or N:M")
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws")
    parser.add_argument("--only", nargs="+", help="'wherry sparsegpt', 'wherry sparsegpt refit=0', ...")
    parser.add_argument("--peer-python", help="python of the peer's environment")
    parser.add_argument("--cache", type=Path, default=HERE / "results" / "cache", help="where reference models lie")
    parser.add_argument("--refresh", action="store_true", help="measure again what is cached")
    parser.add_argument("--table", action="store_true", help="only print what is cached")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    a = arguments()
    if not a.table and not a.model:
        raise SystemExit("say --model, or --table to print the cached rows")
    wanted = [tuple((*label.split(" ", 2), "")[:3]) for label in a.only] if a.only else ENTRIES
    for name in [] if a.table else a.model:
        for seed in range(a.seeds):
            run(name, seed, [entry for entry in wanted if entry[0] == "wherry" or a.peer_python], a)
    show([row for row in rows() if "perplexity" in row])


def run(name: str, seed: int, entries: list[tuple[str, str, str]], a: argparse.Namespace) -> None:
    """Measure one model's missing rows, saving after each."""
    import measure

    a.cache.mkdir(parents=True, exist_ok=True)
    folder, float_ = prepare(name, a.cache), None
    calibration, evaluation = windows(name, folder, seed)
    tokens, out = a.cache / f"prune-{os.getpid()}.npy", a.cache / f"prune-{os.getpid()}"
    np.save(tokens, calibration)
    for share in a.share:
        for tool, method, options in entries:
            if (method in FREE and seed) or (":" in share and "global" in options):
                continue
            used = np.zeros(0) if method in FREE else calibration
            digest = fingerprint(folder / "model.safetensors", used, evaluation, f"{share} {options}")
            key = {"model": name, "tool": tool, "method": method, "options": options, "share": share}
            key |= {"seed": None if method in FREE else seed}
            if not a.refresh and any(matches(row, key | {"inputs": digest}) for row in rows()):
                continue
            float_ = float_ or measure.reference(folder, evaluation)
            shutil.rmtree(out, ignore_errors=True)
            make = ours if tool == "wherry" else theirs
            took = make(method, options, share, folder, out, tokens, a.peer_python)
            row = key | measure.compare(out, evaluation, float_) | {"zeros": zeros(out)} | took
            row |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "inputs": digest}
            row |= {"windows": list(calibration.shape), "evaluated": list(evaluation.shape)}
            row |= {"threads": os.environ.get("OMP_NUM_THREADS", "all")}
            save([*(old for old in rows() if not matches(old, key)), row])
            told = f"perplexity {row['perplexity']:.4f} (float {row['float_perplexity']:.4f}), KL {row['kl']:.4f}"
            print(f"{name} {share} {tool} {method} {options}: {told}, {row['cpu_seconds']} CPU s", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    tokens.unlink()


def knob(share: str) -> str:
    """The knob of a recipe that says how much."""
    return f"pattern={share}" if ":" in share else f"sparsity={share}"


def ours(method: str, options: str, share: str, folder: Path, out: Path, tokens: Path, _: str) -> Row:
    """Make `out` from `folder` with wherry; returns what it took."""
    from wherry import api, data, deliver

    start, cpu = time.perf_counter(), time.process_time()
    plan = api.plan(folder, f"{method}:{','.join(filter(None, (knob(share), options)))}")
    batches = []
    if plan.recipe.calibrated:
        batches = deliver.calibration(plan.checkpoint, data.read(tokens), *np.load(tokens).shape, seed=0)
    deliver.deliver(plan, out, (), batches, {"data": str(tokens)}, lambda result: None, api.quiet)
    took = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    names = ("wherry", "torch", "transformers")
    took["versions"] = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    return took | {"code": fingerprint(*(HERE.parent / "wherry" / file for file in CODE))}


def theirs(method: str, options: str, share: str, folder: Path, out: Path, tokens: Path, python: str) -> Row:
    """Make `out` from `folder` with llm-compressor; returns what it took."""
    driver = HERE / "peers" / "llm_compressor.py"
    how = ["--pattern", share] if ":" in share else ["--sparsity", share]
    words = [python, "-W", "ignore", driver, "--model", folder, "--tokens", tokens, "--out", out, "--method", method]
    line = [str(word) for word in (*words, *how, *options.replace("=", " --").split())]
    done = subprocess.run(["nice", "-n", "5", *line], capture_output=True, text=True)
    answers = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if not answers:
        raise SystemExit(f"the peer ended early: {shlex.join(line)}\n{done.stderr[-2000:]}")
    return json.loads(answers[-1]) | {"code": fingerprint(driver)}


def zeros(folder: Path) -> float:
    """Share of zeros among the weights of linear layers in the blocks."""
    from safetensors import safe_open

    none, total = 0, 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as found:
            for name in found.keys():
                if ".layers." in name and found.get_slice(name).get_shape()[1:]:
                    w = found.get_tensor(name)
                    none, total = none + int((w == 0).sum()), total + w.numel()
    return round(none / total, 6)


def matches(row: Row, key: Row) -> bool:
    """Whether a cached row is about the same run."""
    return all(row.get(name) == value for name, value in key.items())


def rows() -> list[Row]:
    """All cached rows."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def save(found: list[Row]) -> None:
    """Write all rows, one per line, in a stable order."""
    keys = ("model", "share", "tool", "method", "options", "seed")
    order = sorted(found, key=lambda row: [str(row.get(key, "")) for key in keys])
    fresh = RESULTS.with_suffix(".partial")
    fresh.write_text("[\n" + ",\n".join(json.dumps(row) for row in order) + "\n]\n")
    fresh.replace(RESULTS)


def show(found: list[Row]) -> None:
    """The table; ratio: perplexity above float, ours / the peer's with the same method, share and calibration ids."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in ("", "zeros", "perplexity", "KL", "ratio", "CPU s"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for model, share in dict.fromkeys((row["model"], row["share"]) for row in found):
        inside = [row for row in found if (row["model"], row["share"]) == (model, share)]
        table.add_row(f"[bold]{model} {share}[/bold]", "", f"{inside[0]['float_perplexity']:.3f}", "0")
        for row in sorted(inside, key=lambda r: -r["perplexity"]):
            same = {"method": row["method"], "seed": row["seed"]}
            peer = [other for other in inside if other["tool"] != "wherry" and matches(other, same)]
            above = [r["perplexity"] - r["float_perplexity"] for r in (row, *peer)]
            ratio = f"{above[0] / above[1]:.3f}" if peer and row["tool"] == "wherry" else ""
            label = " ".join(filter(None, (" ", row["tool"], row["method"], row["options"])))
            label += f" seed {row['seed']}" if row["seed"] else ""
            figures = (f"{row['zeros']:.3f}", f"{row['perplexity']:.3f}", f"{row['kl']:.4f}", ratio)
            table.add_row(label, *figures, str(row["cpu_seconds"]))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
