"""Heal: train a pruned model until it answers as the one that it was made from; a step of compression recipes.

    wherry compress MODEL -o OUT --recipe "width:neurons=0.3 | heal:steps=200 | gptq:scheme=W4A16"
    wherry compress ENCODER -o OUT --recipe "width:neurons=512 | heal:steps=400,data=sentences.txt"
    wherry compress graph.onnx -o OUT --recipe "width:macs=0.5 | heal:epochs=3,data=pictures/" --data pictures/

Source: Hinton et al. 2015, arXiv:1503.02531 (the original as teacher); Muralidharan et al. 2024 (Minitron,
    arXiv:2407.14679): after pruning, logits of the original beat labels; encoders: Reimers & Gurevych 2020,
    arXiv:2004.09813 (embeddings of the original). Zeros: Han et al. 2015, arXiv:1506.02626.
Idea:   minimise the distance from the original's answers by AdamW under a falling rate: KL of the next token over
        `data` or the calibration windows again and again, 1 - cosine of sentence embeddings, KL of the classes of a
        graph at temperature 4. Weights with zeros keep them. The same engine as `wherry heal`.
Shapes: text: windows of the calibration's length, `batch` of them a step; else `batch` sentences or labelled examples.
Cost:   `steps` forward and backward passes of the model, and forward passes of the original beside it in float32.
Fails:  Unsupported for models that are neither language models, sentence encoders nor classifiers; BadInput without
        data where calibration inputs are no samples to learn from (encoders, graphs); Diverged.
"""

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from wherry import data, shelf
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.knobs import values
from wherry.objective import Objective
from wherry.recipe import Pass, Progress
from wherry.scheme import QTensor

LOSSES = {"text-generation": "kl", "sentence-similarity": "embedding"}
CLASSES = "kl:temperature=4"
OWN = ("model", "out", "data", "teacher", "recipe", "steps", "epochs", "batch", "learning_rate", "seed", "top")


@dataclass(frozen=True, kw_only=True)
class Heal(Pass):
    """steps: updates; epochs: passes over `data` in place of them. batch: samples of each. lr: the highest rate.

    losses: a training recipe, its steps joined by + and its knobs by ; : kl:temperature=4;weight=0.9+ce:weight=0.1
    data: to learn from; "" takes the calibration windows of a language model. options: other settings of `wherry
    train`, as optimizer=sgd;augment=flip,crop. top: the original's answers cached on disk, so that it is not in memory
    beside the pruned model; 0: it is.
    """

    steps: int = 200
    epochs: float = 0.0
    batch: int = 8
    lr: float = 3e-4
    losses: str = ""
    data: str = ""
    options: tuple[str, ...] = ()
    top: int = 0
    seed: int = 0

    @property
    def calibrated(self) -> bool:
        """Whether it learns from the calibration windows."""
        return not self.data

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.lr < 1 or self.epochs < 0:
            raise BadInput(
                f"heal: steps={self.steps}, batch={self.batch}, lr={self.lr:g}: one step of one window at least"
            )
        self.settings()
        if self.losses:
            Objective.parse(self.objective(""))

    def remake(
        self, checkpoint: Checkpoint, out: Path, batches: list[dict[str, np.ndarray]], progress: Progress
    ) -> None:
        """Train the model given and write it into the folder `out`. A killed run goes on at its last checkpoint."""
        self.expect(checkpoint)
        original = checkpoint.original or checkpoint
        source, settings = self.data, self.settings()
        if not source:
            windows = np.concatenate([batch["input_ids"] for batch in batches])
            settings["length"] = windows.shape[1] - 1
            file = out.parent / "windows.npy"
            np.save(file, np.ascontiguousarray(windows))
            source = str(file)
        steps = self.objective(checkpoint.task.kind)
        recipe = f"{steps} | keep_zeros" if holds_zeros(checkpoint) else steps
        job, loop = shelf.find("train", "job"), shelf.find("train", "loop")
        made = out.parent / "healed"
        if not made.exists():
            given = {"warmup": max(1, self.steps // 20), "save_every": 0 if self.epochs else max(1, self.steps // 4)}
            loop.run(
                job.Job(
                    model=str(checkpoint.path), teacher=str(original.path), out=str(made), data=source, recipe=recipe,
                    steps=0 if self.epochs else self.steps, epochs=self.epochs, batch=self.batch,
                    learning_rate=self.lr, top=self.top, seed=self.seed, **given | settings,
                ),
                progress,
            )  # fmt: skip
        for file in made.iterdir():
            if file.is_file():
                shutil.copyfile(file, out / file.name)

    def objective(self, kind: str) -> str:
        """The training recipe."""
        return self.losses.replace("+", " | ").replace(";", ",") or LOSSES.get(kind, CLASSES)

    def settings(self) -> dict[str, Any]:
        """`options` as fields of a job. Raises BadInput for one that is none, or is a knob of its own."""
        kind = shelf.find("train", "job").Job
        pairs = dict(option.partition("=")[::2] for option in self.options if option)
        return values(kind, "heal's options", pairs, [f.name for f in fields(kind) if f.name not in OWN])

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same names and shapes. Raises Unsupported, BadInput."""
        kind, graph = checkpoint.task.kind, checkpoint.graph is not None
        if not (kind in LOSSES and not graph or graph and kind.endswith("classification")):
            raise Unsupported(
                f"heal teaches language models, sentence encoders, and graphs that classify; {checkpoint.name} is "
                f"{'a graph ' if graph else ''}for {kind}.\nTrain it where it came from, and compress what that leaves."
            )
        if not self.data and kind != "text-generation":
            raise BadInput(
                f"heal: {checkpoint.name} is for {kind}, and calibration inputs are no samples to learn from.\n"
                f"Give data={'sentences.txt, a sentence a line' if kind in LOSSES else 'examples with labels'}."
            )
        for source in self.data.split(";") if self.data else []:
            file = Path(source.split("*")[0])
            if not file.exists() or not file.stat().st_size:
                raise BadInput(f"heal: {'empty' if file.exists() else 'no such'} data: {source}")
            if graph and data.read(source.split("*")[0]).labels is None:
                raise BadInput(f"heal: {source} has no labels for {kind}: give a column 'label', or a folder a class")
        return checkpoint


def holds_zeros(checkpoint: Checkpoint, least: float = 0.01) -> bool:
    """Whether pruning left zeros in any matrix."""
    for name in checkpoint.names():
        tensor: Any = checkpoint.tensor(name)
        w = tensor.decode() if isinstance(tensor, QTensor) else tensor
        if w.ndim > 1 and float((w == 0).float().mean()) >= least:
            return True
    return False
