"""Healing: how much of what compression or pruning costs comes back in a stated number of steps, on foreign text.

    python -m bench.healing                       # all ways that are not in bench/results/healing.json yet
    python -m bench.healing --only w2 depth --steps 150
    python -m bench.healing --table

Model: the project's own decoder (bench/decoder/model), which is its own teacher. It is healed on its training text
(the Bible and Webster's dictionary, without the parts that bench/decoder/text.py keeps apart), and judged on text
from another source than any training: Shakespeare (WHERRY_DATA/tinyshakespeare.txt), and on
the parts kept apart (Acts, letter J).

    w2       linears at 2 bits, groups of 64, by gptq, before and after `kl | qat` from these codes; then `rtn`
             finds the codes again
    w2 rtn   the same by rtn; trained from the float weights, as peers do
    ternary  the same at -1, 0, 1 (W1.58A16); binary: at -1, 1 (W1A16)
    depth    one of four layers dropped, the one whose loss hurts least on Romans, before and after `kl`
    float    the float model in the same steps, by `ce`: what more training alone does on these texts

Perplexity on foreign text may fall when weights are rounded, by chance; KL(float || model) on it, in nats per token,
cannot, and says how much of the model came back. A peer gets the same samples in the
same order (bench/peers). `top` is the number of the teacher's classes that are cached; 0: the
teacher is in memory. Seconds are of this process's CPU.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.decoder import text
from wherry import api
from wherry.checkpoint import Checkpoint
from wherry.train import order, samples, start
from wherry.train.job import Job
from wherry.train.loop import run
from wherry.train.text import Cut

HERE = Path(__file__).parent
MODEL = HERE / "decoder" / "model"
RESULTS = HERE / "results" / "healing.json"
GROUP, LENGTH, BATCH, WINDOWS = 64, 256, 4, 12
SCHEMES = {"w2": "W2A16_ASYM", "ternary": "W1.58A16", "binary": "W1A16"}
WAYS = ("w2 rtn", "w2", "w2 top=64", "depth", "depth top=64", "ternary", "binary", "float")
Row = dict[str, Any]


def training(folder: Path) -> str:
    """The decoder's own training text as two files, and the job's name for both."""
    wanted = [folder / f"{name}.txt" for name in ("bible", "dictionary")]
    parts = {} if all(file.exists() for file in wanted) else text.corpus(folder, 6, None)
    for name in [name for name in ("bible", "dictionary") if name in parts]:
        text.write(folder / f"{name}.txt", "\n\n".join(parts[name]) + "\n")
    return f"{folder / 'bible.txt'};{folder / 'dictionary.txt'}"


def texts() -> dict[str, Path]:
    """What is judged on."""
    found = {"acts": HERE / "decoder" / "heldout" / "held_out_book.txt",
             "letter J": HERE / "decoder" / "heldout" / "held_out_letter.txt"}  # fmt: skip
    if os.environ.get("WHERRY_DATA"):
        found["shakespeare"] = Path(os.environ["WHERRY_DATA"], "tinyshakespeare.txt")
    return found


@cache
def whole() -> torch.nn.Module:
    """The float model."""
    return Checkpoint.open(MODEL).module()


@torch.no_grad()
def judged(folder: Path, files: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Perplexity and KL of a model's folder on each text: WINDOWS windows of LENGTH tokens, evenly spread."""
    checkpoint = Checkpoint.open(folder)
    module, teacher = checkpoint.module(), whole()
    out: dict[str, dict[str, float]] = {"perplexity": {}, "kl": {}}
    for name, file in files.items():
        ids = torch.tensor(checkpoint.task.encode(file.read_text(encoding="utf8")))
        rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        rows = rows[torch.linspace(0, len(rows) - 1, min(WINDOWS, len(rows))).long()]
        total = far = 0.0
        for part in rows.split(16):
            log_q = module(part).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            log_p = teacher(part).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            total += float(torch.nn.functional.nll_loss(log_q, part[:, 1:].flatten(), reduction="sum"))
            far += float((log_p.exp() * (log_p - log_q)).sum())
        out["perplexity"][name] = math.exp(total / rows[:, 1:].numel())
        out["kl"][name] = far / rows[:, 1:].numel()
    return out


def drop_a_layer(out: Path) -> list[int]:
    """The decoder without the layer that is missed least on Romans, as a folder. Returns the layers that stay."""
    teacher, best = Checkpoint.open(MODEL), (math.inf, [0])
    of = start.layers_of(teacher)
    for gone in range(of):
        layers = [i for i in range(of) if i != gone]
        with tempfile.TemporaryDirectory() as folder:
            start.write(teacher, layers, Path(folder))
            romans = {"romans": HERE / "decoder" / "heldout" / "search_book.txt"}
            found = judged(Path(folder), romans)["perplexity"]["romans"]
        best = min(best, (found, layers))
    out.mkdir()
    start.write(teacher, best[1], out)
    return best[1]


def heal(way: str, steps: int, rate: float, data: str, folder: Path) -> Row:
    """One row: perplexities before, after, and after the result was compressed again by rtn."""
    kind, _, knob = way.partition(" top=")
    kind, _, method = kind.partition(" ")
    before, after, files = folder / "before", folder / "after", texts()
    row: Row = {"way": way, "steps": steps, "tokens": steps * BATCH * LENGTH, "learning_rate": rate}
    began = time.process_time()
    recipe = "kl"
    if kind in SCHEMES:
        scheme = f"scheme={SCHEMES[kind]},group_size={GROUP}"
        api.compress(str(MODEL), before, recipe=f"{method or 'gptq'}:{scheme}", samples=32, length=LENGTH)
        recipe = f"kl | qat:{scheme}" if method else "kl | qat"
    elif kind == "depth":
        row["layers"] = drop_a_layer(before)
    else:
        shutil.copytree(MODEL, before)
        recipe = "ce"
    row["seconds to compress"] = round(time.process_time() - began, 1)
    row["float"], row["before"] = judged(MODEL, files), judged(before, files)
    began = time.process_time()
    job = Job(
        model=str(MODEL if method else before), teacher=str(MODEL) if "kl" in recipe else "", out=str(after),
        data=data, recipe=recipe,
        steps=steps, batch=BATCH, length=LENGTH, learning_rate=rate, warmup=max(1, steps // 20), threads=1,
        top=int(knob or 0), cache=str(Path(data.split(";")[0]).parent / "tokens"),
    )  # fmt: skip
    result = run(job)
    row |= {"recipe": recipe, "seconds": round(time.process_time() - began, 1), "loss": result["losses"][-1]}
    row["after"] = judged(after, files)
    if kind in SCHEMES:
        api.compress(str(after), folder / "again", recipe=f"rtn:{scheme}")
        row["compressed again"] = judged(folder / "again", files)
        row["bytes"] = sum(f.stat().st_size for f in (folder / "again").glob("*.safetensors"))
    if knob:
        kept = sum(f.stat().st_size for f in Path(job.cache).rglob("part-*.bin"))
        row["cache bytes per token"] = kept / row["tokens"]
        shutil.rmtree(Path(job.cache) / "teacher")
    if kind != "float":
        row["back"] = {what: {n: share(row, what, n) for n in files} for what in ("perplexity", "kl")}
    return row


PEERS = {"torchao": ("w2 rtn", "torchao_qat.py"), "trl": ("depth", "trl_gkd.py")}


def peer(tool: str, python: str, steps: int, rate: float, data: str, folder: Path) -> Row:
    """One row of a peer: the same start, the same samples in the same order, its own training; judged as ours."""
    way, driver = PEERS[tool]
    before, after, files = folder / "before", folder / "after", texts()
    rows_ = folder / "rows.npy"
    opened = samples.opened(data, Checkpoint.open(MODEL).task, Cut(LENGTH), folder / "tokens")
    batches = [opened.batch(order.mixed(i, BATCH, opened.sizes, opened.weights, 0)) for i in range(steps)]
    np.save(rows_, np.concatenate([np.concatenate([b["input_ids"], b["targets"][:, -1:]], 1) for b in batches]))
    if tool == "trl":
        drop_a_layer(before)
        models = [str(before), str(MODEL)]
    else:
        api.compress(str(MODEL), before, recipe=f"rtn:scheme={SCHEMES['w2']},group_size={GROUP}")
        models = [str(MODEL)]
    command = [python, str(HERE / "peers" / driver), *models, str(rows_), str(after)]
    done = subprocess.run([*command, "--rate", str(rate), "--batch", str(BATCH)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    row = {"tool": tool, "way": way, "steps": steps, "tokens": steps * BATCH * LENGTH, "learning_rate": rate} | told
    row |= {"float": judged(MODEL, files), "before": judged(before, files), "after": judged(after, files)}
    row["back"] = {what: {n: share(row, what, n) for n in files} for what in ("perplexity", "kl")}
    return row


def share(row: Row, what: str, name: str) -> float:
    """Of what was lost, how much came back."""
    first, last, best = (row[when][what][name] for when in ("before", "after", "float"))
    return (first - last) / (first - best)


def rows() -> list[Row]:
    """What was measured before."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def table(found: list[Row]) -> Table:
    """All rows."""
    out = Table("tool", "way", "steps", "CPU s", "text", "perplexity: float", "before", "after", "back",
                "KL before", "after", "back")  # fmt: skip
    for row in found:
        for name in row["float"]["perplexity"]:
            line = [row.get("tool", "wherry"), row["way"], str(row["steps"]), f"{row['seconds']:.0f}", name]
            line += [f"{row[when]['perplexity'][name]:.2f}" for when in ("float", "before", "after")]
            line += [f"{row['back']['perplexity'][name]:.0%}" if "back" in row else ""]
            line += [f"{row[when]['kl'][name]:.4f}" for when in ("before", "after")]
            out.add_row(*line, f"{row['back']['kl'][name]:.0%}" if "back" in row else "")
    return out


def main() -> None:
    """Measure what is wanted, each row written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(WAYS), help="ways, such as w2 or 'w2 top=64'")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--table", action="store_true", help="print the rows that are there; measure nothing")
    parser.add_argument("--peer", choices=PEERS, help="measure a peer in place of our ways")
    parser.add_argument("--peer-python", default="python", help="of the peer's environment: see bench/peers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for way in [] if args.table else [PEERS[args.peer][0]] if args.peer else args.only:
        with tempfile.TemporaryDirectory() as folder:
            data = training(Path(os.environ.get("WHERRY_CACHE", folder), "decoder"))
            if args.peer:
                row = peer(args.peer, args.peer_python, args.steps, args.rate, data, Path(folder))
            else:
                row = heal(way, args.steps, args.rate, data, Path(folder))
        stamp = hashlib.sha256(json.dumps([way, args.steps, args.rate, data_hash()]).encode()).hexdigest()[:16]
        row |= {"date": datetime.date.today().isoformat(), "inputs": stamp, "torch": torch.__version__}
        key = ("way", "steps", "learning_rate", "tool")
        kept = [old for old in rows() if [old.get(k) for k in key] != [row.get(k) for k in key]]
        RESULTS.write_text(json.dumps([*kept, row], indent=1) + "\n")
    Console().print(table(rows()))


def data_hash() -> str:
    """Of the model and of what is judged on."""
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes())
    for file in texts().values():
        digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
