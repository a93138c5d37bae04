"""Perplexity and KL at equal bits: wherry's methods and its peers', same tokens in, same ruler out.

    python bench/quality.py --model smollm2 --scheme W3A16_ASYM --seeds 5 --peer-python PEER/bin/python
    python bench/quality.py --table

Every row is cached in bench/results/quality.json with its date and a hash of its inputs (weights, calibration ids,
evaluation ids, options) and is measured again only with --refresh or when that hash has changed; a star in the table
marks rows of ours made by other code than what is here. Models and data: bench/reference.py (WHERRY_DATA must be set).
The ruler: bench/measure.py, on the judging windows (the source that calibrated) and on a foreign source. How to build
the peer's environment: bench/peers/*.py; without --peer-python its cached rows are used and the pip lines are printed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import encoder
import numpy as np
from reference import MODELS, fingerprint, foreign, judging, own, prepare, windows
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.json"
CODE = ("ops/grid.py", "ops/solve.py", "ops/latent.py", "engine/walk.py", "engine/stream.py", "engine/tune.py")
PARTS = {"best": ("gptaq", "rounding", "tune")}  # methods whose code is that of others
DRIVERS = {  # below bench/peers
    "llm-compressor": "llm_compressor.py", "auto-round": "autoround.py", "gptqmodel": "gptqmodel_gptq.py",
    "hqq": "hqq_free.py",
}  # fmt: skip
FREE = ("rtn", "hqq")  # methods that see no data
PEER = """A peer's rows need an environment of its own (about 1.5 GB):
    python3.11 -m venv PEER && echo torch==2.13.0 > constraints.txt
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install llmcompressor==0.14.0.1 -c constraints.txt
    or auto-round==0.16.1, gptqmodel==7.6.0, hqq==0.2.8.post1
then: --peer-python PEER/bin/python, with --only for the rows of that peer"""
Row = dict[str, Any]
SEEN = {"foreign_": ("perplexity", "float_perplexity", "kl", "kl_ci", "top1")}  # what a row keeps of other windows
SEEN["own_"] = (*SEEN["foreign_"], "nll", "float_nll")


@dataclass(frozen=True)
class Entry:
    """One way to compress: tool, method (or steps of a recipe, joined by +) and its options as text."""

    tool: str
    method: str
    options: str = ""

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.tool} {self.method}" + (f" {self.options}" if self.options else "")


ENTRIES = (
    Entry("wherry", "rtn", "portable=false"),
    Entry("wherry", "rtn"),
    Entry("wherry", "gptq", "portable=false"),
    Entry("wherry", "gptq"),
    Entry("wherry", "gptaq"),
    Entry("wherry", "awq"),
    Entry("wherry", "hqq"),
    Entry("wherry", "rounding"),
    Entry("wherry", "best"),
    Entry("wherry", "awq+gptq"),
    Entry("wherry", "rotation+gptq"),
    Entry("wherry", "gptq+lowrank:rank=8"),
    Entry("wherry", "gptq+tune"),
    Entry("auto-round", "rounding"),
    Entry("gptqmodel", "gptq"),
    Entry("gptqmodel", "gptq", "mse=2.4"),
    Entry("gptqmodel", "gptaq"),
    Entry("hqq", "hqq"),
    Entry("hqq", "hqq", "axis=0"),
    Entry("llama.cpp", "quantize"),
    Entry("llama.cpp", "quantize", "imatrix=true"),
    Entry("llm-compressor", "rtn"),
    Entry("llm-compressor", "gptq"),
    Entry("llm-compressor", "gptq", "observer=imatrix_mse"),
    Entry("llm-compressor", "awq"),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[])
    parser.add_argument("--scheme", nargs="+", default=["W4A16_ASYM", "W3A16_ASYM"])
    parser.add_argument("--group-size", type=int, help="default: the model's usual one")
    parser.add_argument("--seeds", type=int, default=5, help="calibration draws; rtn needs none")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="labels to run: 'wherry gptq' 'llm-compressor gptq damp=0.1' ...")
    parser.add_argument("--peer-python", help="python of the peer's environment")
    parser.add_argument("--cache", type=Path, default=HERE / "results" / "cache", help="where reference models lie")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are read and written")
    parser.add_argument("--refresh", action="store_true", help="measure again what is cached")
    parser.add_argument("--table", action="store_true", help="only print what is cached")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    global RESULTS
    a = arguments()
    RESULTS = a.results.absolute()
    if not a.table and not a.model:
        raise SystemExit("say --model, or --table to print the cached rows")
    entries = [Entry(*label.split(" ", 2)) for label in a.only] if a.only else list(ENTRIES)
    if not a.table and not a.peer_python and any(entry.tool in DRIVERS for entry in entries):
        print(PEER, file=sys.stderr)
        entries = [entry for entry in entries if entry.tool not in DRIVERS]
    for name in [] if a.table else a.model:
        size = a.group_size or MODELS[name].group_size
        run(name, a.scheme, size, entries, range(a.first_seed, a.first_seed + a.seeds), a)
    show(rows())


def run(name: str, schemes: list[str], size: int, entries: list[Entry], seeds: range, a: argparse.Namespace) -> None:
    """Measure one model's missing rows, one after the other, saving after each."""
    a.cache.mkdir(parents=True, exist_ok=True)
    folder, float_, peer = prepare(name, a.cache), None, Peer(a.peer_python)
    evaluation = judging(name, folder)
    samples = [own(folder)] if name == "decoder" else []
    for seed in seeds:
        calibration = windows(name, folder, seed)[0]
        for scheme in schemes:
            for entry in entries:
                if entry.tool == "llama.cpp" and "_K" not in scheme:
                    continue
                free = entry.method in FREE
                if free and seed != seeds[0]:
                    continue
                used = np.zeros(0) if free else calibration
                digest = fingerprint(folder / "model.safetensors", used, evaluation, *samples, entry.options)
                key = {"model": name, "tool": entry.tool, "method": entry.method, "options": entry.options}
                key |= {"scheme": scheme, "group_size": size, "seed": None if free else seed}
                if not a.refresh and any(matches(row, key) and row["inputs"] == digest for row in rows()):
                    continue
                if float_ is None:
                    float_ = Ruler(name, folder, evaluation, *samples)
                out = a.cache / f"out-{os.getpid()}"
                np.save(out.with_suffix(".npy"), calibration)
                job = (entry, folder, out, scheme, size, out.with_suffix(".npy"))
                tool = {"wherry": wherry, "llama.cpp": llama_cpp}.get(entry.tool, peer.compress)
                took = tool(*job)
                row = key | float_.compare(out) | took
                row |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "inputs": digest}
                row |= {"threads": os.environ.get("OMP_NUM_THREADS", "all")}
                row |= {"windows": list(calibration.shape), "evaluated": list(evaluation.shape)}
                save([*(old for old in rows() if not matches(old, key)), row])
                shutil.rmtree(out)
                told = ", ".join(f"{k} {row[k]:.4f}" for k in ("perplexity", "kl", "kept", "distance") if k in row)
                print(
                    f"{name} {scheme} g{size} {entry.label} seed {key['seed']}: {told}, {took['seconds']} s", flush=True
                )


class Ruler:
    """The float model's side of every comparison, on the judging windows, a foreign text, and its own samples."""

    def __init__(self, name: str, folder: Path, evaluation: np.ndarray, *samples: np.ndarray) -> None:
        import measure

        self.name = name
        if name == "minilm":
            self.embedded = encoder.embed(encoder.load(folder), folder)
            return
        self.windows = dict(zip(("", "foreign_", "own_"), (evaluation, foreign(name, folder), *samples), strict=False))
        self.float = {what: measure.reference(folder, ids) for what, ids in self.windows.items()}

    def compare(self, out: Path) -> Row:
        """What the ruler of the model says of a result."""
        import measure

        if self.name == "minilm":
            size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            return encoder.compare(encoder.load(out), out, self.embedded, size)
        row: Row = {}
        for what, ids in self.windows.items():
            found = measure.compare(out, ids, self.float[what])
            row |= found if not what else {what + name: found[name] for name in SEEN[what]}
        return row


def wherry(entry: Entry, folder: Path, out: Path, scheme: str, size: int, tokens: Path) -> Row:
    """Make `out` from `folder` with wherry; returns what it took."""
    from wherry import api, data, deliver
    from wherry.recipe import build
    from wherry.scheme import Scheme

    extra = "".join(f",{item}" for item in entry.options.split(",") if item)
    group = "" if Scheme.parse(scheme).fixed else f",group_size={size}"
    steps = entry.method.split("+")  # the last that gives codes has the scheme
    kinds = [build(step.split(":")[0], {}) for step in steps]
    solving = [i for i, kind in enumerate(kinds) if kind.solves or hasattr(kind, "recipe")]
    steps[solving[-1]] += f":scheme={scheme}{group},embedding=keep{extra}"
    recipe = " | ".join(steps)
    start, cpu = time.perf_counter(), time.process_time()
    plan, batches = api.plan(folder, recipe), []
    if plan.recipe.calibrated:
        table = np.load(tokens)
        if table.min() < 0:
            batches = encoder.batches(table)
        else:
            batches = deliver.calibration(plan.checkpoint, data.read(tokens), *table.shape, seed=0)
    deliver.deliver(plan, out, (), batches, {"data": str(tokens)}, lambda result: None, api.quiet)
    took = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    names = ("wherry", "torch", "transformers", "compressed-tensors")
    return took | {"versions": [f"{name}=={importlib.metadata.version(name)}" for name in names], "code": code(entry)}


def code(entry: Entry) -> str:
    """Hash of the files of ours that make a row."""
    methods = [part.split(":")[0] for part in entry.method.split("+")]
    files = [*CODE, *(f"quant/{part}.py" for name in methods for part in (name, *PARTS.get(name, ())))]
    return fingerprint(*(HERE.parent / "wherry" / file for file in files))


def llama_cpp(entry: Entry, folder: Path, out: Path, scheme: str, size: int, tokens: Path) -> Row:
    """Make `out` from `folder` with llama.cpp's quantizer, for the types that it has; returns what it took."""
    sys.path.insert(0, str(HERE / "peers"))
    import llama_cpp as driver

    found = driver.compress(folder, out, scheme, np.load(tokens) if entry.options == "imatrix=true" else None)
    return found | {"versions": [f"xllamacpp=={importlib.metadata.version('xllamacpp')}"]}


class Peer:
    """A peer in its own environment: started at its first job, then fed line by line."""

    def __init__(self, python: str | None) -> None:
        self.python, self.process = python, None

    def compress(self, entry: Entry, folder: Path, out: Path, scheme: str, size: int, tokens: Path) -> Row:
        """Make `out` from `folder`; returns what it took."""
        driver = HERE / "peers" / DRIVERS[entry.tool]
        if self.process is None:
            python, place = Path(str(self.python)).absolute(), tempfile.mkdtemp()  # some leave logs where they stand
            words = ["nice", "-n", "5", python, "-W", "ignore", driver.resolve(), "--serve"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([*map(str, words)], text=True, bufsize=1, cwd=place, **pipes)
        knobs = [word for item in entry.options.split(",") if item for word in f"--{item}".split("=")]
        line = ["--model", folder.resolve(), "--tokens", tokens.resolve(), "--out", out.resolve()]
        line += ["--method", entry.method, "--scheme", scheme]
        print(shlex.join(map(str, [*line, "--group-size", size, *knobs])), file=self.process.stdin, flush=True)
        for answer in self.process.stdout:
            if answer.startswith("{"):
                return json.loads(answer) | {"code": fingerprint(driver)}
        raise SystemExit(f"the peer ended early: run {driver} by hand with the arguments {line}")


def matches(row: Row, key: Row) -> bool:
    """Whether a cached row is about the same run."""
    return all(row.get(name) == value for name, value in key.items())


def rows() -> list[Row]:
    """All cached rows."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def save(found: list[Row]) -> None:
    """Write all rows, one per line, in a stable order."""
    order = sorted(found, key=lambda r: (r["model"], r["scheme"], r["tool"], r["method"], r["options"], r["seed"] or 0))
    fresh = RESULTS.with_suffix(".partial")
    fresh.write_text("[\n" + ",\n".join(json.dumps(row) for row in order) + "\n]\n")
    fresh.replace(RESULTS)


def groups(found: list[Row]) -> Iterator[tuple[tuple[str, str, int], dict[Entry, list[Row]]]]:
    """Rows by (model, scheme, group_size), then by entry."""
    settings = {(row["model"], row["scheme"], row["group_size"]): None for row in found}
    for setting in settings:
        inside = [row for row in found if (row["model"], row["scheme"], row["group_size"]) == setting]
        by: dict[Entry, list[Row]] = {}
        for row in inside:
            by.setdefault(Entry(row["tool"], row["method"], row["options"]), []).append(row)
        yield setting, by


def show(found: list[Row]) -> None:
    """The table: medians over seeds; ratios to the peer's best of the same method, over the seeds that both have."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in ("", "seeds", "bits", "perplexity", "KL", "foreign", "ratio", "95%", "spread", "KL ratio"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    models = [row for row in found if "kl" in row]
    samples = [row | {name: row[f"own_{name}"] for name in SEEN["own_"]} for row in models if "own_kl" in row]
    samples = [row | {"model": f"{row['model']}, own samples"} for row in samples]
    for (model, scheme, size), by in groups([*models, *samples]):
        every = [run for runs in by.values() for run in runs]
        float_ = max(every, key=lambda run: run["evaluated"])["float_perplexity"]
        table.add_row(f"[bold]{model} {scheme} g{size}[/bold]", "", "16", f"{float_:.3f}", "0", "0")
        for entry, runs in sorted(by.items(), key=lambda item: (item[0].method, item[0].tool, item[0].options)):
            bits, perplexity, kl = (statistics.median(run[k] for run in runs) for k in ("bits", "perplexity", "kl"))
            far = [run["foreign_kl"] for run in runs if "foreign_kl" in run]
            figures = [str(len(runs)), f"{bits:.3f}", f"{perplexity:.3f}", f"{kl:.4f}"]
            figures.append(f"{statistics.median(far):.4f}" if far else "")
            same = {e: [run for run in each if same_windows(run, runs[0])] for e, each in by.items()}
            peer = best(same, entry.method)
            if entry.tool == "wherry" and {run["seed"] for run in runs} & {run["seed"] for run in peer}:
                more, kls = ratios(runs, peer, increase), ratios(runs, peer, lambda run: run["kl"])
                spread = f"{min(more):.3f}-{max(more):.3f}" if len(more) > 1 else ""
                figures += [f"{statistics.median(more):.3f}", paired(runs, peer), spread]
                figures.append(f"{statistics.median(kls):.3f}")
            old = entry.tool == "wherry" and any(run.get("code") != code(entry) for run in runs)
            old = old or any(run["float_perplexity"] != float_ for run in runs)
            table.add_row(f"  {entry.label.replace('observer=', '')}{' *' if old else ''}", *figures)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(encoders([row for row in found if "distance" in row]))
    console.print(
        "ratio: perplexity above float, ours / the peer's best setting of the same method, median over\n"
        "calibration seeds; 95%: bootstrap over evaluation windows, the same draws for both; spread: least to most.\n"
        "bits: file bytes * 8 / parameters, all included. KL in nats per token, medians over seeds; foreign: KL on\n"
        "Shakespeare, of which no calibration window is. *: made by other code than what is here, or judged on fewer\n"
        "windows."
    )


def same_windows(row: Row, other: Row) -> bool:
    """Whether two rows were judged on the same windows."""
    return bool(row["evaluated"] == other["evaluated"] and row["float_perplexity"] == other["float_perplexity"])


def paired(ours: list[Row], theirs: list[Row], draws: int = 2000) -> str:
    """95% interval of the median ratio of perplexity increases, windows drawn again and the same for both."""
    by_seed = {row["seed"]: row for row in theirs}
    pairs = [(row, by_seed[row["seed"]]) for row in ours if row["seed"] in by_seed]
    lists = [[np.array(row.get(k, [])) for row in pair for k in ("nll", "float_nll")] for pair in pairs]
    if len({len(values) for four in lists for values in four}) != 1 or not len(lists[0][1]):
        return ""  # a row of before parts were kept
    drawn = np.random.default_rng(0).integers(0, len(lists[0][0]), (draws, len(lists[0][0])))
    means = [[np.exp(values[drawn].mean(1)) for values in four] for four in lists]
    found = np.median([(a - f) / (b - g) for a, f, b, g in means], axis=0)
    return "{:.3f}-{:.3f}".format(*np.quantile(found, (0.025, 0.975)))


def encoders(found: list[Row]) -> Table:
    """The encoder's rows: medians over seeds, and the interval of the first."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in ("", "seeds", "bits", "Spearman", "kept", "95%", "1 - cosine"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for (model, scheme, size), by in groups(found):
        float_ = f"{found[0]['float_spearman']:.4f}"
        table.add_row(f"[bold]{model} {scheme} g{size}[/bold]", "", "16", float_, "1", "", "0")
        for entry, runs in sorted(by.items(), key=lambda item: (item[0].method, item[0].tool, item[0].options)):
            names = ("bits", "spearman", "kept", "distance")
            bits, rank, kept, far = (statistics.median(run[k] for run in runs) for k in names)
            ends = f"{runs[0]['kept_low']:.4f}-{runs[0]['kept_high']:.4f}"
            figures = [str(len(runs)), f"{bits:.3f}", f"{rank:.4f}", f"{kept:.4f}", ends, f"{far:.5f}"]
            table.add_row(f"  {entry.label}", *figures)
    return table


def best(by: dict[Entry, list[Row]], method: str) -> list[Row]:
    """The peer's runs of a method with the most seeds, then the lowest median perplexity: its best setting."""
    peers = [runs for entry, runs in by.items() if runs and entry.tool != "wherry" and entry.method == method]
    return min(peers, key=lambda runs: (-len(runs), statistics.median(r["perplexity"] for r in runs)), default=[])


def increase(row: Row) -> float:
    """Perplexity above the float model's."""
    return float(row["perplexity"] - row["float_perplexity"])


def ratios(ours: list[Row], theirs: list[Row], figure: Callable[[Row], float]) -> list[float]:
    """Our figure over theirs, for each seed that both have."""
    by_seed = {row["seed"]: figure(row) for row in theirs}
    return [figure(row) / by_seed[row["seed"]] for row in ours if row["seed"] in by_seed]


if __name__ == "__main__":
    main()
