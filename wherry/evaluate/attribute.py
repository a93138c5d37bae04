"""Attribution: which parts of one input speak for a model's answer, and whether compressing changed that.

Idea:   occlusion: hide one part, see how much the answer's score falls. Parts: words; patches of a picture (filled
        with its mean colour); cells of time and frequency of a sound (silenced). Neighbouring patches and cells overlap
        by half. It needs nothing but `predict`, so it works on every runtime, int8 kernels included.
        The score is the log-probability of the class that the *first* model chose, for both models; for pairs of
        sentences their cosine; for a single sentence the cosine with its own embedding; for voice the mean probability;
        for boxes the sum of their scores.
Shapes: heat float64: [words], [rows, columns] or [bands, steps]; above 0 speaks for the answer.
Source: Zeiler and Fergus 2014, arXiv:1311.2901 (pictures); Li et al. 2016, arXiv:1612.08220 (words). Gradients:
        Sundararajan et al. 2017, arXiv:1703.01365, by Captum, for torch modules.
Cost:   one call per part: words, 14 x 14 patches, or 8 x 24 cells.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wherry import audio, image
from wherry.errors import BadInput, Unsupported
from wherry.evaluate import detection, similarity, voice
from wherry.evaluate.perplexity import Progress, silent
from wherry.session import Session
from wherry.task import Task

PATCHES = 14
BANDS, STEPS = 8, 24
BATCH = 16
SIDE = 320  # longer pictures are made smaller first


@dataclass(frozen=True)
class Heat:
    """heat: see above. answer: what the model says of the whole input, in words. score: of the whole input."""

    heat: np.ndarray
    answer: str
    score: float


@dataclass(frozen=True)
class Parts:
    """An input cut up. shape: of the heat. shown: what a picture of it shows (words, pixels [h, w, 3], a wave [t]).

    hidden: yields (example without a part, boolean mask of the shape where the part was).
    """

    shape: tuple[int, ...]
    shown: Any
    whole: Any
    hidden: Callable[[], Iterator[tuple[Any, np.ndarray]]]


def parts(task: Task, example: Any) -> Parts:
    """Cut one raw example into parts that can be hidden. Raises BadInput as the task's `prepare` does."""
    if task.modality == "image":
        return _patches(example)
    if task.modality == "audio":
        return _cells(example, int(task.processor.get("sampling_rate", 16000)))
    if task.modality == "text":
        return _words(example)
    raise Unsupported("arrays have no parts that a person would know: explain works on texts, pictures and sounds")


def _words(example: Any) -> Parts:
    texts = list(example) if isinstance(example, tuple) else [example]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadInput("a text with at least one word is wanted")
    words = [(i, word) for i, text in enumerate(texts) for word in re.findall(r"\S+", text)]

    def hidden() -> Iterator[tuple[Any, np.ndarray]]:
        for j in range(len(words)):
            left = [" ".join(w for k, (i, w) in enumerate(words) if i == t and k != j) for t in range(len(texts))]
            yield (tuple(left) if isinstance(example, tuple) else left[0]), np.arange(len(words)) == j

    return Parts((len(words),), [word for _, word in words], example, hidden)


def _patches(example: Any) -> Parts:
    picture = image.load(example)
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE))
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    grid = min(PATCHES, height, width)
    rows, columns = (np.linspace(0, n, grid + 1).astype(int) for n in (height, width))
    fill = pixels.reshape(-1, 3).mean(0).astype(np.uint8)

    def hidden() -> Iterator[tuple[Any, np.ndarray]]:
        for i in range(-1, grid):
            for j in range(-1, grid):
                mask = np.zeros((grid, grid), bool)
                mask[max(i, 0) : i + 2, max(j, 0) : j + 2] = True
                without = pixels.copy()
                bottom, right = rows[min(i + 2, grid)], columns[min(j + 2, grid)]
                without[rows[max(i, 0)] : bottom, columns[max(j, 0)] : right] = fill
                yield without, mask

    return Parts((grid, grid), pixels, pixels, hidden)


def _cells(example: Any, rate: int) -> Parts:
    from scipy.signal import istft, stft

    wave = audio.load(example, rate)
    if len(wave) < 1024:
        raise BadInput(f"{len(wave)} samples are too few to be cut into {STEPS} steps: 1024 or more are wanted")
    _, _, spectrum = stft(wave, nperseg=256)
    lows = np.linspace(0, spectrum.shape[0], BANDS + 1).astype(int)
    times = np.linspace(0, spectrum.shape[1], min(STEPS, spectrum.shape[1]) + 1).astype(int)
    shape = (BANDS, len(times) - 1)

    def hidden() -> Iterator[tuple[Any, np.ndarray]]:
        for i in range(-1, shape[0]):
            for j in range(-1, shape[1]):
                mask = np.zeros(shape, bool)
                mask[max(i, 0) : i + 2, max(j, 0) : j + 2] = True
                high, end = lows[min(i + 2, shape[0])], times[min(j + 2, shape[1])]
                without = spectrum.copy()
                without[lows[max(i, 0)] : high, times[max(j, 0)] : end] = 0
                _, back = istft(without, nperseg=256)
                back = np.pad(back, (0, max(0, len(wave) - len(back))))[: len(wave)]
                yield (back.astype(np.float32), rate), mask

    return Parts(shape, (wave, rate), (wave, rate), hidden)


def occlusion(
    session: Session, task: Task, cut: Parts, target: int | None = None, progress: Progress = silent
) -> tuple[Heat, int | None]:
    """Heat of one input, and the class that was explained (None where there are no classes)."""
    judge = _classes if task.kind.endswith("-classification") else _closeness
    if task.kind == "token-classification" or task.kind not in SCORES:
        raise Unsupported(f"explain knows no single score for {task.kind}; it does {', '.join(SCORES)}")
    scores, answer, target = judge(session, task, cut.whole, target)
    whole = float(scores([cut.whole])[0])
    total, count = np.zeros(cut.shape), np.zeros(cut.shape)
    waiting: list[tuple[Any, np.ndarray]] = []
    many, done = sum(1 for _ in cut.hidden()) if len(cut.shape) == 1 else (cut.shape[0] + 1) * (cut.shape[1] + 1), 0
    for pair in (*cut.hidden(), None):
        if pair is not None:
            waiting.append(pair)
        if waiting and (pair is None or len(waiting) == BATCH):
            for (_, mask), value in zip(waiting, scores([example for example, _ in waiting]), strict=True):
                total += mask * (whole - value)
                count += mask
            done += len(waiting)
            progress(done, many, "hiding parts")
            waiting = []
    return Heat(total / np.maximum(count, 1), answer, whole), target


SCORES = (
    "text-classification", "image-classification", "audio-classification", "sentence-similarity", "feature-extraction",
    "voice-activity-detection", "object-detection",
)  # fmt: skip
Scores = Callable[[Sequence[Any]], np.ndarray]


def _classes(session: Session, task: Task, whole: Any, target: int | None) -> tuple[Scores, str, int]:
    def logs(examples: Sequence[Any]) -> np.ndarray:
        inputs = task.prepare(examples)
        outputs = session.predict(inputs)
        task.answer(outputs, inputs)
        logits = np.asarray(task.main(outputs), np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    first = logs([whole])[0]
    best = int(first.argmax())
    target = best if target is None else target
    if target >= len(first):
        raise BadInput(f"class {target} is explained, but this model has {len(first)} classes")
    name = lambda i: task.labels[i] if task.labels else f"class {i}"  # noqa: E731
    answer = f"{name(best)}, {np.exp(first[best]):.1%}"
    if best != target:
        answer += f" (explained: {name(target)}, {np.exp(first[target]):.1%})"
    return lambda examples: logs(examples)[:, target], answer, target


def _closeness(session: Session, task: Task, whole: Any, target: int | None) -> tuple[Scores, str, None]:
    """One number per example, for models without classes."""

    def pairs(examples: Sequence[Any]) -> np.ndarray:
        return np.array(similarity.say(session, task, examples))

    def speech(examples: Sequence[Any]) -> np.ndarray:
        return np.array([frames[:, 0].mean() for frames in voice.say(session, task, examples)])

    def boxes(examples: Sequence[Any]) -> np.ndarray:
        return np.array([each["scores"].sum() for each in detection.say(session, task, examples)])

    def outputs(examples: Sequence[Any]) -> np.ndarray:
        inputs = task.prepare(examples)
        return np.asarray(task.answer(session.predict(inputs), inputs), np.float64).reshape(len(examples), -1)

    if task.kind == "sentence-similarity" and isinstance(whole, tuple):
        return pairs, f"cosine {pairs([whole])[0]:.3f}", None
    if task.kind == "voice-activity-detection":
        return speech, f"speech, mean probability {speech([whole])[0]:.3f}", None
    if task.kind == "object-detection":
        return boxes, f"boxes, sum of scores {boxes([whole])[0]:.2f}", None
    own = outputs([whole])[0]

    def near(examples: Sequence[Any]) -> np.ndarray:
        found = outputs(examples)
        return (found @ own) / (np.linalg.norm(found, axis=1) * np.linalg.norm(own))

    return near, "its output (cosine with the whole input's)", None


def integrated_gradients(module: Any, inputs: np.ndarray, target: int, steps: int = 32) -> np.ndarray:
    """Integrated gradients of a torch module's logit `target` with respect to float inputs [1, ...], from zero.

    By Captum; the sum of the result is the logit at the inputs less the logit at zero, up to the steps.
    Raises Missing where captum is not installed.
    """
    import torch
    from captum.attr import IntegratedGradients

    explained = IntegratedGradients(module.eval()).attribute(torch.from_numpy(inputs), target=target, n_steps=steps)
    found: np.ndarray = explained.detach().numpy()
    return found
