"""Every field: real models with real labels before and after int8, wherry beside the runtimes' own quantizers.

    export WHERRY_DATA=...
    python bench/fields/run.py --model resnet20 minilm --peer-python PEER/bin/python
    python bench/fields/run.py --model resnet20 --clock-only       # the clock again, all variants in one run
    python bench/fields/run.py --table                             # print what is cached; measures nothing

Models are built once below --cache. Every row is cached in bench/results/fields.json with its date and a hash of graph,
calibration and held-out data; it is measured again only with --refresh or when that hash has changed. README.md says
how it is kept equal and how to build the peer's environment.
"""

import argparse
import datetime
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import clock
import numpy as np
import quantizers
import score
from engines import ENGINES, available, load
from field import Feeds, Field, Run
from table import show
from work import multiplications

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "fields.json"
MODELS = ("resnet20", "efficientnet", "minilm", "sst2", "whisper", "silero", "seq2seq", "craft")
FLOAT = "float32"
# what OpenVINO is asked to run as well: its own quantizer's file, ours and the float one
BY_OPENVINO = (FLOAT, "wherry static", quantizers.NNCF)
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[])
    parser.add_argument("--only", nargs="+", choices=quantizers.NAMES, default=list(quantizers.NAMES))
    parser.add_argument("--cache", type=Path, default=Path("bench-cache"), help="where models and int8 files lie")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(filter(available, ENGINES)))
    parser.add_argument("--peer-python", help="python of NNCF's environment")
    parser.add_argument("--build-only", action="store_true", help="build the models and judge nothing")
    parser.add_argument("--clock-only", action="store_true", help="only the clock, of the int8 files in the cache")
    parser.add_argument("--no-clock", action="store_true", help="quality and size only")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20, help="clock budget per model, engine and count of threads")
    parser.add_argument("--peak", type=float, help="int8 operations of one core in 1e9/s: adds a column, share of it")
    parser.add_argument("--refresh", action="store_true", help="quantize and judge again what is cached")
    parser.add_argument("--table", action="store_true", help="only print what is cached")
    return parser.parse_args()


def main() -> None:
    """Build and measure what is missing, then print the table."""
    a = arguments()
    if not a.table and not a.model:
        raise SystemExit("say --model, or --table to print the cached rows")
    for name in [] if a.table else a.model:
        field: Field = importlib.import_module(name).FIELD
        folder = field.prepare(a.cache)
        if a.build_only:
            continue
        if not a.clock_only:
            quality(field, folder, a)
        if not a.no_clock:
            time(field, folder, a)
    show(rows(), a.model, a.peak)


def place(field: Field, cache: Path, variant: str) -> Path:
    """The folder that holds a variant's graphs."""
    return cache / field.name if variant == FLOAT else cache / "int8" / field.name / variant.replace(" ", "-")


def runner(field: Field, folder: Path, engine: str, threads: int = 1) -> Run:
    """All parts of a folder on an engine, as one function of (part, inputs)."""
    loaded = {part: load(engine, folder / f"{part}.onnx", threads) for part in field.parts}
    return lambda part, feeds: loaded[part](feeds)


def quality(field: Field, folder: Path, a: argparse.Namespace) -> None:
    """Rows of size and quality, of the float model and of every variant that is missing; saved one by one."""
    digest = fingerprint(folder)
    feeds: dict[str, list[Feeds]] = {}
    original: dict[str, np.ndarray] = {}
    for variant in (FLOAT, *a.only):
        if variant == quantizers.NNCF and not a.peer_python:
            print("nncf is left out: it needs --peer-python (README.md)", file=sys.stderr)
            continue
        engines = [e for e in a.engines if e == ENGINES[0] or variant in BY_OPENVINO]
        keys = [{"model": field.name, "variant": variant, "engine": engine} for engine in engines]
        done = [any(matches(row, key) and row["inputs"] == digest for row in rows()) for key in keys]
        units = {e: folder.with_name(f"{field.name}.{e}.{digest}.npy") for e in engines}
        if variant == FLOAT and all(file.exists() for file in units.values()) and all(done) and not a.refresh:
            original = {engine: np.load(file) for engine, file in units.items()}
            continue
        if variant != FLOAT and all(done) and not a.refresh:
            continue
        out, row = place(field, a.cache, variant), {}
        if variant != FLOAT:
            feeds = feeds or field.calibration(folder, runner(field, folder, ENGINES[0]))
            try:
                row = make(variant, field, folder, feeds, out, a.peer_python)
            except Exception as error:  # a tool that cannot do this model is a result, and stands in the row
                fail(keys[0], digest, error)
                continue
        for engine, key in zip(engines, keys, strict=True):
            try:
                judged = field.judge(folder, runner(field, out, engine))
            except Exception as error:  # so is a runtime that cannot run it
                fail(key, digest, error)
                continue
            if variant == FLOAT:
                original[engine] = judged
                np.save(units[engine], judged)
            figures = score.figure(judged, field.statistic).row("quality")
            if variant != FLOAT:
                figures |= score.loss(judged, original[ENGINES[0]], field.statistic).row("loss")
            bytes_ = sum((out / f"{part}.onnx").stat().st_size for part in field.parts)
            figures |= {"statistic": field.statistic, "judged": len(judged), "bytes": bytes_}
            keep(key | stamp(digest) | row | figures)
            told = f"{figures['quality']:.4f}" + (f", loss {figures['loss']:.4f}" if "loss" in figures else "")
            print(f"{field.name} {variant} {engine}: {told}, {bytes_:,} bytes", flush=True)


def fail(key: Row, digest: str, error: Exception) -> None:
    """Keep a row that says why there is no figure."""
    reason = re.sub(r"/\S*/", "", " ".join(f"{type(error).__name__}: {error}".split()))  # no paths of this machine
    reason = reason if len(reason) < 400 else f"{reason[:150]} ... {reason[-240:]}"
    keep(key | stamp(digest) | {"error": reason})
    print(f"{key['model']} {key['variant']} {key['engine']}: {reason}", flush=True)


def make(variant: str, field: Field, folder: Path, feeds: dict[str, list[Feeds]], out: Path, python: str | None) -> Row:
    """The variant's int8 files; how long they took and how many calibration inputs there were."""
    shutil.rmtree(out, ignore_errors=True)
    partial_ = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_, ignore_errors=True)
    seconds = sum(
        quantizers.timed(variant, folder / f"{part}.onnx", feeds[part], partial_, python) for part in field.parts
    )
    partial_.replace(out)
    return {"seconds": round(seconds, 1), "calibrated": sum(map(len, feeds.values()))}


def time(field: Field, folder: Path, a: argparse.Namespace) -> None:
    """All variants of the cache in turn, per engine and count of threads; the figures go into their rows."""
    example, started = field.example(folder), now()
    products = sum(multiplications(folder / f"{part}.onnx", feeds) for part, feeds in example.items())
    for engine in a.engines:
        kept = [row for row in rows() if matches(row, {"model": field.name, "engine": engine}) and "error" not in row]
        made = [row["variant"] for row in kept if place(field, a.cache, row["variant"]).exists()]
        for threads in a.threads:
            runs = {v: runner(field, place(field, a.cache, v), engine, threads) for v in made}
            calls = {v: partial(once, run, example) for v, run in runs.items()}
            seconds = clock.rounds(calls, a.rounds, a.seconds)
            for variant, taken in seconds.items():
                key = {"model": field.name, "variant": variant, "engine": engine}
                row = next(row for row in rows() if matches(row, key))
                medians = [round(float(value) * 1000, 4) for value in np.median(taken, axis=1)]
                figures = {"clock": started, "rounds_ms": medians, "runs": int(taken.size), **clock.latency(taken)}
                keep(row | {f"threads_{threads}": figures, "multiplications": products})


def once(run: Run, example: dict[str, Feeds]) -> None:
    """Every part once."""
    for part, feeds in example.items():
        run(part, feeds)


def fingerprint(folder: Path) -> str:
    """Hash of the folder's graphs, task and data."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\n" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def stamp(digest: str) -> Row:
    """Date, inputs and versions of a row."""
    names = ("wherry", "onnxruntime", "onnx")
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    return {"date": now()[:10], "inputs": digest, "versions": versions, "load": round(os.getloadavg()[0], 1)}


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def matches(row: Row, key: Row) -> bool:
    """Whether a cached row is about the same variant."""
    return all(row.get(name) == value for name, value in key.items())


def rows() -> list[Row]:
    """All cached rows."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def keep(row: Row) -> None:
    """Put a row in the place of the one about the same variant; one row per line, in a stable order."""
    key = {name: row[name] for name in ("model", "variant", "engine")}
    order = (FLOAT, *quantizers.NAMES)
    found = [*(old for old in rows() if not matches(old, key)), row]
    found.sort(key=lambda r: (MODELS.index(r["model"]), r["engine"], order.index(r["variant"])))
    fresh = RESULTS.with_suffix(".partial")
    fresh.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    fresh.replace(RESULTS)


if __name__ == "__main__":
    main()
