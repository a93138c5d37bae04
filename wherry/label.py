"""Labels of data made to fit a task: names to indices, texts, scores, boxes, spans of time. Errors name file:line."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry.errors import BadInput
from wherry.shelf import suggest


def fit(label: Any, kind: str, labels: Sequence[str], place: str) -> Any:
    """A label of the data as a task of that kind understands it.

    Returns:
        classification: the index; token classification: one per word; sentence similarity: a float; recognition and
        translation: the text; voice activity: float64 [spans, 2] in seconds, or int64 [frames] of 0 and 1; detection:
        {"boxes": float64 [n, 4] of x0 y0 x1 y1 in pixels, "labels": int64 [n]}; other kinds: the label as it is.

    Raises:
        BadInput: it does not fit; `place` (file:line) stands in the message.
    """
    if kind == "token-classification":
        if not isinstance(label, list | tuple):
            raise BadInput(f"{place}: a list of labels, one per word, is wanted, not {label!r:.60}")
        return [index(one, labels, place) for one in label]
    if kind.endswith("-classification"):
        return index(label, labels, place)
    if kind == "sentence-similarity":
        try:
            score = float(label)
        except (TypeError, ValueError):
            score = float("nan")
        if not np.isfinite(score):
            raise BadInput(f"{place}: a score is wanted, not {label!r:.60}")
        return score
    if kind in ("automatic-speech-recognition", "translation"):
        if not isinstance(label, str) or not label.strip():
            raise BadInput(f"{place}: a text is wanted as label, not {label!r:.60}")
        return label
    if kind == "voice-activity-detection":
        if isinstance(label, list) and label and all(isinstance(one, int) and one in (0, 1) for one in label):
            return np.array(label, np.int64)
        return spans(label, 2, f"{place}: [[start, end], ...] of speech in seconds are wanted")
    if kind == "object-detection":
        given = label if isinstance(label, dict) else {}
        boxes = spans(given.get("boxes"), 4, f"{place}: boxes [[x0, y0, x1, y1], ...] in pixels are wanted")
        names = given.get("labels")
        names = [0] * len(boxes) if names is None else names
        if not isinstance(names, list | tuple) or len(names) != len(boxes):
            raise BadInput(f"{place}: {len(boxes)} boxes, but labels {names!r:.60}")
        return {"boxes": boxes, "labels": np.array([index(name, labels, place) for name in names], np.int64)}
    return label


def index(label: Any, labels: Sequence[str], place: str) -> int:
    """A class as its index: by its name first, else as a whole number within range."""
    name = label.strip() if isinstance(label, str) else None
    if name in labels:
        if labels.count(name) > 1:
            raise BadInput(f"{place}: '{name}' names {labels.count(name)} classes: give the index")
        return labels.index(name)
    text, most = name if name is not None else str(label), len(labels)
    if re.fullmatch(r"\d{1,9}(\.0*)?", text) and (not most or int(text.split(".")[0]) < most):
        return int(text.split(".")[0])
    near = suggest(name, labels) if name else ""
    few = ", ".join(labels[:8]) + (f", ... ({most} in all)" if most > 8 else "")
    raise BadInput(
        f"{place}: the label {label!r:.60} is not one of the model's{near}: "
        + (f"{few}; or 0 to {most - 1}" if most else "a whole number from 0 is wanted")
    )


def spans(value: Any, width: int, wanted: str) -> np.ndarray:
    """Float64 [n, width], the second half of each row not before the first; BadInput that begins with `wanted`."""
    try:
        found = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{wanted}, not {value!r:.60}") from error
    if isinstance(value, list | tuple) and not len(value):
        found = found.reshape(0, width)
    half = width // 2
    if found.ndim != 2 or found.shape[1] != width or not np.isfinite(found).all():
        raise BadInput(f"{wanted}, not {value!r:.60}")
    if (found[:, half:] < found[:, :half]).any():
        raise BadInput(f"{wanted}; one ends before it starts: {value!r:.80}")
    return found
