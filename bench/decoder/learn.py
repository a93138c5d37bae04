"""The model, its tokenizer and the loop that trains it.

Source: Llama (Touvron et al. 2023, arXiv:2302.13971) as transformers builds it; Muon (Jordan et al. 2024,
        torch.optim.Muon) steps the matrices inside the layers, AdamW the embedding and the norms.
Idea:   the learning rate warms up, stays, and falls linearly to zero over `cooldown`. The order of the data
        is a pure function of the seed and the step, so a resumed run repeats the uninterrupted one exactly.
Shapes: tokens [n]; a batch is [rows, context + 1]: inputs without the last column, targets without the first.
Fails:  Diverged on a loss that is not finite; BadInput on a checkpoint of another plan.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: TID253

from wherry.errors import BadInput, Diverged

END = "<|endoftext|>"  # id 0: before the first document and after each
console = Console()


@dataclass(frozen=True)
class Plan:
    """All that decides the weights, apart from the machine; `rows` are windows of `context` tokens a step."""

    hidden: int = 256
    ffn: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 4096
    context: int = 512
    dictionary_one_in: int = 6  # the dictionary is five times the Bible; this share keeps it about as large
    bible_rows: int = 6
    dictionary_rows: int = 2
    steps: int = 750
    warmup: int = 30
    cooldown: int = 200
    muon_rate: float = 0.005
    adam_rate: float = 0.003
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 20261122


SIZES = {
    "small": Plan(),
    "medium": Plan(
        hidden=512,
        ffn=1536,
        layers=8,
        heads=8,
        kv_heads=4,
        vocab=8192,
        dictionary_one_in=1,
        bible_rows=24,
        dictionary_rows=40,
        steps=3000,
        warmup=150,
        cooldown=900,
        muon_rate=0.003,
        adam_rate=0.002,
    ),
}


def build(plan: Plan) -> LlamaForCausalLM:
    """Make the untrained model, seeded."""
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=plan.vocab,
            hidden_size=plan.hidden,
            intermediate_size=plan.ffn,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.kv_heads,
            head_dim=plan.hidden // plan.heads,
            max_position_embeddings=plan.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the training text alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> NDArray[np.int64]:
    """Tokenize documents into one stream, END first and after each."""
    ids = [0]
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += [*encoding.ids, 0]
    return np.asarray(ids, np.int64)


def batch(step: int, plan: Plan, streams: dict[str, NDArray[np.int64]]) -> torch.Tensor:
    """Return the rows of a step, [rows, context + 1]; each source has a new order of windows each epoch."""
    rows = []
    for name, count in (("bible", plan.bible_rows), ("dictionary", plan.dictionary_rows)):
        tokens, width = streams[name], plan.context
        windows = (len(tokens) - 1) // width - 1
        for row in range(step * count, (step + 1) * count):
            epoch, at = divmod(row, windows)
            order = np.random.default_rng([plan.seed, len(name), epoch])
            start = order.integers(width) + order.permutation(windows)[at] * width
            rows.append(tokens[start : start + width + 1])
    return torch.from_numpy(np.stack(rows))


def optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding (also the head) and the norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(inner, lr=plan.muon_rate, weight_decay=plan.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, plan: Plan) -> float:
    """Share of the peak learning rate: up over `warmup` steps, level, down to zero over `cooldown`."""
    return min(1.0, (step + 1) / plan.warmup, (plan.steps - step) / plan.cooldown)


def save(
    path: Path,
    step: int,
    model: LlamaForCausalLM,
    opts: list[torch.optim.Optimizer],
    plan: Plan,
    log: dict[str, Any],
) -> None:
    """Write weights, optimizer and random state as one safetensors file, under a temporary name first."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()} | {"rng": torch.get_rng_state()}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": v for k, v in state.items()}
    meta = {"step": str(step), "plan": json.dumps(asdict(plan)), "log": json.dumps(log)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".part"), meta)
    os.replace(path.with_suffix(".part"), path)


def restore(
    path: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], plan: Plan
) -> tuple[int, dict[str, Any]]:
    """Read what `save` wrote; return (steps done, log). A checkpoint of another plan is refused."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        if json.loads(meta["plan"]) != asdict(plan):
            raise BadInput(
                f"{path} belongs to a run with other settings.\nDelete it to start anew, or use --out."
            )
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
    for i, opt in enumerate(opts):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, k = key.split(".")
                state.setdefault(int(j), {})[k] = value
        opt.load_state_dict(opt.state_dict() | {"state": state})
    torch.set_rng_state(tensors["rng"])
    return int(meta["step"]), json.loads(meta["log"])


@torch.no_grad()
def surprisal(
    model: LlamaForCausalLM, tokens: NDArray[np.int64], context: int = 512, rows: int = 8
) -> NDArray[np.float64]:
    """Bits of all tokens of a stream but the first, [n] -> [n - 1], each after context / 2 tokens or more."""
    half, device = context // 2, next(model.parameters()).device
    ids = torch.from_numpy(tokens)
    starts = list(range(0, max(1, len(ids) - 1 - half), half))
    out = torch.zeros(len(ids) - 1, dtype=torch.float64)
    for at in range(0, len(starts), rows):
        windows = [ids[s : s + context + 1] for s in starts[at : at + rows]]
        x = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True).to(device)
        logits = model(input_ids=x[:, :-1]).logits.float()
        bits = cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").double().cpu() / math.log(2)
        for s, window, row in zip(starts[at : at + rows], windows, bits, strict=True):
            new = half if s else 0
            out[s + new : s + len(window) - 1] = row[new : len(window) - 1]
    return out.numpy()


def bits_per_byte(bits: NDArray[np.float64], documents: list[str]) -> float:
    """Code length of a stream, END tokens included, over the UTF-8 bytes of its documents."""
    return float(bits.sum()) / sum(len(d.encode()) for d in documents)


def glimpse(documents: list[str], limit: int = 16_000) -> list[str]:
    """Return the first documents, up to `limit` bytes: what the training curve is measured on."""
    sizes = np.cumsum([len(d.encode()) for d in documents])
    return documents[: max(1, int((sizes <= limit).sum()))]


def learn(
    plan: Plan,
    streams: dict[str, NDArray[np.int64]],
    path: Path,
    *,
    watch: dict[str, tuple[list[str], NDArray[np.int64]]] | None = None,
    device: str = "cpu",
    compiled: bool = True,
    until: int | None = None,
    every: int = 50,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train from `path` (or nothing) to step `until`; checkpoint and measure `watch` each `every` steps."""
    model = build(plan).to(device)
    opts = optimizers(model, plan)
    done = 0
    log: dict[str, Any] = {"train": [], "search": [], "seconds": 0.0, "cpu_seconds": 0.0}
    if path.exists():
        done, log = restore(path, model, opts, plan)
        console.print(f"Resumed {path.name} at step {done} of {plan.steps}.")

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=x[:, :-1]).logits
        return cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())

    forward = torch.compile(loss_of) if compiled else loss_of
    until, bf16 = until or plan.steps, device == "cuda"
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("training", total=until, completed=done)
        for step in range(done, until):
            began, cpu_began = time.monotonic(), time.process_time()
            for opt, peak in zip(opts, (plan.muon_rate, plan.adam_rate), strict=True):
                opt.param_groups[0]["lr"] = peak * rate(step, plan)
            x = batch(step, plan, streams).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = forward(x)
            if not math.isfinite(loss.item()):
                raise Diverged(
                    f"The loss is {loss.item()} at step {step}.\nThe last good checkpoint is {path}; lower "
                    "muon_rate and adam_rate in the plan, delete the checkpoint and run again."
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            log["train"].append(round(loss.item(), 5))
            log["seconds"] += time.monotonic() - began
            log["cpu_seconds"] += time.process_time() - cpu_began
            if (step + 1) % every == 0 or step + 1 == until:
                if watch:
                    log["search"].append(
                        [
                            step + 1,
                            *(
                                round(bits_per_byte(surprisal(model, ids, plan.context), d), 4)
                                for d, ids in watch.values()
                            ),
                        ]
                    )
                save(path, step + 1, model, opts, plan, log)
            note = f"loss {np.mean(log['train'][-20:]):.3f}" + (
                f", search book {log['search'][-1][1]:.3f} bits per byte" if log["search"] else ""
            )
            bar.update(task, advance=1, description=note)
            if not console.is_terminal and (step + 1) % 10 == 0:
                print(f"step {step + 1}/{until}  {note}  {log['seconds']:.0f} s", flush=True)
    return model, log


def fingerprint(model: LlamaForCausalLM) -> str:
    """SHA-256 over all weights in fp32, in the order of their names."""
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(p.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def check_repro(
    plan: Plan, streams: dict[str, NDArray[np.int64]], steps: int, device: str, compiled: bool
) -> dict[str, Any]:
    """Train `steps` steps twice, then with a stop and a resume half-way; compare the weights bit for bit."""
    train = {k: streams[k] for k in ("bible", "dictionary")}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, until: int) -> tuple[str, list[float]]:
            model, log = learn(
                plan, train, Path(folder) / name, device=device, compiled=compiled, until=until
            )
            return fingerprint(model), log["train"]

        first, second = run("a.safetensors", steps), run("b.safetensors", steps)
        run("c.safetensors", steps // 2)
        resumed = run("c.safetensors", steps)
    if not first == second == resumed:
        raise Diverged(
            f"Not reproducible over {steps} steps: {first[0][:12]}, again {second[0][:12]}, resumed "
            f"{resumed[0][:12]}.\nUse the same --threads on an idle machine; report it if it persists."
        )
    console.print(f"{steps} steps, again, and resumed at {steps // 2}: the same bits ({first[0][:16]}).")
    return {"steps": steps, "resumed_at": steps // 2, "weights_sha256": first[0], "equal": True}


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
