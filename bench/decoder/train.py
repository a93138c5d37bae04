"""From an empty folder to a small trained decoder and its model card, in one command.

    python -m bench.decoder.train                       # everything, into bench/decoder
    python -m bench.decoder.train --out FOLDER --threads 1
    python -m bench.decoder.train --check-repro 20      # train 20 steps twice, and resumed: the same bits?

text.py gets and cleans the text, learn.py trains a tokenizer and a Llama, card.py measures and writes the
card. Kill it at any time and run the same command: it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from wherry.errors import Error

from . import text
from .learn import SIZES, check_repro, console, fingerprint, glimpse, learn, publish, stream, train_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Run every stage that is not done yet."""
    parser = argparse.ArgumentParser(description="Train the small decoder and write its card.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder for everything (default: here)"
    )
    parser.add_argument(
        "--text", type=Path, help="folder with bible.data and gcide.dict.dz, for use without a network"
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, help="another number of steps than the plan's (other weights)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile even where g++ is present"
    )
    parser.add_argument(
        "--check-repro", type=int, metavar="N", help="only train N steps twice and resumed, and compare"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    compiled = shutil.which("g++") is not None and not args.no_compile
    plan = SIZES[args.size]
    plan = (
        replace(plan, steps=args.steps, warmup=max(1, args.steps // 10), cooldown=max(1, args.steps // 3))
        if args.steps
        else plan
    )
    try:
        parts = text.corpus(args.out, plan.dictionary_one_in, args.text)
        tokenizer = train_tokenizer(parts["bible"] + parts["dictionary"], plan.vocab)
        streams = {name: stream(tokenizer, documents) for name, documents in parts.items()}
        if args.check_repro:
            check_repro(plan, streams, args.check_repro, args.device, compiled)
            return
        watch = {
            k: (glimpse(parts[k]), stream(tokenizer, glimpse(parts[k])))
            for k in ("search_book", "search_letter")
        }
        model, log = learn(
            plan,
            streams,
            args.out / "run" / "checkpoint.safetensors",
            watch=watch,
            device=args.device,
            compiled=compiled,
        )
    except Error as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
    log |= {
        "threads": args.threads,
        "compiled": compiled,
        "device": args.device,
        "weights_sha256": fingerprint(model),
    }
    publish(model.cpu(), tokenizer, args.out / "model")
    from .card import write_card  # needs matplotlib, which training does not

    write_card(args.out, plan, parts, streams, log)
    console.print(f"Done: {args.out / 'README.md'}")


if __name__ == "__main__":
    main()
