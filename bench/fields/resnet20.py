"""ResNet-20 on CIFAR-10: 0.27M parameters, 32 x 32 images, ten classes.

Source: weights of akamaster/pytorch_resnet_cifar10 (BSD-2), He et al. 2015, arXiv:1512.03385, section 4.2.
Data:   JPEG copies of CIFAR-10 (lossy: float accuracy is 0.80, not the 0.92 of the original files). 128 training images
        calibrate, 1000 test images judge.
"""

import csv
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from field import Feeds, Field, Run, data_folder, export, read_task, write_task
from torch import nn
from torch.nn import functional as F

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CALIBRATED = 128


class Block(nn.Module):
    """Two convolutions; the shortcut takes every other pixel and pads channels with zeros."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.pad = 0 if before == after else after // 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, before, h, w] to [batch, after, h / stride, w / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu(y + short)


class ResNet20(nn.Module):
    """Three stages of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            first = Block(before, after, 1 if before == after else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, Block(after, after, 1), Block(after, after, 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, 3, 32, 32] to logits [batch, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def model() -> ResNet20:
    """The trained network."""
    state = torch.load(data_folder() / "models" / "resnet20-12fca82f.th", weights_only=True, map_location="cpu")
    network = ResNet20()
    network.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
    return network.eval()


def write_pictures(folder: Path, found: list[tuple[bytes, str]]) -> None:
    """JPEG files as they are, numbered, with labels.csv beside them."""
    folder.mkdir()
    lines = [["file", "label"]]
    for number, (raw, label) in enumerate(found):
        lines.append([f"{number:04}.jpg", label])
        (folder / lines[-1][0]).write_bytes(raw)
    with open(folder / "labels.csv", "w", encoding="utf8", newline="") as opened:
        csv.writer(opened).writerows(lines)


@cache
def read_pictures(folder: Path) -> tuple[list[np.ndarray], list[int]]:
    """Pictures prepared as the task says, float32 [1, 3, h, w] each, and the labels' numbers."""
    from wherry import image

    task = read_task(folder.parent)
    with open(folder / "labels.csv", encoding="utf8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    pictures = [image.prepare([folder / row["file"]], task["processor"]) for row in rows]
    return pictures, [task["labels"].index(row["label"]) for row in rows]


def build(folder: Path) -> None:
    """Graph, task, 128 calibration images drawn from the training images with a seed, 1000 test images."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32))
    export(model(), [x], folder / "model.onnx", {"pixel_values": {0: "batch"}}, ["logits"])
    source = data_folder() / "cifar10"
    labels = sorted(path.name for path in source.iterdir() if path.is_dir())
    with zipfile.ZipFile(source / "train.zip") as train:
        names = sorted(name for name in train.namelist() if name.endswith(".jpg"))
        drawn = np.random.default_rng(0).choice(len(names), CALIBRATED, replace=False)
        chosen = [(train.read(names[i]), Path(names[i]).parent.name) for i in drawn]
    write_pictures(folder / "calibration", chosen)
    files = [file for label in labels for file in sorted((source / label).glob("*.jpg"))]
    write_pictures(folder / "held_out", [(file.read_bytes(), file.parent.name) for file in files])
    processor = {"size": [32, 32], "mean": MEAN, "std": STD, "scale": 1 / 255, "layout": "NCHW"}
    write_task(
        folder, "image-classification", inputs=["pixel_values"], outputs=["logits"], labels=labels, processor=processor,
        training=["cifar10/train"], held_out=["cifar10/test"],
    )  # fmt: skip


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """One image each."""
    return {"model": [{"pixel_values": picture} for picture in read_pictures(folder / "calibration")[0]]}


def judge(folder: Path, run: Run) -> np.ndarray:
    """Hits [images, 1]: is the largest logit the label's?"""
    pictures, labels = read_pictures(folder / "held_out")
    answers = [run("model", {"pixel_values": picture})["logits"][0].argmax() for picture in pictures]
    return (np.array(answers) == labels)[:, None].astype(float)


def example(folder: Path) -> dict[str, Feeds]:
    """One image."""
    return {"model": {"pixel_values": read_pictures(folder / "calibration")[0][0]}}


FIELD = Field(
    "resnet20", "ResNet-20, CIFAR-10 accuracy", "mean", build, calibration, judge, example,
    "128 training images calibrate, 1000 test images judge; lossy JPEG copies",
)  # fmt: skip
