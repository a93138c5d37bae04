"""Voice activity detection: precision, recall and F1 of frames that hold speech, pooled over all clips.

Shapes: answers: float64 [frames, 2] per clip, probability and middle in seconds; targets: float64 [spans, 2] of speech
        in seconds, or 0 and 1 of each frame [frames].
Idea:   a frame is speech when its middle lies in a span. A graph with a state (`processor.state`) is fed window by
        window, each with the last `context` samples of the one before it; else the clip goes through at once.
Source: the streaming loop is that of silero-vad's own OnnxWrapper. Threshold 0.5 unless the processor says otherwise.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry import audio
from wherry.errors import BadInput
from wherry.evaluate.metric import Metric, f1, ratio
from wherry.report import Report
from wherry.session import Session
from wherry.task import Task


def say(session: Session, task: Task, examples: Sequence[Any]) -> list[np.ndarray]:
    """Frames of (probability of speech, its middle in seconds): float64 [frames, 2] of each clip of one batch."""
    if isinstance(examples[0], dict):
        inputs = task.prepare(examples)
        found = np.asarray(task.main(session.predict(inputs)), np.float64).reshape(len(examples), -1)
        return [np.stack([row, np.arange(len(row)) + 0.5], 1) for row in found]
    rate = int(task.processor.get("sampling_rate", 16000))
    waves = [audio.load(example, rate) for example in examples]
    window = int(task.processor.get("window", 0))
    if "state" in task.processor:
        if window <= 0:
            raise BadInput("task.json: a processor with a state needs `window`, the samples of a step")
        found = _stepped(session, task, waves, window)
    else:
        inputs = task.prepare([(wave, rate) for wave in waves])
        found = np.asarray(task.main(session.predict(inputs)))
        found = found.reshape(len(waves), -1)
        window = window or max(len(wave) for wave in waves) // found.shape[1]
    middle = (np.arange(found.shape[1]) + 0.5) * window / rate
    out = []
    for wave, row in zip(waves, found, strict=True):
        count = min(len(row), -(-len(wave) // window))
        out.append(np.stack([row[:count].astype(np.float64), middle[:count]], 1))
    return out


def _stepped(session: Session, task: Task, waves: list[np.ndarray], window: int) -> np.ndarray:
    """Probabilities [clips, steps]: all clips side by side, padded with silence to the longest."""
    many, context = len(waves), int(task.processor.get("context", 0))
    steps = max(-(-len(wave) // window) for wave in waves)
    padded = np.zeros((many, context + steps * window), np.float32)
    for i, wave in enumerate(waves):
        padded[i, context : context + len(wave)] = wave
    shapes: dict[str, list[int]] = task.processor["state"]
    state = {name: np.zeros([many if n < 0 else n for n in shape], np.float32) for name, shape in shapes.items()}
    fixed = {name: np.array(value) for name, value in task.processor.get("constants", {}).items()}
    if len(task.outputs) != 1 + len(state):
        raise BadInput(f"task.json: outputs must be the probability and then the next {', '.join(state)}")
    found = []
    for i in range(steps):
        part = padded[:, i * window : (i + 1) * window + context]
        outputs = session.predict({task.inputs[0]: part, **state, **fixed})
        found.append(np.asarray(task.main(outputs)).reshape(many))
        state = {name: outputs[after] for name, after in zip(state, task.outputs[1:], strict=True)}
    return np.stack(found, 1)


def metrics(said: Sequence[np.ndarray], wanted: Sequence[np.ndarray], task: Task) -> list[Metric]:
    """Frame F1, precision, recall, and accuracy; clips are what is drawn."""
    threshold = float(task.processor.get("threshold", 0.5))
    counts = np.zeros((5, len(said)))
    for i, (frames, spans) in enumerate(zip(said, wanted, strict=True)):
        told = frames[:, 0] >= threshold
        true: np.ndarray
        if spans.ndim == 1:
            if len(spans) != len(told):
                raise BadInput(f"clip {i} has {len(spans)} labels, the model gives {len(told)} frames")
            true = spans > 0
        else:
            true = np.any((frames[:, 1:] >= spans[:, 0]) & (frames[:, 1:] < spans[:, 1]), 1)
        counts[:, i] = (told & true).sum(), told.sum(), true.sum(), (told == true).sum(), len(told)
    note = f"{int(counts[4].sum())} frames, {int(counts[2].sum())} of speech, threshold {threshold:g}"
    return [*f1("frame", counts[:3], note), ratio("frame accuracy", counts[3], counts[4], note=note)]


def details(said: Sequence[Any], wanted: Sequence[Any], task: Task, where: str) -> Report:
    """Nothing more."""
    return Report()
