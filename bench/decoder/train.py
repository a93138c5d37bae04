"""From an empty folder to a small trained decoder and its model card, in one command.

    python -m bench.decoder.train                       # everything, into bench/decoder
    python -m bench.decoder.train --out FOLDER --threads 1
    python -m bench.decoder.train --check-repro 20      # train 20 steps twice, and resumed: the same bits?
    python -m bench.decoder.train --prepare             # only what `wherry train` begins with, and its command

text.py gets and cleans the text, start.py makes the untrained model and its tokens, wherry trains it (`wherry.train`),
card.py measures and writes the card. Kill it at any time and run the same command: it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: TID253

from wherry.board import bar
from wherry.errors import Diverged, Error
from wherry.report import Report
from wherry.train import loop
from wherry.train.job import Job
from wherry.train.watch import lines

from . import start, text

console = Console()


def fingerprint(folder: Path) -> str:
    """SHA-256 over all weights of a model's folder in fp32, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


class Stopped(Exception):
    """A run was ended half-way, to be resumed."""


def check_repro(job: Job, steps: int) -> dict[str, Any]:
    """Train `steps` steps twice, then with a stop and a resume half-way; compare losses and weights bit for bit."""
    half = steps // 2

    def stop(done: int, total: int, text: str) -> None:
        if done > half:
            raise Stopped

    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, progress: loop.Progress = loop.quiet) -> tuple[str, list[float]]:
            out = Path(folder) / name
            mine = replace(job, out=str(out), steps=steps, held_out="", eval_every=0, overlap=0, save_every=half)
            losses = loop.run(mine, progress)["losses"]
            return fingerprint(out), losses

        first, second = run("a"), run("b")
        try:
            run("c", stop)
        except Stopped:
            resumed = run("c")
    if not first == second == resumed:
        raise Diverged(
            f"Not reproducible over {steps} steps: {first[0][:12]}, again {second[0][:12]}, resumed "
            f"{resumed[0][:12]}.\nUse the same --threads on an idle machine; report it if it persists."
        )
    console.print(f"{steps} steps, again, and resumed at {half}: the same bits ({first[0][:16]}).")
    return {"steps": steps, "resumed_at": half, "weights_sha256": first[0], "equal": True}


def told(job: Job) -> dict[str, Any]:
    """What the card says of a finished run, from the files beside its model."""
    out = Path(job.out)
    done = Job.load(out / "job.json")
    rows = lines(out / "metrics.jsonl")
    names = [f"bits per byte {Path(part).name}" for part in done.held_out.split(";")]
    spent = {row.what: row.value for row in Report.load(out / "report.json")}
    return {
        "train": [row["loss"] for row in rows if "loss" in row],
        "search": [
            [row["update"], *(round(row[name], 4) for name in names)]
            for row in rows
            if names[0] in row and row["update"]
        ],
        "seconds": spent["seconds"],
        "cpu_seconds": spent["processor seconds"],
        "threads": done.threads,
        "compiled": done.compile,
        "device": done.device,
        "weights_sha256": fingerprint(out),
    }


def publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model folder: fp16 safetensors, config, tokenizer, generation settings."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.half()
    model.generation_config.update(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=120,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.copy(Path(__file__).with_name("LICENSE"), part / "LICENSE")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def main(argv: list[str] | None = None) -> None:
    """Run every stage that is not done yet."""
    parser = argparse.ArgumentParser(description="Train the small decoder and write its card.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder for everything (default: here)"
    )
    parser.add_argument(
        "--text", type=Path, help="folder with bible.data and gcide.dict.dz, for use without a network"
    )
    parser.add_argument("--size", choices=start.SIZES, default="small")
    parser.add_argument("--steps", type=int, help="another number of steps than the plan's (other weights)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile even where g++ is present"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--check-repro", type=int, metavar="N", help="only train N steps twice and resumed, and compare"
    )
    only.add_argument(
        "--prepare", action="store_true", help="only make what training begins with, and print its command"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    compiled = shutil.which("g++") is not None and not args.no_compile
    plan = start.SIZES[args.size]
    plan = (
        replace(plan, steps=args.steps, warmup=max(1, args.steps // 10), cooldown=max(1, args.steps // 3))
        if args.steps
        else plan
    )
    try:
        parts = text.corpus(args.out, plan.dictionary_one_in, args.text)
        tokenizer = start.prepare(args.out / "run", plan, parts)
        job = start.job(args.out / "run", plan, args.threads, args.device, compiled)
        if args.prepare:
            print(" \\\n".join(start.command(job)))
            return
        if args.check_repro:
            check_repro(job, args.check_repro)
            return
        if not Path(job.out).exists():
            with bar() as progress:
                loop.run(job, progress)
    except Error as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
    publish(LlamaForCausalLM.from_pretrained(job.out), tokenizer, args.out / "model")
    from .card import write_card  # needs matplotlib, which training does not

    write_card(args.out, plan, parts, {n: start.stream(tokenizer, d) for n, d in parts.items()}, told(job))
    console.print(f"Done: {args.out / 'README.md'}")


if __name__ == "__main__":
    main()
