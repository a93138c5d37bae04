"""Driver of AutoRound: runs inside that peer's own environment and imports nothing of wherry.

    PEER/bin/python bench/peers/autoround.py --model FOLDER --tokens calibration.npy --out OUT \\
        --method rounding --scheme W3A16_ASYM --group-size 32 [--iters 200]

Reads a Hugging Face folder and an array of token ids [windows, length]; writes a folder of plain fp16 weights of what
its codes mean (its own format needs its own loader), and counts the bytes of the weight files that it saves in its own
format, of a model that is fp16 otherwise. Only the linears are quantized, in float32. Ends with one JSON line of what
it took. With --serve it reads such arguments line by line from stdin.

The environment: python3.11 -m venv PEER; PEER/bin/pip install torch==2.13.0; PEER/bin/pip install auto-round==0.16.1
"""

import argparse
import contextlib
import importlib.metadata
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID253


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="npy of ids [windows, length]")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--method", choices=("rounding",), required=True)
    parser.add_argument("--scheme", required=True, help="W4A16, W4A16_ASYM, W3A16, ...")
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--iters", type=int, default=200)
    return parser.parse_args(words)


def compress(a: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; returns wall and CPU seconds (loading and saving left out) and versions."""
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    ids = torch.from_numpy(np.load(a.tokens))
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    start, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        peer = AutoRound(
            model, AutoTokenizer.from_pretrained(a.model), bits=int(a.scheme[1]), group_size=a.group_size,
            sym=not a.scheme.endswith("_ASYM"), dataset=batches, iters=a.iters, nsamples=len(ids), seqlen=ids.shape[1],
            batch_size=8, amp=False, device_map="cpu",
        )  # fmt: skip
        done, _ = peer.quantize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    every = sum({p.data_ptr(): p.numel() for p in done.parameters()}.values())
    done.to(torch.float16).save_pretrained(a.out)
    own = a.out.with_name(f"{a.out.name}-own")
    with contextlib.redirect_stdout(sys.stderr):
        peer.save_quantized(str(own), format="auto_round", inplace=True)
    size = sum(file.stat().st_size for file in own.rglob("*.safetensors"))
    shutil.rmtree(own)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "bytes": size,
        "bits": size * 8 / every,
        "versions": [f"{name}=={importlib.metadata.version(name)}" for name in ("auto-round", "torch", "transformers")],
    }


def main() -> None:
    """One run, or one for each line of stdin."""
    if sys.argv[1:] != ["--serve"]:
        print(json.dumps(compress(arguments(sys.argv[1:]))))
        return
    for line in sys.stdin:
        print(json.dumps(compress(arguments(shlex.split(line)))), flush=True)


if __name__ == "__main__":
    main()
