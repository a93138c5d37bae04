"""Driver of GPTQModel: runs inside that peer's own environment and imports nothing of wherry.

    PEER/bin/python bench/peers/gptqmodel_gptq.py --model FOLDER --tokens calibration.npy --out OUT \\
        --method gptq --scheme W3A16_ASYM --group-size 32 [--mse 2.4 --desc-act true --gptaq true]

Reads a Hugging Face folder and an array of token ids [windows, length]; writes a folder of plain fp16 weights of what
its codes mean, and counts the bytes of the folder that it saves in its own format. Only the linears of the blocks are
quantized, in float32. Ends with one JSON line of what it took. With --serve it reads such arguments line by line.

The environment: python3.11 -m venv PEER; PEER/bin/pip install torch==2.13.0; PEER/bin/pip install gptqmodel==7.6.0
It compiles its packer with g++ at the first save, and wants two workers, which a small machine does not give by itself.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM  # noqa: TID253


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="npy of ids [windows, length]")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--method", choices=("gptq", "gptaq"), required=True)
    parser.add_argument("--scheme", required=True, help="W4A16, W4A16_ASYM, W3A16, ...")
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--mse", type=float, default=0.0, help="power of the error in its search of ranges; 0: none")
    parser.add_argument("--desc-act", default="false", help="true: columns by falling activation, with a g_idx")
    parser.add_argument("--damp", type=float, default=None)
    return parser.parse_args(words)


def compress(a: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; returns wall and CPU seconds (loading and saving left out) and versions."""
    knobs = {"damp_percent": a.damp} if a.damp is not None else {}
    if a.method == "gptaq":
        from gptqmodel.quantization import GPTAQConfig

        knobs["gptaq"] = GPTAQConfig()
    config = QuantizeConfig(
        bits=int(a.scheme[1]), group_size=a.group_size, sym=not a.scheme.endswith("_ASYM"),
        desc_act=a.desc_act == "true", mse=a.mse, offload_to_disk=False, format="gptq_v2", **knobs,
    )  # fmt: skip
    peer = GPTQModel.load(str(a.model), config, device="cpu", dtype=torch.float32)
    ids = torch.from_numpy(np.load(a.tokens))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    start, cpu = time.perf_counter(), time.process_time()
    peer.quantize(rows, batch_size=4)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    plain = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    for name, layer in peer.model.named_modules():
        if hasattr(layer, "dequantize_weight"):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(layer.dequantize_weight().T)
    own = a.out.with_name(f"{a.out.name}-own")
    peer.save(str(own))
    size = sum(file.stat().st_size for file in own.glob("*.safetensors"))
    shutil.rmtree(own)
    parameters = sum({p.data_ptr(): p.numel() for p in plain.parameters()}.values())
    plain.to(torch.float16).save_pretrained(a.out)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "bytes": size,
        "bits": size * 8 / parameters,
        "versions": [f"{name}=={importlib.metadata.version(name)}" for name in ("gptqmodel", "torch", "transformers")],
    }


def main() -> None:
    """One run, or one for each line of stdin. What the peer prints goes to stderr."""
    lines = sys.stdin if sys.argv[1:] == ["--serve"] else [shlex.join(sys.argv[1:])]
    for line in lines:
        with contextlib.redirect_stdout(sys.stderr):
            took = compress(arguments(shlex.split(line)))
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
