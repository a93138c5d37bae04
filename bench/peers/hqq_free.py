"""Driver of HQQ: runs inside that peer's own environment and imports nothing of wherry.

    PEER/bin/python bench/peers/hqq_free.py --model FOLDER --out OUT --method hqq --scheme W3A16_ASYM --group-size 32
        [--axis 0]

Reads a Hugging Face folder, sees no data; writes a folder of plain fp16 weights of what its codes mean, and counts the
bytes of a safetensors file of its packed codes, fp16 scales, fp16 zeros (they are no integers) and fp16 of the rest.
Only the linears of the blocks are quantized. axis 1 groups inputs of a row, as its kernels want it; axis 0 groups
outputs, which its page calls better at few bits. Ends with one JSON line of what it took.

The environment: python3.11 -m venv PEER; PEER/bin/pip install torch==2.13.0; PEER/bin/pip install hqq==0.2.8.post1
"""

import argparse
import contextlib
import importlib.metadata
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: TID253


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, help="not looked at")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--method", choices=("hqq",), required=True)
    parser.add_argument("--scheme", required=True, help="W4A16_ASYM, W3A16_ASYM, W2A16_ASYM")
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--axis", type=int, default=1, choices=(0, 1))
    return parser.parse_args(words)


def compress(a: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; returns wall and CPU seconds (loading and saving left out) and versions."""
    causal = any("CausalLM" in name for name in AutoConfig.from_pretrained(a.model).architectures or [])
    model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(a.model, dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n}
    every = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    start, cpu = time.perf_counter(), time.process_time()
    held = {n: p.detach().half() for n, p in model.named_parameters() if n.removesuffix(".weight") not in layers}
    with torch.no_grad():
        for place, layer in layers.items():
            code, meta = Quantizer.quantize(
                layer.weight.data, nbits=int(a.scheme[1]), channel_wise=True, group_size=a.group_size, optimize=True,
                round_zero=False, axis=a.axis, bitpack=True, compute_dtype=torch.float32, device="cpu",
            )  # fmt: skip
            for name in ("scale", "zero"):
                held[f"{place}.{name}"] = meta[name].half().clone()
                meta[name] = meta[name].half().float()
            held[f"{place}.codes"] = code.clone()
            layer.weight.data = Quantizer.dequantize(code, meta).reshape(layer.weight.shape).float()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    size = len(save(held))
    model.to(torch.float16).save_pretrained(a.out)
    AutoTokenizer.from_pretrained(a.model).save_pretrained(a.out)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "bytes": size,
        "bits": size * 8 / every,
        "versions": [f"{name}=={importlib.metadata.version(name)}" for name in ("hqq", "torch", "transformers")],
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
