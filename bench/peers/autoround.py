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
import shutil

import driver
import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID253


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = driver.options(__doc__, ("rounding",))
    made.add_argument("--iters", type=int, default=200)
    return made


def compress(a: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; returns wall and CPU seconds (loading and saving left out) and versions."""
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    ids = torch.from_numpy(np.load(a.tokens))
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    clock = driver.Clock()
    peer = AutoRound(
        model, AutoTokenizer.from_pretrained(a.model), bits=int(a.scheme[1]), group_size=a.group_size,
        sym=not a.scheme.endswith("_ASYM"), dataset=batches, iters=a.iters, nsamples=len(ids), seqlen=ids.shape[1],
        batch_size=8, amp=False, device_map="cpu",
    )  # fmt: skip
    done, _ = peer.quantize()
    took = clock.read()
    parameters = driver.count(done)
    done.to(torch.float16).save_pretrained(a.out)
    own = a.out.with_name(f"{a.out.name}-own")
    layout = "auto_round:auto_gptq" if a.scheme.startswith("W4") else "auto_round"  # its own choice fails: AWQ's
    peer.save_quantized(str(own), format=layout, inplace=True)
    files = sum(file.stat().st_size for file in own.rglob("*.safetensors"))
    shutil.rmtree(own)
    return took | driver.size(files, parameters) | driver.versions("auto-round", "torch", "transformers")


if __name__ == "__main__":
    driver.main(compress, parser())
