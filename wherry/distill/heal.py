"""Heal: train a pruned model until it answers as the one that it was made from; a step of compression recipes.

    wherry compress MODEL -o OUT --recipe "width:neurons=0.3 | heal:steps=200 | gptq:scheme=W4A16"

Source: Hinton et al. 2015, arXiv:1503.02531 (the original as teacher); Muralidharan et al. 2024 (Minitron,
    arXiv:2407.14679): after pruning, logits of the original beat labels. Zeros: Han et al. 2015, arXiv:1506.02626.
Idea:   minimise KL(original || pruned) of the next token by AdamW under a falling rate, over `data`, or over the
        calibration windows again and again. Weights with zeros keep them. The same engine as `wherry heal`.
Shapes: windows of the calibration's length, `batch` of them a step.
Cost:   `steps` forward and backward passes of the model, and forward passes of the original beside it in float32.
Fails:  Unsupported for graphs (they need labels: wherry train) and for models that write no text; Diverged.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wherry import shelf
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Pass, Progress
from wherry.scheme import QTensor


@dataclass(frozen=True, kw_only=True)
class Heal(Pass):
    """steps: updates. batch: windows of each. lr: the highest learning rate. losses: a training recipe.

    data: texts to learn from; "" takes the calibration windows. top: the original's answers cached on disk, so that it
    is not in memory beside the pruned model; 0: it is.
    """

    steps: int = 200
    batch: int = 8
    lr: float = 3e-4
    losses: str = "kl"
    data: str = ""
    top: int = 0
    seed: int = 0

    calibrated = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.lr < 1:
            raise BadInput(
                f"heal: steps={self.steps}, batch={self.batch}, lr={self.lr:g}: one step of one window at least"
            )

    def remake(
        self, checkpoint: Checkpoint, out: Path, batches: list[dict[str, np.ndarray]], progress: Progress
    ) -> None:
        """Train the model given and write it into the folder `out`. A killed run goes on at its last checkpoint."""
        self.expect(checkpoint)
        original = checkpoint.original or checkpoint
        data, length = self.data, 0
        if not data:
            windows = np.concatenate([batch["input_ids"] for batch in batches])
            length = windows.shape[1] - 1
            file = out.parent / "windows.npy"
            np.save(file, np.ascontiguousarray(windows))
            data = str(file)
        steps = self.losses.replace("+", " | ")
        recipe = f"{steps} | keep_zeros" if holds_zeros(checkpoint) else steps
        job, loop = shelf.find("train", "job"), shelf.find("train", "loop")
        made = out.parent / "healed"
        if not made.exists():
            loop.run(
                job.Job(
                    model=str(checkpoint.path), teacher=str(original.path), out=str(made), data=data, recipe=recipe,
                    steps=self.steps, batch=self.batch, length=length, learning_rate=self.lr, top=self.top,
                    warmup=max(1, self.steps // 20), save_every=max(1, self.steps // 4), seed=self.seed,
                ),
                progress,
            )  # fmt: skip
        for file in made.iterdir():
            if file.is_file():
                shutil.copyfile(file, out / file.name)

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same names and shapes. Raises Unsupported, BadInput."""
        if checkpoint.graph is not None or checkpoint.task.kind != "text-generation":
            raise Unsupported(
                f"heal learns from running text; {checkpoint.name} is for {checkpoint.task.kind}.\n"
                "Train it with labels: wherry train, and compress what that leaves."
            )
        if self.data and not Path(self.data.split(";")[0].split("*")[0]).exists():
            raise BadInput(f"heal: no such data: {self.data}")
        return checkpoint


def holds_zeros(checkpoint: Checkpoint, least: float = 0.01) -> bool:
    """Whether pruning left zeros in any matrix."""
    for name in checkpoint.names():
        tensor: Any = checkpoint.tensor(name)
        w = tensor.decode() if isinstance(tensor, QTensor) else tensor
        if w.ndim > 1 and float((w == 0).float().mean()) >= least:
            return True
    return False
