"""Driver of GPTQModel: runs inside that peer's own environment and imports nothing of wherry.

    PEER/bin/python bench/peers/gptqmodel_gptq.py --model FOLDER --tokens calibration.npy --out OUT \\
        --method gptq --scheme W3A16_ASYM --group-size 32 [--mse 2.4 --desc-act true --gptaq true]

Reads a Hugging Face folder and an array of token ids [windows, length]; writes a folder of plain fp16 weights of what
its codes mean, and counts the bytes of the folder that it saves in its own format, with fp16 in the place of float32.
Only the linears of the blocks are quantized, in float32. Ends with one JSON line of what it took. With --serve it reads
such arguments line by line.

The environment: python3.11 -m venv PEER; PEER/bin/pip install torch==2.13.0; PEER/bin/pip install gptqmodel==7.6.0
It compiles its packer with g++ at the first save, and wants two workers, which a small machine does not give by itself.
"""

import argparse
import os
import shutil

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import driver
import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM  # noqa: TID253


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = driver.options(__doc__, ("gptq", "gptaq"))
    made.add_argument("--mse", type=float, default=0.0, help="power of the error in its search of ranges; 0: none")
    made.add_argument("--desc-act", default="false", help="true: columns by falling activation, with a g_idx")
    made.add_argument("--damp", type=float, default=None)
    return made


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
    clock = driver.Clock()
    peer.quantize(rows, batch_size=4)
    took = clock.read()
    plain = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    for name, layer in peer.model.named_modules():
        if hasattr(layer, "dequantize_weight"):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(layer.dequantize_weight().T)
    own = a.out.with_name(f"{a.out.name}-own")
    peer.save(str(own))
    driver.halve(own)
    files = sum(file.stat().st_size for file in own.glob("*.safetensors"))
    shutil.rmtree(own)
    plain.to(torch.float16).save_pretrained(a.out)
    return took | driver.size(files, driver.count(plain)) | driver.versions("gptqmodel", "torch", "transformers")


if __name__ == "__main__":
    driver.main(compress, parser())
