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

import driver
import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save
from transformers import AutoTokenizer  # noqa: TID253


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = driver.options(__doc__, ("hqq",))
    made.add_argument("--axis", type=int, default=1, choices=(0, 1))
    return made


def compress(a: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; returns wall and CPU seconds (loading and saving left out) and versions."""
    model = driver.load(a.model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n}
    clock = driver.Clock()
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
    took = clock.read()
    took |= driver.size(len(save(held)), driver.count(model)) | driver.versions("hqq", "torch", "transformers")
    model.to(torch.float16).save_pretrained(a.out)
    AutoTokenizer.from_pretrained(a.model).save_pretrained(a.out)
    return took


if __name__ == "__main__":
    driver.main(compress, parser())
