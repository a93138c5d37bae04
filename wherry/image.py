"""Images and video frames: decoded, resized, cropped and scaled as a model's processor says. Pillow; PyAV for video.

Shapes: a picture is RGB (or one channel, `mode` "L") of any size; inputs are float32 [batch, channels, height, width].
Source: the order is that of torchvision's and transformers' processors: resize, centre crop, scale, mean, std. EXIF
        orientation is not applied, as there.
Cost:   one decoded picture at a time, and the batch.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wherry.errors import BadInput, Unsupported
from wherry.shelf import missing

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # others of Pillow's start programs or are seldom tested
KEYS = ("size", "resize", "crop", "interpolation", "mean", "std", "scale", "layout", "mode")
FRAMES_MOST = 256  # of a video; evenly spaced beyond


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise missing(error, "reading images") from error
    return Image


def load(example: Any, mode: str = "RGB") -> Any:
    """A decoded PIL picture of `mode` from a path, bytes, a PIL picture, or an array uint8 [h, w] or [h, w, 3].

    16-bit grey becomes 8-bit by dropping the low byte; transparency is drawn on black, as transformers does.

    Raises:
        BadInput: it cannot be decoded, is truncated, too large to be honest, or not an array of that kind.
    """
    image = _pillow()
    if isinstance(example, np.ndarray):
        if example.dtype != np.uint8 or not (example.ndim == 2 or example.ndim == 3 and example.shape[2] in (3, 4)):
            raise BadInput(
                f"a picture must be uint8 [height, width] or [height, width, 3], not {example.dtype} {example.shape}"
            )
        return image.fromarray(example).convert(mode)
    if isinstance(example, image.Image):
        return _plain(example, mode)
    source = io.BytesIO(example) if isinstance(example, bytes) else example
    name = "these bytes" if isinstance(example, bytes) else str(example)
    if not isinstance(source, io.BytesIO | str | Path):
        raise BadInput(f"a picture is a path, bytes, a PIL picture or an array, not a {type(example).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of odd metadata; the pixels are what counts
            with image.open(source, formats=FORMATS) as found:
                found.load()
                return _plain(found, mode)
    except (OSError, ValueError, SyntaxError, EOFError, Warning, image.DecompressionBombError) as error:
        raise BadInput(f"{name} is not a picture that can be decoded: {_short(error)}") from error


def check(example: Any) -> None:
    """Decode a picture as coarsely as its format allows; raises BadInput as `load` does. Cheaper for JPEG."""
    image = _pillow()
    if not isinstance(example, str | Path | bytes):
        load(example)
        return
    source = io.BytesIO(example) if isinstance(example, bytes) else example
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            with image.open(source, formats=FORMATS) as found:
                found.draft("RGB", (8, 8))
                found.load()
    except (OSError, ValueError, SyntaxError, EOFError, Warning, image.DecompressionBombError) as error:
        raise BadInput(f"not a picture that can be decoded: {_short(error)}") from error


def _plain(found: Any, mode: str) -> Any:
    if found.mode.startswith("I"):  # 16 bits: convert() would clip instead of scaling
        deep = np.asarray(found).astype(np.int64)
        found = _pillow().fromarray((np.clip(deep, 0, 65535) >> 8).astype(np.uint8))
    elif found.mode == "F":
        raise BadInput("a picture of floating-point numbers has no fixed range: save it with 8 or 16 bits")
    elif found.mode == "P" and "transparency" in found.info:
        found = found.convert("RGBA")
    return found.convert(mode)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def pair(value: Any, name: str) -> tuple[int, int]:
    """[height, width] as two whole numbers above 0; a single number is a square."""
    found = [value, value] if isinstance(value, int) else value
    if not (isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found)):
        raise BadInput(f"the processor's {name} must be [height, width], not {value!r}")
    return found[0], found[1]


def shape(picture: Any, processor: dict[str, Any]) -> Any:
    """Resize and crop one PIL picture as the processor says, to its `size`.

    resize: whole number = the shorter side, the other one keeping the ratio; [h, w] = both. Without resize and crop,
    the picture is stretched to `size`. crop: [h, w], or true for `size`: the centre.
    """
    image = _pillow()
    methods = {name: image.Resampling[name.upper()] for name in ("nearest", "box", "bilinear", "bicubic", "lanczos")}
    name = processor.get("interpolation", "bilinear")
    if name not in methods:
        raise BadInput(f"the processor's interpolation '{name}' is not known; there are: {', '.join(methods)}")
    size, resize, crop = pair(processor.get("size"), "size"), processor.get("resize"), processor.get("crop")
    width, height = picture.size
    if isinstance(resize, int) and not isinstance(resize, bool):
        short = min(width, height)
        wanted = (max(1, resize * height // short), max(1, resize * width // short))
    else:
        wanted = pair(resize, "resize") if resize else (height, width) if crop else size
    if wanted != (height, width):
        picture = picture.resize((wanted[1], wanted[0]), methods[name])
    if crop:
        cut = size if crop is True else pair(crop, "crop")
        left, top = (wanted[1] - cut[1]) // 2, (wanted[0] - cut[0]) // 2
        picture = picture.crop((left, top, left + cut[1], top + cut[0]))  # beyond the edge: black
    if picture.size != (size[1], size[0]):
        raise BadInput(f"the processor makes pictures of {picture.size[::-1]}, the model wants {size}: mend task.json")
    return picture


def numbers(picture: Any, processor: dict[str, Any]) -> np.ndarray:
    """A shaped PIL picture as float32 [channels, height, width] (or [height, width, channels], layout "NHWC")."""
    array = np.asarray(picture, dtype=np.float32)
    array = array[..., None] if array.ndim == 2 else array
    array = array * np.float32(processor.get("scale", 1 / 255))
    mean, std = (np.asarray(processor.get(key, default), np.float32) for key, default in (("mean", 0), ("std", 1)))
    if any(part.shape not in ((), (1,), (array.shape[-1],)) for part in (mean, std)) or not std.all():
        raise BadInput(f"the processor's mean and std must be {array.shape[-1]} numbers each, std without 0")
    array = (array - mean) / std
    layout = processor.get("layout", "NCHW")
    if layout not in ("NCHW", "NHWC"):
        raise BadInput(f"the processor's layout '{layout}' is not known: NCHW or NHWC")
    return np.ascontiguousarray(array.transpose(2, 0, 1) if layout == "NCHW" else array)


METHODS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}  # Pillow's numbers
FOREIGN = ("do_flip_channel_order", "do_pad", "rescale_offset", "do_convert_grayscale", "do_random_crop")


def processor(facts: dict[str, Any], channels: int = 3) -> dict[str, Any]:
    """A task's processor from the preprocessor_config.json of transformers.

    Raises:
        Unsupported: a step that is not made here, or pictures that would be of many sizes.
    """
    if used := [name for name in FOREIGN if facts.get(name)]:
        raise Unsupported(f"preprocessor_config.json asks for {used[0]}, which is not made here: write a task.json")
    if facts.get("resample", 2) not in METHODS:
        raise Unsupported(f"preprocessor_config.json: resampling {facts['resample']} is not known here")
    size, crop = _extents(facts.get("size")), _extents(facts.get("crop_size"))
    cropped = facts.get("do_center_crop", crop is not None)
    made: dict[str, Any] = {"interpolation": METHODS[facts.get("resample", 2)]}
    if isinstance(size, int) and facts.get("crop_pct"):  # ConvNeXT and ResNet: larger, then the centre
        made |= {"size": [size, size]}
        made |= {"resize": int(size / facts["crop_pct"]), "crop": True} if size < 384 else {}
    elif cropped and crop:
        made |= {"size": [crop, crop] if isinstance(crop, int) else crop, "crop": True}
        made |= {"resize": size} if size and facts.get("do_resize", True) else {}
    elif isinstance(size, list) or isinstance(facts.get("size"), int):
        made |= {"size": size if isinstance(size, list) else [size, size]}
    if "size" not in made or not facts.get("do_resize", True) and not made.get("crop"):
        raise Unsupported("preprocessor_config.json makes pictures of many sizes; a graph has one: write a task.json")
    if facts.get("do_normalize", True):
        made |= {key: list(facts.get(f"image_{key}") or [0.5] * channels) for key in ("mean", "std")}
    made["scale"] = float(facts.get("rescale_factor", 1 / 255)) if facts.get("do_rescale", True) else 1.0
    return made | ({"mode": "L"} if channels == 1 else {})


def _extents(value: Any) -> Any:
    """Size as [height, width], or a whole number: the shorter side (or, as a number alone, both)."""
    if isinstance(value, dict):
        both = value.get("height"), value.get("width")
        return list(both) if all(both) else value.get("shortest_edge")
    return list(value) if isinstance(value, tuple | list) else value


def prepare(examples: Sequence[Any], processor: dict[str, Any]) -> np.ndarray:
    """Raw pictures to one float32 batch [n, channels, height, width]. Raises BadInput as `load`, naming the picture."""
    mode = processor.get("mode", "RGB")
    return np.stack([numbers(shape(load(example, mode), processor), processor) for example in examples])


def frames(path: Path, most: int = FRAMES_MOST) -> tuple[list[Any], int]:
    """At most `most` evenly spaced frames of a video as RGB PIL pictures, and how many frames it has.

    Cost: two passes over the file, the first without making pictures; memory: the kept frames.

    Raises:
        BadInput: no video stream, or it cannot be decoded.
    """
    total = sum(1 for _ in _decoded(path))
    if not total:
        raise BadInput(f"{path} has no frame")
    kept = {i * total // min(most, total) for i in range(min(most, total))}
    return [frame.to_image() for i, frame in enumerate(_decoded(path)) if i in kept], total


def _decoded(path: Path) -> Iterator[Any]:
    try:
        import av
    except ModuleNotFoundError as error:
        raise missing(error, "reading videos") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadInput(f"{path} has no video stream")
            yield from container.decode(video=0)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadInput(f"{path} is not a video that can be decoded: {_short(error)}") from error
