"""Rate: the optimizers of a run, and the share of the peak learning rate at each update.

Sources: AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Muon: Jordan et al. 2024, for the matrices inside of the
         blocks, with AdamW for embeddings, heads, norms and biases; its rate is scaled to AdamW's RMS (Liu et al. 2025,
         arXiv:2502.16982), so that one learning rate does for both. Cosine:
         arXiv:1608.03983. Trapezoid: arXiv:2405.18392.
"""

import math
from collections.abc import Iterable

import torch

from wherry.errors import BadInput
from wherry.train.job import Job

Named = Iterable[tuple[str, torch.nn.Parameter]]
OUTER = ("embed", "lm_head", "wte", "wpe")  # parts of names of what is no inner matrix


def optimizers(job: Job, named: Named) -> list[torch.optim.Optimizer]:
    """Of all parameters that have gradients. Weight decay is for weights with two axes or more."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    if not trained:
        raise BadInput("nothing to train: no parameter has a gradient")
    outer_rate = job.outer_rate or job.learning_rate
    inner: list[tuple[str, torch.nn.Parameter]] = []
    if job.optimizer == "muon":
        inner = [(n, p) for n, p in trained if p.ndim == 2 and not any(part in n for part in OUTER)]
    decay = job.outer_decay if inner and job.outer_decay >= 0 else job.weight_decay
    matrices = {id(p) for _, p in inner}
    rest = [p for _, p in trained if id(p) not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made: list[torch.optim.Optimizer] = []
    each = False if len({type(p.data) for p in rest}) > 1 else None  # cut and whole tensors cannot be stepped together
    if inner:
        made.append(
            torch.optim.Muon(
                [p for _, p in inner], lr=job.learning_rate, weight_decay=job.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    if groups and job.optimizer == "sgd":
        made.append(torch.optim.SGD(groups, lr=job.learning_rate, momentum=job.momentum, foreach=each))
    elif groups:
        first, _, second = job.betas.partition(",")
        try:
            betas = float(first), float(second)
        except ValueError as error:
            raise BadInput(f"betas: '{job.betas}' is not two numbers, like 0.9,0.95") from error
        rate = outer_rate if inner else job.learning_rate
        made.append(torch.optim.AdamW(groups, lr=rate, betas=betas, foreach=each))
    for one in made:
        for group in one.param_groups:
            group["peak"] = group["lr"]
    return made


def share(job: Job, step: int, steps: int) -> float:
    """Share of the peak rate at update `step` of `steps`: up over `warmup`, then as the schedule says."""
    up = min(1.0, (step + 1) / job.warmup) if job.warmup else 1.0
    left = max(1, steps - job.warmup)
    done = min(1.0, max(0, step - job.warmup) / left)
    if job.schedule == "cosine":
        return up * 0.5 * (1 + math.cos(math.pi * done))
    if job.schedule == "linear":
        return up * (1 - done)
    if job.schedule == "trapezoid":
        return min(up, (steps - step) / max(1, job.cooldown))
    return up
