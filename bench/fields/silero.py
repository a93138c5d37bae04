"""Silero VAD v6 at 16 kHz: 0.31M parameters, is there speech in each 32 ms; F1 of speech frames.

Source: package silero-vad (MIT), weights of its silero_vad_16k_sequence.onnx. Built here as one graph over all chunks
        of many recordings (recurrent state inside, zero at the start) and compared with the package's own streaming
        file, silero_vad.onnx, chunk by chunk.
Data:   FSDD digits laid into silence at drawn times and levels, with white or low-frequency noise 5 to 20 dB below the
        speech. A frame is speech where the clean clip's energy is within 30 dB of its loudest 10 ms, gaps below 100 ms
        closed; frames that such speech fills by 25% to 75% are not judged. So labels come from the clean clips' energy,
        not from people. Takes 0 and 1 calibrate (24 recordings of 4 s), takes 2 to 9 judge (96).
"""

from pathlib import Path

import numpy as np
import torch
from digits import RATE, SPEAKERS, TAKES, wave
from field import Feeds, Field, Run, export, package_folder, session, write_task
from torch import nn
from torch.nn import functional as F

CHUNK, CONTEXT, CHUNKS = 512, 64, 125
PACKAGE = "silero-vad==6.2.3"


class Silero(nn.Module):
    """Learned short-time spectrum, four convolutions, one LSTM over chunks, one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, 1, 1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, chunks: torch.Tensor) -> torch.Tensor:
        """Chunks with the 64 samples before each, [batch, chunks, 576], to probabilities of speech [batch, chunks]."""
        x = F.pad(chunks.flatten(0, 1), (0, 64), "reflect").unsqueeze(1)
        real, imaginary = self.stft_conv(x).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x, _ = self.lstm(x.squeeze(-1).unflatten(0, (-1, chunks.shape[1])))
        return self.final_conv(F.relu(x).transpose(1, 2)).sigmoid().squeeze(1)


def model(folder: Path) -> Silero:
    """The trained network: initializers of the package's sequence graph (its safetensors file is another version)."""
    import onnx

    graph = onnx.load(folder / "silero_vad_16k_sequence.onnx").graph
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    network = Silero()
    renamed = {"stft_conv.weight": stored["stft.forward_basis_buffer"]}
    places = {"output": "final_conv"} | {f"encoder.{i}": f"conv{i + 1}" for i in range(4)}
    renamed |= {
        f"{ours}.{leaf}": stored[f"{own}.{leaf}"] for own, ours in places.items() for leaf in ("weight", "bias")
    }
    node = next(node for node in graph.node if node.op_type == "LSTM")
    w, r, b = (stored[name][0] for name in node.input[1:4])
    parts = {"weight_ih": w, "weight_hh": r, "bias_ih": b[:512], "bias_hh": b[512:]}
    order = [0, 2, 3, 1]  # gates: ONNX says input, output, forget, cell; torch input, forget, cell, output
    renamed |= {
        f"lstm.{name}_l0": value.unflatten(0, (4, 128))[order].flatten(0, 1).clone() for name, value in parts.items()
    }
    network.load_state_dict(renamed)
    return network.eval()


def chunked(samples: np.ndarray) -> np.ndarray:
    """A wave [125 * 512] as the model's chunks float32 [125, 576]: each with the 64 samples before it."""
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    return np.stack([padded[i * CHUNK : i * CHUNK + CHUNK + CONTEXT] for i in range(CHUNKS)]).astype(np.float32)


def speech(clip: np.ndarray) -> np.ndarray:
    """Where a clean clip holds speech, bool [samples]: 10 ms within 30 dB of the loudest, gaps below 100 ms closed."""
    size = RATE // 100
    energy = np.add.reduceat(clip.astype(np.float64) ** 2, np.arange(0, len(clip), size))
    loud = np.flatnonzero(energy > energy.max() * 1e-3)
    active = np.zeros(len(energy), dtype=bool)
    for before, after in zip(loud, [*loud[1:], loud[-1]], strict=True):
        active[before : after if after - before < 10 else before + 1] = True
    active[loud[-1]] = True
    return np.repeat(active, size)[: len(clip)]


def recordings(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Waves [count, 64000] and labels [count, 125]: 1 speech, 0 none, -1 not judged; seeded."""
    drawn = np.random.default_rng(len(part))
    length, waves, labels = CHUNK * CHUNKS, [], []
    for number in range(count):
        speaker = SPEAKERS[number % len(SPEAKERS)]
        clean, active, at = (
            np.zeros(length, np.float32),
            np.zeros(length, dtype=bool),
            int(drawn.uniform(0.2, 1) * RATE),
        )
        while True:
            clip = wave(int(drawn.integers(10)), speaker, int(drawn.choice(TAKES[part])))
            clip = clip * np.float32(drawn.uniform(0.2, 1))
            if at + len(clip) > length:
                break
            clean[at : at + len(clip)] += clip
            active[at : at + len(clip)] |= speech(clip)
            at += len(clip) + int(drawn.uniform(0.2, 1.2) * RATE)
        noise = drawn.standard_normal(length)
        if number % 2:  # low-frequency: a first-order filter of white noise
            noise = np.convolve(noise, 0.97 ** np.arange(200), "same")
        level = np.sqrt((clean[active] ** 2).mean()) * 10 ** (-drawn.uniform(5, 20) / 20)
        waves.append((clean + noise / noise.std() * level).astype(np.float32))
        filled = active.reshape(CHUNKS, CHUNK).mean(1)
        labels.append(np.where(filled >= 0.75, 1, np.where(filled <= 0.25, 0, -1)))
    return np.stack(waves), np.stack(labels)


def compare(graph: Path, original: Path, samples: np.ndarray) -> float:
    """Largest difference of probabilities between our graph and the package's own ONNX file, called chunk by chunk."""
    chunks, theirs = chunked(samples), session(original)
    state, found = np.zeros((2, 1, 128), np.float32), []
    for chunk in chunks:
        answer = theirs({"input": chunk[None], "state": state, "sr": np.array(RATE, dtype=np.int64)})
        state = answer["stateN"]
        found.append(float(answer["output"][0, 0]))
    return float(np.abs(session(graph)({"chunks": chunks[None]})["speech"][0] - found).max())


def build(folder: Path) -> None:
    """Graph (compared with the package's), task, recordings with labels."""
    source = package_folder("silero_vad", PACKAGE) / "data"
    drawn = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=drawn) * 0.1 for shape in ((2, 9, 576), (3, 5, 576)))
    axes = {"chunks": {0: "batch", 1: "time"}}
    export(model(source), [first], folder / "model.onnx", axes, ["speech"], [second])
    for part, count in (("calibration", 24), ("held_out", 96)):
        waves, labels = recordings(part, count)
        np.savez(folder / f"{part}.npz", chunks=np.stack([chunked(samples) for samples in waves]), label=labels)
    error = compare(folder / "model.onnx", source / "silero_vad.onnx", waves[0])
    if error > 1e-4:
        raise SystemExit(f"this graph's probabilities differ from the package's by {error:.1e}")
    write_task(
        folder, "voice-activity-detection", inputs=["chunks"], outputs=["speech"], labels=["silence", "speech"],
        processor={"sampling_rate": RATE, "features": "wave"}, held_out=["fsdd/takes-2-9"],
    )  # fmt: skip


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """One recording each."""
    return {"model": [{"chunks": chunks[None]} for chunks in np.load(folder / "calibration.npz")["chunks"]]}


def judge(folder: Path, run: Run) -> np.ndarray:
    """True positives, false positives, false negatives [recordings, 3] at a probability of 0.5."""
    held_out, units = np.load(folder / "held_out.npz"), []
    for chunks, label in zip(held_out["chunks"], held_out["label"], strict=True):
        said = run("model", {"chunks": chunks[None]})["speech"][0] >= 0.5
        units.append((said & (label == 1), said & (label == 0), ~said & (label == 1)))
    return np.array(units).sum(-1).astype(float)


def example(folder: Path) -> dict[str, Feeds]:
    """One recording of 4 s."""
    return {"model": {"chunks": np.load(folder / "calibration.npz")["chunks"][:1]}}


FIELD = Field(
    "silero", "Silero VAD, F1 of speech frames", "f1", build, calibration, judge, example,
    "digits laid into noise; labels from the clean clips' energy; 24 recordings calibrate, 96 judge",
)  # fmt: skip
