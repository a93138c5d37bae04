"""Answers: every task that is neither chat nor sentence vectors. Raw examples in, what `Task` calls the answer out.

    POST /v1/answer -> {"model", "task", "answers": [one per example]}

    text-, image-, audio-classification   {"labels": [{"label", "probability"}, ...]}, the likeliest first
    token-classification                  {"words": [{"word", "label"}, ...]}
    object-detection                      {"boxes": [{"box": [x0, y0, x1, y1] in pixels, "label", "score"}, ...]}
    voice-activity-detection              {"speech": [{"start", "end"} in seconds, ...]}
    automatic-speech-recognition, translation   {"text"}
    feature-extraction                    {"output": nested lists}; of models that take arrays: /v2 alone

Probabilities are the softmax of the scores, unless these are probabilities already, which the answer says; a model with
one score gives the score. Words, boxes and speech come from the functions that `wherry evaluate` judges, found by name
when the server starts: they need its extra, wherry[eval].
"""

from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from wherry.artifact import Artifact
from wherry.errors import BadInput, Diverged, Unsupported
from wherry.report import Report
from wherry.serve import example
from wherry.serve.door import Door
from wherry.session import Session
from wherry.shelf import find
from wherry.task import WRITES, Task
from wherry.writer import Writer

CLASSES = ("text-classification", "image-classification", "audio-classification")
SUM = 0.02  # scores that are all in [0, 1] and sum to 1 within this are probabilities; an int8 softmax is a bit off
SURE = 0.5  # score from which a box is told
FAMILIES = {"token-classification": "tagging", "object-detection": "detection", "voice-activity-detection": "voice"}


class Answers(Door):
    """A model that is run once per request."""

    def __init__(
        self, session: Session | Writer, artifact: Artifact, report: Report | None, queue: int, max_body: int
    ) -> None:
        task = artifact.task
        if task.kind in WRITES and not isinstance(session, Writer):
            raise Unsupported(
                f"{artifact.name} is one half of a model for {task.kind}: serve the folder of both halves"
            )
        super().__init__(session, artifact, report, queue, max_body, task.max_length if task.modality == "text" else 0)
        self.family = find("evaluate", FAMILIES[task.kind]) if task.kind in FAMILIES else None
        self.known["model"] |= {"modality": task.modality, "labels": len(task.labels)}
        if task.modality == "text":
            self.task.tokenizer.no_padding()  # now, not with the first request: a missing tokenizer is said at once

    def routes(self) -> list[Route | Mount]:
        """The answer, and those of every model."""
        return [Route("/v1/answer", self.answer, methods=["POST"]), *super().routes()]

    async def answer(self, request: Request) -> Response:
        """POST /v1/answer."""
        raw = await self.raw(request)
        if self.task.modality == "arrays":
            raise Unsupported(f"{self.model} takes arrays by name.\nUse POST /v2/models/{self.model}/infer.")
        asked = await example.read(request, raw, self.task)
        if asked.model is not None:
            self.named(asked.model)
        answers = await self.work(request, self._answer, asked)
        return JSONResponse({"model": self.model, "task": self.task.kind, "answers": answers})

    def _answer(self, asked: example.Asked) -> list[dict[str, Any]]:
        """One answer per example, as JSON values. Raises BadInput as `Task.prepare`; Diverged for NaN."""
        task, examples = self.task, example.checked(asked.examples, self.task)
        if self.family is not None:
            said = self.family.say(self.session, task, examples)
            return [TOLD[task.kind](answer, task, given) for answer, given in zip(said, examples, strict=True)]
        inputs = task.prepare(examples)
        if isinstance(self.session, Writer):
            return [{"text": text} for text in self.session.write(inputs)]
        outputs = self.session.predict(inputs)
        found = np.asarray(task.answer(outputs, inputs))  # of classes: checks that the labels fit
        if task.kind in CLASSES:
            return [labelled(scores, task, asked.top) for scores in task.main(outputs)]
        return [{"output": one.tolist()} for one in finite(found)]


def name(task: Task, index: int) -> str:
    """A class by its name, or by its number where the model has no such name."""
    return task.labels[index] if index < len(task.labels) else str(index)


def finite(values: np.ndarray) -> np.ndarray:
    """The same. Raises Diverged for NaN and infinity."""
    if not np.isfinite(values).all():
        raise Diverged("the model answered with NaN or infinity; check the artifact: wherry verify")
    return values


def labelled(scores: np.ndarray, task: Task, top: int) -> dict[str, Any]:
    """The `top` likeliest labels of scores [classes]."""
    scores = finite(scores.astype(np.float64))
    if len(scores) == 1:
        return {"score": float(scores[0])}
    ready = bool((scores >= 0).all() and abs(scores.sum() - 1) < SUM)
    powers = scores if ready else np.exp(scores - scores.max())
    p = powers / powers.sum()
    order = np.argsort(-p, kind="stable")[:top]
    labels = [{"label": name(task, int(i)), "index": int(i), "probability": float(p[i])} for i in order]
    return {"labels": labels, "probabilities": "of the model" if ready else "softmax"}


def words(found: list[int], task: Task, given: list[str]) -> dict[str, Any]:
    """The label of each word of one sentence."""
    return {"words": [{"word": word, "label": name(task, i)} for word, i in zip(given, found, strict=True)]}


def boxes(found: dict[str, np.ndarray], task: Task, given: Any) -> dict[str, Any]:
    """Boxes of one picture whose score is SURE or more, the surest first."""
    told = [
        {"box": box.tolist(), "label": name(task, int(label)), "score": float(score)}
        for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True)
        if score >= SURE
    ]
    return {"threshold": SURE, "boxes": told}


def speech(frames: np.ndarray, task: Task, given: Any) -> dict[str, Any]:
    """Spans of frames [n, 2] of probability and middle in seconds that reach the task's threshold."""
    finite(frames)
    if not len(frames):
        raise BadInput("the sound is too short for one frame of the model")
    threshold = float(task.processor.get("threshold", 0.5))
    step = float(frames[1, 1] - frames[0, 1]) if len(frames) > 1 else 2 * float(frames[0, 1])
    told = np.concatenate([[False], frames[:, 0] >= threshold, [False]])
    edges = np.flatnonzero(told[1:] != told[:-1]).reshape(-1, 2)
    spans = [{"start": float(a * step), "end": float(b * step)} for a, b in edges]
    return {"threshold": threshold, "step": step, "speech": spans, "probability": float(frames[:, 0].max())}


TOLD: dict[str, Any] = {"token-classification": words, "object-detection": boxes, "voice-activity-detection": speech}
