import io

import numpy as np
import pytest
from PIL import Image

from wherry import image
from wherry.errors import BadInput, Missing

NOISE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_a_processor_does_what_torch_does():
    """Shorter side to 40, centre 32 x 36, mean and std: against torch's own antialiased resize."""
    import torch

    processor = {
        "size": [32, 36], "resize": 40, "crop": True, "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    made = image.prepare([NOISE], processor)[0]
    x = torch.from_numpy(NOISE).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, (40, 60), mode="bilinear", antialias=True)[0, :, 4:36, 12:48] / 255
    mean, std = (torch.tensor(processor[k])[:, None, None] for k in ("mean", "std"))
    assert np.abs(made - ((x - mean) / std).numpy()).max() < 1.1 / 255 / 0.224  # Pillow rounds to bytes after each pass


def test_a_processor_does_what_transformers_does():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    theirs = ViTImageProcessorPil(size={"height": 24, "width": 24}, resample=3)(NOISE, return_tensors="np")
    ours = image.prepare(
        [NOISE], {"size": [24, 24], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    assert ours == pytest.approx(theirs["pixel_values"], abs=1e-5)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "webp", "gif", "jpeg"])
def test_formats_decode(kind):
    flat = Image.fromarray(np.full((9, 11, 3), 200, np.uint8))
    found = np.asarray(image.load(encoded(flat, kind)))
    assert found.shape == (9, 11, 3)
    assert np.abs(found.astype(int) - 200).max() <= 2
    image.check(encoded(flat, kind))


def test_unusual_modes_become_rgb():
    deep = Image.fromarray(np.full((4, 4), 51 * 257, np.uint16))
    assert np.asarray(image.load(encoded(deep, "png"))).ravel()[0] == 51
    for mode in ("1", "L", "P", "RGBA", "LA"):
        assert image.load(encoded(Image.new(mode, (4, 4)), "png")).mode == "RGB"
    assert image.load(encoded(Image.new("CMYK", (4, 4)), "jpeg")).mode == "RGB"
    clear = Image.new("P", (4, 4))
    clear.info["transparency"] = b"\x00" * 5
    assert image.load(clear).mode == "RGB"
    assert image.prepare([NOISE], {"size": [4, 5], "mode": "L"}).shape == (1, 1, 4, 5)
    assert image.prepare([NOISE], {"size": [4, 5], "layout": "NHWC"}).shape == (1, 4, 5, 3)
    with pytest.raises(BadInput, match="floating-point"):
        image.load(Image.new("F", (4, 4)))


def test_what_cannot_be_decoded_is_refused(tmp_path, monkeypatch):
    whole = encoded(Image.fromarray(NOISE), "png")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.jpg", "none.jpg"):
        for read in (image.load, image.check):
            with pytest.raises(BadInput, match="not a picture that can be decoded"):
                read(tmp_path / name)
    jpeg = encoded(Image.fromarray(NOISE), "jpeg")
    for read in (image.load, image.check):
        with pytest.raises(BadInput, match="truncated"):
            read(jpeg[: len(jpeg) // 2])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInput, match="decompression bomb"):
        image.load(whole)
    for wrong in (np.zeros((3, 3)), np.zeros((3, 3, 2), np.uint8), 7):
        with pytest.raises(BadInput, match="a picture"):
            image.load(wrong)


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        ({}, "size must be"),
        ({"size": [0, 4]}, "size must be"),
        ({"size": [4, 4], "interpolation": "best"}, "'best' is not known"),
        ({"size": [4, 4], "resize": 8}, "makes pictures of"),
        ({"size": [4, 4], "mean": [1, 2]}, "3 numbers each"),
        ({"size": [4, 4], "std": 0}, "std without 0"),
        ({"size": [4, 4], "layout": "CHW"}, "NCHW or NHWC"),
    ],
)
def test_faults_of_a_processor_are_said(processor, said):
    with pytest.raises(BadInput, match=said):
        image.prepare([NOISE], processor)


def film(path, count: int) -> None:
    """Frames that get brighter, one by one."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 + 8 * i, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def test_frames_of_a_video_in_order(tmp_path):
    film(tmp_path / "film.mp4", 20)
    kept, total = image.frames(tmp_path / "film.mp4", most=5)
    assert total == 20
    levels = [int(np.asarray(frame).mean()) for frame in kept]
    assert levels == pytest.approx([10 + 8 * i for i in (0, 4, 8, 12, 16)], abs=4)
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    with pytest.raises(BadInput, match="not a video"):
        image.frames(tmp_path / "bad.mp4")


def test_a_missing_package_has_its_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(Missing, match=r"pip install 'wherry\[vision\]'"):
        image.load(b"x")
