"""Perturbations: what cameras, microphones and people do to inputs, at three strengths, seeded.

Pictures: noise (its deviation, as a share of the range), blur (sigma, as a share of the shorter side), JPEG (quality).
Sound:    noise (signal to noise, in dB), clipping (at a share of the peak), a narrower band (share of the rate,
          there and back), MP3 (kbit/s).
Text:     typos (share of letters: swapped, dropped, doubled, or the key beside it), shorter and longer inputs (share of
          the words kept; times repeated).
Arrays:   noise (its deviation, as a share of the array's own).
Source:   after Hendrycks and Dietterich 2019, arXiv:1903.12261 (pictures), and Belinkov and Bisk 2018,
          arXiv:1711.02173 (typos); strengths are our own choice, mild to severe.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from wherry import audio, image
from wherry.task import WRITES, Task

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
BESIDE = {
    letter: [row[j] for j in (i - 1, i + 1) if 0 <= j < len(row)] for row in KEYS for i, letter in enumerate(row)
}
MP3_RATE = 16000
MP3_DELAY = 1105  # samples that encoder and decoder put before the sound: 576 + 529


@dataclass(frozen=True)
class Perturbation:
    """name and strength as the report calls them; apply(example, rng) gives the example as it comes in then."""

    name: str
    strength: str
    apply: Callable[[Any, np.random.Generator], Any]

    def __str__(self) -> str:
        return f"{self.name} {self.strength}"

    def all(self, examples: list[Any], seed: int = 0) -> list[Any]:
        """All examples, each with its own seed, so that every model sees the same."""
        return [self.apply(example, np.random.default_rng([seed, i])) for i, example in enumerate(examples)]


def of(task: Task) -> list[Perturbation]:
    """The perturbations that leave the label of such an example as it is, mild to severe."""
    if task.modality == "image":
        return [
            *_family("noise", (0.04, 0.08, 0.16), _noisy_picture, "{:g} of range"),
            *_family("blur", (0.01, 0.02, 0.04), _blurred, "{:g} of side"),
            *_family("jpeg", (50, 25, 10), _recompressed, "quality {}"),
        ]
    if task.modality == "audio":
        rate = int(task.processor.get("sampling_rate", 16000))
        sound = lambda change: lambda s: lambda x, r: (change(audio.load(x, rate), s, r), rate)  # noqa: E731
        return [
            *_family("noise", (20, 10, 0), sound(_noisy), "{} dB"),
            *_family("clipping", (0.5, 0.2, 0.1), sound(_clipped), "at {:g} of peak"),
            *_family("narrow band", (0.5, 0.25), sound(_narrow), "{:g} of rate"),
            *_family("mp3", (32, 16, 8), sound(lambda w, s, r: _mp3(w, s, rate)), "{} kbit/s"),
        ]
    if task.modality == "arrays":
        return _family("noise", (0.05, 0.1, 0.2), _noisy_arrays, "{:g} of deviation")
    found = _family("typos", (0.02, 0.05, 0.1), _typed, "{:.0%} of letters")
    if task.kind not in (*WRITES, "token-classification"):  # their labels change with the length
        found += _family("shorter", (0.75, 0.5), _shorter, "{:.0%} of words")
        found += _family("longer", (2, 4), _longer, "{} times")
    return found


def _family(
    name: str, strengths: tuple[Any, ...], make: Callable[[Any], Callable[[Any, Any], Any]], text: str
) -> list[Perturbation]:
    return [Perturbation(name, text.format(s), make(s)) for s in strengths]


def _noisy_picture(deviation: float) -> Callable[[Any, np.random.Generator], Any]:
    def apply(example: Any, rng: np.random.Generator) -> np.ndarray:
        pixels = np.asarray(image.load(example), np.float64)
        noise = rng.standard_normal(pixels.shape) * (255 * deviation)
        return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)

    return apply


def _blurred(share: float) -> Callable[[Any, np.random.Generator], Any]:
    def apply(example: Any, rng: np.random.Generator) -> Any:
        from scipy.ndimage import gaussian_filter

        pixels = np.asarray(image.load(example), np.float32)
        sigma = share * min(pixels.shape[:2])
        return np.rint(gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")).astype(np.uint8)

    return apply


def _recompressed(quality: int) -> Callable[[Any, np.random.Generator], Any]:
    def apply(example: Any, rng: np.random.Generator) -> bytes:
        buffer = io.BytesIO()
        image.load(example).save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    return apply


def _noisy(wave: np.ndarray, decibel: float, rng: np.random.Generator) -> np.ndarray:
    power = float(np.mean(wave.astype(np.float64) ** 2))
    noise = rng.standard_normal(len(wave)) * np.sqrt(power / 10 ** (decibel / 10))
    return (wave + noise).astype(np.float32)


def _clipped(wave: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    most = share * float(np.abs(wave).max())
    return np.clip(wave, -most, most)


def _narrow(wave: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    rate = round(1 / share)
    back = audio.resample(audio.resample(wave, rate, 1), 1, rate)
    return back[: len(wave)]


def _mp3(wave: np.ndarray, kilobits: int, rate: int) -> np.ndarray:
    """Through an MP3 of constant bit rate at 16 kHz, by libsndfile, whose levels run from 160 (0) to 8 kbit/s (1)."""
    import soundfile

    buffer, level = io.BytesIO(), min((160 - kilobits) / 152, 0.99)
    soundfile.write(
        buffer, audio.resample(wave, rate, MP3_RATE), MP3_RATE, format="MP3", subtype="MPEG_LAYER_III",
        bitrate_mode="CONSTANT", compression_level=level,
    )  # fmt: skip
    back, _ = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="float32")
    found = audio.resample(back[MP3_DELAY:], MP3_RATE, rate)[: len(wave)]
    return np.pad(found, (0, len(wave) - len(found)))


def _noisy_arrays(share: float) -> Callable[[Any, np.random.Generator], Any]:
    def apply(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        out = {}
        for name, value in example.items():
            array = np.asarray(value)
            loud = array.dtype.kind == "f" and array.size > 1
            out[name] = (
                (array + share * array.std() * rng.standard_normal(array.shape)).astype(array.dtype) if loud else array
            )
        return out

    return apply


def _texts(change: Callable[[str, np.random.Generator], str]) -> Callable[[Any, np.random.Generator], Any]:
    def apply(example: Any, rng: np.random.Generator) -> Any:
        if isinstance(example, str):
            return change(example, rng)
        return type(example)(change(part, rng) for part in example)

    return apply


def _typed(share: float) -> Callable[[Any, np.random.Generator], Any]:
    return _texts(lambda text, rng: typos(text, share, rng))


def typos(text: str, share: float, rng: np.random.Generator) -> str:
    """A text with about that share of its letters mistyped; never empty, spaces stay."""
    out, i = [], 0
    hit, way = rng.random(len(text)) < share, rng.integers(0, 4, len(text))
    while i < len(text):
        letter, following = text[i], text[i + 1 : i + 2]
        if not (hit[i] and letter.isalpha()):
            out.append(letter)
        elif way[i] == 0 and following.isalpha():
            out.append(following + letter)
            i += 1
        elif way[i] == 1 and len(text) > 1:
            out.append("")
        elif way[i] == 2 and letter.lower() in BESIDE:
            near = BESIDE[letter.lower()]
            found = near[int(rng.integers(len(near)))]
            out.append(found.upper() if letter.isupper() else found)
        else:
            out.append(letter * 2)
        i += 1
    return "".join(out) or text


def _shorter(share: float) -> Callable[[Any, np.random.Generator], Any]:
    def change(text: str, rng: np.random.Generator) -> str:
        words = text.split()
        return " ".join(words[: max(1, int(np.ceil(share * len(words))))]) or text

    return _texts(change)


def _longer(times: int) -> Callable[[Any, np.random.Generator], Any]:
    return _texts(lambda text, rng: " ".join([text] * times))
