"""Spoken digits (FSDD, 8 kHz, 6 speakers, ten takes of each digit) as waves of 16 kHz, and strings of them.

Source: Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0. Takes 0 and 1 calibrate, takes 2 to 9 judge.
"""

from functools import cache
from pathlib import Path

import numpy as np
from field import data_folder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
RATE, TAKES = 16000, {"calibration": (0, 1), "held_out": tuple(range(2, 10))}


@cache
def wave(digit: int, speaker: str, take: int) -> np.ndarray:
    """One clip, float32 [samples] at 16 kHz, its peak at 0.5."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    rate, samples = wavfile.read(data_folder() / "fsdd" / f"{digit}_{speaker}_{take}.wav")
    loud = resample_poly(samples.astype(np.float64), RATE // rate, 1)
    return (loud * (0.5 / np.abs(loud).max())).astype(np.float32)


def strings(part: str, length: int, takes: int) -> list[tuple[np.ndarray, list[int]]]:
    """Waves of `length` digits by one speaker each, the part's first takes once each, and which digits.

    Half a second of silence before and after, 0.2 to 0.4 s between, faint noise (-60 dB) throughout; seeded.
    """
    drawn, found = np.random.default_rng(0), []
    for speaker in SPEAKERS:
        clips = [(digit, take) for digit in range(10) for take in TAKES[part][:takes]]
        order = drawn.permutation(len(clips))
        for start in range(0, len(clips), length):
            chosen = [clips[i] for i in order[start : start + length]]
            pieces = [np.zeros(RATE // 2, np.float32)]
            for digit, take in chosen:
                pieces += [wave(digit, speaker, take), np.zeros(int(RATE * drawn.uniform(0.2, 0.4)), np.float32)]
            whole = np.concatenate([*pieces, np.zeros(RATE // 2, np.float32)])
            noise = drawn.standard_normal(len(whole)) * 0.001
            found.append(((whole + noise).astype(np.float32), [digit for digit, _ in chosen]))
    return found


def save_wave(file: Path, samples: np.ndarray) -> None:
    """A wave as 16-bit PCM."""
    from scipy.io import wavfile

    wavfile.write(file, RATE, np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16))
