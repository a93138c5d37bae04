"""Sound: decoded, mixed to one channel, resampled, and turned into waves or log-mel features as a processor says.

Shapes: a wave is float32 [samples] in [-1, 1]; features [mels, frames]; batches have a first axis more.
Source: Radford et al. 2022, arXiv:2212.04356, and transformers' WhisperFeatureExtractor: periodic Hann window, power
        spectrum, Slaney's mel scale with unit area, log10, floor 8 below the loudest, (x + 4) / 4. Resampling:
        scipy.signal.resample_poly. Numpy alone computes the features, so that a server needs neither torch nor scipy.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from wherry.errors import BadInput
from wherry.shelf import missing

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au")
KEYS = ("sampling_rate", "features", "n_mels", "n_fft", "hop_length", "frames", "normalize", "layout", "window",
        "context", "threshold", "state", "constants")  # fmt: skip


def load(example: Any, sampling_rate: int) -> np.ndarray:
    """A wave float32 [samples] at `sampling_rate` Hz.

    Args:
        example: a path or bytes of a sound file, an array [samples] that has this rate already, or a tuple
            (array, its rate). Several channels are averaged.

    Raises:
        BadInput: it cannot be decoded, is empty, or has values that are not finite. Missing: a package.
    """
    name, rate = "this sound", sampling_rate
    if isinstance(example, str | Path | bytes):
        name = name if isinstance(example, bytes) else str(example)
        wave, rate = _decode(example, name)
    elif isinstance(example, tuple) and len(example) == 2:
        wave, rate = np.asarray(example[0]), int(example[1])
    else:
        wave = np.asarray(example)
    if wave.dtype.kind in "iu":
        wave = wave / float(np.iinfo(wave.dtype).max + 1)
    if wave.dtype.kind != "f" or wave.ndim not in (1, 2):
        raise BadInput(f"{name} is not a wave [samples], but {wave.dtype} {wave.shape}")
    if wave.ndim == 2:  # [samples, channels], as soundfile; [channels, samples] where that is plainly meant
        wave = wave.mean(1 if wave.shape[0] >= wave.shape[1] else 0)
    if not len(wave):
        raise BadInput(f"{name} has no samples")
    if not np.isfinite(wave).all():
        raise BadInput(f"{name} has samples that are not finite")
    return resample(wave.astype(np.float32), rate, sampling_rate)


def check(example: str | Path | bytes) -> None:
    """Decode a sound at its own rate; raises BadInput as `load` does."""
    wave, _ = _decode(example, "this sound" if isinstance(example, bytes) else str(example))
    if not len(wave) or not np.isfinite(wave).all():
        raise BadInput("no samples, or some that are not finite")


def _decode(example: str | Path | bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise missing(error, "reading sounds") from error
    try:
        return soundfile.read(io.BytesIO(example) if isinstance(example, bytes) else str(example), dtype="float32")
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise BadInput(f"{name} is not a sound that can be decoded: {' '.join(str(error).split())[:160]}") from error


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A wave [samples] at another rate; float32 [ceil(samples * wanted / rate)]."""
    if rate <= 0 or wanted <= 0:
        raise BadInput(f"a sampling rate must be above 0, not {min(rate, wanted)}")
    if rate == wanted:
        return wave.astype(np.float32)
    try:
        from scipy.signal import resample_poly
    except ModuleNotFoundError as error:
        raise missing(error, f"a sound of {rate} Hz for a model of {wanted} Hz") from error
    common = gcd(rate, wanted)
    return resample_poly(wave.astype(np.float64), wanted // common, rate // common).astype(np.float32)


@lru_cache(maxsize=8)
def mel_filters(n_mels: int, n_fft: int, sampling_rate: int) -> np.ndarray:
    """Triangular filters float64 [n_mels, n_fft // 2 + 1] on Slaney's mel scale from 0 to half the rate, unit area."""

    def hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    half = sampling_rate / 2
    top = half * 3 / 200 if half < 1000 else 15 + 27 / np.log(6.4) * np.log(half / 1000)
    edges = hertz(np.linspace(0, top, n_mels + 2))
    bins = np.linspace(0, half, n_fft // 2 + 1)
    rise = (bins[None] - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins[None]) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]


def log_mel(
    wave: np.ndarray, sampling_rate: int = 16000, n_mels: int = 80, n_fft: int = 400, hop_length: int = 160
) -> np.ndarray:
    """Whisper's features float32 [n_mels, samples // hop_length] of a wave [samples] of more than n_fft / 2 samples."""
    if len(wave) <= n_fft // 2:
        raise BadInput(f"{len(wave)} samples are too few for a window of {n_fft}: more than half of it are wanted")
    padded = np.pad(wave.astype(np.float64), n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    count = len(wave) // hop_length
    view = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length][:count]
    power = np.abs(np.fft.rfft(view * window, axis=-1)) ** 2
    logs = np.log10(np.maximum(mel_filters(n_mels, n_fft, sampling_rate) @ power.T, 1e-10))
    return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)


def prepare(examples: Sequence[Any], processor: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Raw sounds to a float32 batch, and a mask int64 [n, samples or frames] that is 1 where there is sound.

    features "wave": [n, samples] ([n, 1, samples] with layout "NCT"), padded with zeros to `frames` samples, else to
    the longest; "chunks": [n, chunks, context + window], each with the last samples of the one before it; "log-mel":
    [n, n_mels, frames], the wave padded or cut to frames * hop_length samples, as Whisper does.
    normalize: each wave to mean 0 and variance 1 first (wav2vec2).
    """
    rate, kind = int(processor.get("sampling_rate", 16000)), processor.get("features", "wave")
    waves = [load(example, rate) for example in examples]
    if processor.get("normalize"):
        waves = [(wave - wave.mean()) / np.sqrt(wave.var() + 1e-7) for wave in waves]
    frames = int(processor.get("frames") or 0)
    if kind == "wave":
        length = frames or max(len(wave) for wave in waves)
        batch, mask = _padded(waves, length)
        return (batch[:, None] if processor.get("layout") == "NCT" else batch), mask
    if kind == "chunks":
        return _chunks(waves, processor)
    if kind != "log-mel":
        raise BadInput(f"the processor's features '{kind}' are not known: wave, log-mel or chunks")
    n_fft, hop = int(processor.get("n_fft", 400)), int(processor.get("hop_length", 160))
    length = frames * hop or max(max(len(wave) for wave in waves), n_fft)
    batch, mask = _padded(waves, length)
    mels = int(processor.get("n_mels", 80))
    return np.stack([log_mel(wave, rate, mels, n_fft, hop) for wave in batch]), mask[:, ::hop][:, : length // hop]


def _chunks(waves: Sequence[np.ndarray], processor: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    window, context = int(processor.get("window") or 0), int(processor.get("context") or 0)
    if window < 1:
        raise BadInput("task.json: features of chunks need `window`, the samples of a chunk")
    count = int(processor.get("frames") or 0) or max(-(-len(wave) // window) for wave in waves)
    batch, mask = _padded(waves, count * window)
    padded = np.pad(batch, ((0, 0), (context, 0)))
    view = np.lib.stride_tricks.sliding_window_view(padded, context + window, axis=1)[:, ::window]
    return np.ascontiguousarray(view), mask[:, ::window]


def _padded(waves: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    batch, mask = np.zeros((len(waves), length), np.float32), np.zeros((len(waves), length), np.int64)
    for i, wave in enumerate(waves):
        cut = wave[:length]
        batch[i, : len(cut)] = cut
        mask[i, : len(cut)] = 1
    return batch, mask
