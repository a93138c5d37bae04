"""What training begins with: the untrained model, its tokenizer, the tokens, and the order in which they are seen.

Source: Llama (Touvron et al. 2023, arXiv:2302.13971) as transformers builds it; Muon (Jordan et al. 2024,
        torch.optim.Muon) steps the matrices inside the layers, AdamW the embedding and the norms.
Idea:   wherry trains it (`wherry.train`); here is only what is this decoder's own: sizes, corpus, order, settings.
Shapes: tokens [n]; order [steps, rows]: where in the tokens of both books each row of a step begins.
Fails:  BadInput when the folder was prepared for another plan.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers  # noqa: TID253
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: TID253

from wherry.errors import BadInput
from wherry.train.job import Job

from . import text

END = "<|endoftext|>"  # id 0: before the first document and after each
BOOKS = ("bible", "dictionary")  # in this order in a step's rows
WATCHED = ("search_book", "search_letter")  # judged on while training


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


def order(plan: Plan, streams: dict[str, NDArray[np.int64]]) -> NDArray[np.int32]:
    """Where the rows of all steps begin, [steps, rows]; each book has new windows in a new order each epoch.

    Places in the dictionary are counted on from the last place of the Bible at which a row can begin.
    """
    found, before = [], 0
    for name, count in zip(BOOKS, (plan.bible_rows, plan.dictionary_rows), strict=True):
        tokens, width = streams[name], plan.context
        windows = (len(tokens) - 1) // width - 1
        rows = np.arange(plan.steps * count)
        starts = np.empty(len(rows), np.int32)
        for epoch in range(rows[-1] // windows + 1):
            here = rows // windows == epoch
            chance = np.random.default_rng([plan.seed, len(name), epoch])
            starts[here] = chance.integers(width) + chance.permutation(windows)[rows[here] % windows] * width
        found.append(before + starts.reshape(plan.steps, count))
        before += len(tokens) - width
    return np.concatenate(found, 1)


def glimpse(documents: list[str], limit: int = 16_000) -> list[str]:
    """Return the first documents, up to `limit` bytes: what the training curve is measured on."""
    sizes = np.cumsum([len(d.encode()) for d in documents])
    return documents[: max(1, int((sizes <= limit).sum()))]


def prepare(folder: Path, plan: Plan, parts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Write into `folder` what `job` names, once; gives the tokenizer. plan.json is written last."""
    kept = folder / "plan.json"
    if kept.exists():
        if json.loads(kept.read_text(encoding="utf-8")) != asdict(plan):
            raise BadInput(f"{folder} belongs to a run with other settings.\nDelete it to start anew, or use --out.")
        return PreTrainedTokenizerFast.from_pretrained(folder / "start")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer([d for name in BOOKS for d in parts[name]], plan.vocab)
    build(plan).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    streams = {name: stream(tokenizer, parts[name]) for name in BOOKS}
    for name in WATCHED:
        np.save(folder / f"{name}.npy", stream(tokenizer, glimpse(parts[name])))
    for name, tokens in streams.items():
        np.save(folder / f"{name}.npy", tokens)
    np.save(folder / "order.npy", order(plan, streams))
    text.write(kept, json.dumps(asdict(plan)))
    return tokenizer


def job(folder: Path, plan: Plan, threads: int, device: str = "cpu", compiled: bool = True) -> Job:
    """How wherry trains it."""
    return Job(
        model=str(folder / "start"),
        out=str(folder / "trained"),
        data=";".join(str(folder / f"{name}.npy") for name in BOOKS),
        held_out=";".join(str(folder / f"{name}.npy") for name in WATCHED),
        order=str(folder / "order.npy"),
        stride=1,
        overlap=plan.context // 2,
        length=plan.context,
        batch=plan.bible_rows + plan.dictionary_rows,
        steps=plan.steps,
        eval_every=50,
        save_every=50,
        optimizer="muon",
        learning_rate=plan.muon_rate,
        weight_decay=plan.decay,
        outer_rate=plan.adam_rate,
        outer_decay=0.0,
        clip=plan.clip,
        schedule="trapezoid",
        warmup=plan.warmup,
        cooldown=plan.cooldown,
        precision="bf16" if device == "cuda" else "fp32",
        device=device,
        threads=threads,
        compile=compiled,
        use_cache=True,  # the kept weights were trained so
    )


FLAGS = ("data", "held_out", "steps", "batch", "length", "learning_rate", "optimizer", "warmup", "save_every")


def command(job: Job) -> list[str]:
    """The same on the command line, a piece of it per line."""
    lines = [f"wherry train {shlex.quote(job.model)} -o {shlex.quote(job.out)}"]
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name in ("model", "out") or value == field.default:
            continue
        said = shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))
        flag = f"--{field.name.replace('_', '-')} " if field.name in FLAGS else f"--set {field.name}="
        lines.append(f"    {flag}{said}")
    return lines
