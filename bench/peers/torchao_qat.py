"""torchao's QAT of a language model's linears, for bench/healing.py.

    python torchao_qat.py MODEL ROWS.npy OUT --bits 2 --group 64 --rate 4e-4 --batch 8

torchao gives the fake quantizers (IntxFakeQuantizeConfig: asymmetric, ranges found anew at every step); the loop is the
plainest: AdamW, cosine, KL from the float model at temperature 1, norm of the gradient 1, all weights trained.
ROWS: token ids [steps * batch, length + 1], in the order of our own run. OUT: a folder with the weights as the
fake quantizers leave them. Prints the seconds of CPU.

    python3.11 -m venv PEER && PEER/bin/pip install torch==2.13.0 transformers==5.23.0
    PEER/bin/pip install torch==2.13.0 torchao==0.18.0 trl==1.16.0 datasets
"""

import argparse
import copy
import json
import math
import time

import numpy as np
import torch
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.linear import FakeQuantizedLinear
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID253


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "out"):
        parser.add_argument(name)
    for name, value in (("bits", 2), ("group", 64), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=4e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{args.bits}"), group_size=args.group, is_symmetric=False)
    quantize_(
        model, QATConfig(weight_config=config, step="prepare"),
        lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name,
    )  # fmt: skip
    rows = torch.from_numpy(np.load(args.rows, allow_pickle=False).astype(np.int64))
    steps = len(rows) // args.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 20)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, i - warm) / max(1, steps - warm))),
    )
    began, losses = time.process_time(), []
    for step in range(steps):
        ids = rows[step * args.batch : (step + 1) * args.batch, :-1]
        with torch.no_grad():
            log_p = teacher(ids).logits.flatten(0, 1).log_softmax(-1)
        log_q = model(ids).logits.flatten(0, 1).log_softmax(-1)
        loss = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
        losses.append(float(loss.detach()))
    seconds = time.process_time() - began
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantizedLinear):
                plain.get_submodule(name).weight.copy_(module.weight_fake_quantizer(module.weight))
    plain.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(json.dumps({"seconds": seconds, "loss": losses[-1], "steps": steps}))


main()
