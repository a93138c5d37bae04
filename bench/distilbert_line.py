"""DistilBERT's line (40% smaller, 60% faster, 97% kept) with MiniLM-L6: what recipes of wherry leave of it.

    python -m bench.distilbert_line --work FOLDER [--only NAME ...]   compress, judge and time; rows are written
    python -m bench.distilbert_line --table

Each case is `wherry compress ... --recipe RECIPE --format onnx`, proved by compress itself, and judged and timed as the
exported file in ONNX Runtime with one thread. STS-B dev is cut in two by lot: what a recipe holds was chosen on the
first half, Spearman is that of pairs of the second that share no sentence with the first. OWN: the sentences of the
first half, without scores. FOREIGN: wikitext-2, SST-2 and the shipped texts. `kept`: the ratio to the dense model's
Spearman, with a paired 95% bootstrap interval. Speed: rounds over the same 64 judged sentences, all models in turn; the
median of the rounds' ratios to the dense model, by the clock and by CPU time (which other load moves less).
"""

import argparse
import datetime
import hashlib
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.structured_models import HERE, Minilm, pairs

RESULTS = HERE / "results" / "distilbert_line.json"
SAMPLES, SENTENCES, ROUNDS, BATCHES, RESAMPLES = 128, 64, 24, (1, 16), 2000
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """after: another case, whose checkpoint this recipe is for; else MiniLM itself. OWN, FOREIGN: see the top."""

    name: str
    recipe: str
    after: str = ""
    calibration: str = "OWN"


WIDE = "width:neurons=512 | vocabulary:tokens=18432"
DEEP = "depth:layers=4,importance=search | width:neurons=768 | vocabulary:tokens=18432"
CASES = (
    Case("width, not trained", WIDE),
    Case("width, healed", f"{WIDE} | heal:steps=120,batch=32,lr=0.0001,data=FOREIGN*0.5;OWN*0.5,options=length=64"),
    Case("width, healed, 8 bits", "rtn:scheme=W8A8_STATIC", "width, healed"),
    Case("depth and width, healed", f"{DEEP} | heal:steps=500,batch=32,lr=0.0003,data=FOREIGN,options=length=64",
         calibration="FOREIGN"),
)  # fmt: skip


def made(case: Case, model: Minilm) -> tuple[Path, float]:
    """The case's folder with its export, and the CPU seconds that it took; a finished one is used again."""
    from wherry import api

    source = folder(case.after, model) if case.after else model.path
    out, note = folder(case.name, model), model.work / f"{slug(case.name)}.seconds"
    if not out.exists():
        began = time.process_time()
        recipe = case.recipe.replace("OWN", str(model.own)).replace("FOREIGN", str(model.data))
        api.compress(
            source, out, recipe, formats=("onnx",), samples=SAMPLES, say=print,
            data_file=model.own if case.calibration == "OWN" else model.data,
            progress=lambda i, n, text: print(f"{case.name}: {i}/{n} {text}", flush=True),
        )  # fmt: skip
        note.write_text(str(round(time.process_time() - began)))
    return out, float(note.read_text())


def slug(name: str) -> str:
    """A case's name as a folder's."""
    return name.replace(",", "").replace(" ", "-")


def folder(name: str, model: Minilm) -> Path:
    """Where a case lies."""
    return model.work / slug(name)


def exported(model: Minilm) -> Path:
    """The dense model in ONNX."""
    from wherry import shelf
    from wherry.checkpoint import Checkpoint

    out = model.work / "dense-onnx"
    if not out.exists():
        part = model.work / f".dense-onnx.{os.getpid()}"
        part.mkdir()
        shelf.find("formats", "onnx").save(Checkpoint.open(model.path), part, lambda *_: None)
        part.rename(out)
    return out


def cosines(artifact: Path, choosing: bool) -> np.ndarray:
    """Cosine of each pair, in ONNX Runtime."""
    from wherry import shelf
    from wherry.artifact import Artifact
    from wherry.evaluate import similarity

    opened = Artifact.open(artifact)
    session = shelf.find("runtimes", "onnxruntime").load(opened, threads=1)
    found, _ = similarity.measure(session, opened.task, pairs(choosing))
    session.close()
    return found.cosine


def kept(ours: np.ndarray, dense: np.ndarray, choosing: bool) -> Row:
    """Spearman of both, their ratio and its interval: pairs drawn again, the same for both."""
    from scipy.stats import spearmanr

    scores = np.array([score for *_, score in pairs(choosing)])
    drawn = np.random.default_rng(0).integers(0, len(scores), (RESAMPLES, len(scores)))
    a, b = (float(spearmanr(x, scores).statistic) for x in (ours, dense))
    each = [spearmanr(ours[i], scores[i]).statistic / spearmanr(dense[i], scores[i]).statistic for i in drawn]
    low, high = (float(np.quantile(each, q)) for q in (0.025, 0.975))
    return {"spearman": a, "dense": b, "kept": a / b, "low": low, "high": high, "pairs": len(scores)}


def clock(artifacts: dict[str, Path]) -> dict[str, Row]:
    """Seconds of rounds over the sentences at each batch size, artifacts in turn: ratios to "dense"."""
    from wherry import shelf
    from wherry.artifact import Artifact

    texts = [text for a, b, _ in pairs(False) for text in (a, b)]
    texts = [texts[i] for i in np.random.default_rng(0).choice(len(texts), SENTENCES, replace=False)]
    opened = {name: Artifact.open(path) for name, path in artifacts.items()}
    sessions = {name: shelf.find("runtimes", "onnxruntime").load(a, threads=1) for name, a in opened.items()}
    found: dict[str, Row] = {name: {} for name in artifacts}
    for size in BATCHES:
        feeds = {n: [a.task.batch(texts[i : i + size]) for i in range(0, SENTENCES, size)] for n, a in opened.items()}
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in artifacts}
        for _ in range(ROUNDS + 2):
            for name, session in sessions.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for feed in feeds[name]:
                    session.predict(feed)
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        for name, rows in spent.items():
            both = list(zip(rows[2:], spent["dense"][2:], strict=True))
            ratio = [statistics.median(theirs[i] / ours[i] for ours, theirs in both) for i in (0, 1)]
            each = statistics.median(row[1] for row in rows[2:]) / SENTENCES * 1000
            found[name] |= {f"speedup {size}": ratio[0], f"cpu speedup {size}": ratio[1], f"cpu ms {size}": each}
    return found


def row(case: Case, model: Minilm) -> Row:
    """All but the clock of one case."""
    from wherry.checkpoint import Checkpoint
    from wherry.report import Report

    out, seconds = made(case, model)
    before, now = Checkpoint.open(model.path), Checkpoint.open(out)
    params = {name: sum(int(np.prod(c.shape(n))) for n in c.names()) for name, c in (("before", before), ("now", now))}
    verdict = Report.load(out / "report.json").get("verdict")
    return {
        "case": case.name, "recipe": case.recipe, "calibration": case.calibration, "after": case.after,
        "parameters": params["now"], "fewer": 1 - params["now"] / params["before"],
        "bytes": sum(f.stat().st_size for f in (out / "onnx").iterdir() if f.name.startswith("model.onnx")),
        "cpu seconds": seconds, "proof": f"{verdict.value}: {verdict.note}" if verdict else "",
        **{
            name: kept(cosines(out / "onnx", half), cosines(exported(model), half), half)
            for name, half in (("judged", False), ("chosen by", True))
        },
        "date": datetime.date.today().isoformat(),
        "hash": hashlib.sha256(repr((case, params)).encode()).hexdigest()[:16],
    }  # fmt: skip


def load() -> list[Row]:
    """Rows so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def store(rows: list[Row]) -> None:
    """Write the rows in the order of CASES."""
    order = [case.name for case in CASES]
    RESULTS.write_text(json.dumps(sorted(rows, key=lambda r: order.index(r["case"])), indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| case | fewer parameters | file | Spearman kept | faster, batch 1 | batch 16 | CPU seconds |",
             "|---|---:|---:|---|---:|---:|---:|"]  # fmt: skip
    for r in rows:
        j, speeds = r["judged"], [f"{r[f'speedup {size}']:.2f}" if f"speedup {size}" in r else "" for size in BATCHES]
        lines.append(
            f"| {r['case']} | {r['fewer']:.1%} | {r['bytes'] / 1e6:.1f} MB | {j['kept']:.1%} [{j['low']:.1%}, "
            f"{j['high']:.1%}] | {speeds[0]} | {speeds[1]} | {r['cpu seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table or args.work is None:
        print(table(load()))
        return
    import torch

    torch.set_num_threads(1)
    model = Minilm(args.work, None)
    if not all(source.exists() for source in model.sources):
        model.prepare()
    chosen = [case for case in CASES if not args.only or case.name in args.only]
    for case in chosen:
        rows = [r for r in load() if r["case"] != case.name]
        store([*rows, row(case, model)])
    files = {"dense": exported(model)} | {c.name: folder(c.name, model) / "onnx" for c in chosen}
    times = clock(files)
    store([r | times.get(r["case"], {}) | ({"dense cpu ms": times["dense"]["cpu ms 1"]} if r["case"] in times else {})
           for r in load()])  # fmt: skip
    print(table(load()))


if __name__ == "__main__":
    main()
