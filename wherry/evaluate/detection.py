"""Object detection: mean average precision over IoU 0.5 to 0.95, and at 0.5, as COCO defines them; F1 at IoU 0.5.

Shapes: answers: {"boxes" [n, 4] of x0 y0 x1 y1 in pixels of the picture as it is stored, "scores" [n],
        "labels" [n]}; targets: boxes [m, 4] and labels [m].
Idea:   a graph gives `boxes`, `scores`, `labels` (shares of the input's sides, or pixels of the input); or DETR's
        `logits` and `pred_boxes`; or a map of text [batch, h, w, 2] as CRAFT does.
Source: Lin et al. 2014 (COCO), matches by pycocotools; 101 recall points; at most 100 boxes a picture. CRAFT: Baek
        et al. 2019, arXiv:1904.01941: text > 0.4 or link > 0.4, a region's text above 0.7; boxes with upright sides.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry import image
from wherry.errors import BadInput
from wherry.evaluate.metric import Metric, f1
from wherry.report import Report
from wherry.session import Session
from wherry.task import Task

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100
SURE = 0.5  # score from which a box counts for F1


def say(session: Session, task: Task, examples: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Boxes of each picture of one batch."""
    if task.processor.get("crop"):
        raise BadInput("task.json: a detector's processor must not crop: boxes outside would be lost")
    outputs = session.predict(task.prepare(examples))
    height, width = image.pair(task.processor.get("size"), "size")
    found = []
    for i, example in enumerate(examples):
        boxes, scores, labels = _boxes({name: np.asarray(value[i]) for name, value in outputs.items()}, width, height)
        order = np.argsort(-scores, kind="stable")[:MOST]
        full = np.array(image.load(example).size * 2, np.float64)  # width, height, width, height
        keep = order[np.isfinite(scores[order]) & np.isfinite(boxes[order]).all(1)]
        found.append({"boxes": boxes[keep] * full, "scores": scores[keep], "labels": labels[keep]})
    return found


def _boxes(one: dict[str, np.ndarray], width: int, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes as shares of the sides, scores and labels of one picture's outputs."""
    if "pred_boxes" in one:  # DETR: centre and size; the last class is "nothing"
        logits = one["logits"].astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True))[:, :-1]
        centre, half = one["pred_boxes"][:, :2], one["pred_boxes"][:, 2:] / 2
        return np.concatenate([centre - half, centre + half], 1).astype(np.float64), p.max(-1), p.argmax(-1)
    if "boxes" in one and "scores" in one:
        boxes, scores = one["boxes"].astype(np.float64).reshape(-1, 4), one["scores"].astype(np.float64)
        labels = one["labels"] if "labels" in one else scores.argmax(-1) if scores.ndim == 2 else np.zeros(len(scores))
        if boxes.size and np.nanmax(boxes) > 2:
            boxes = boxes / np.array([width, height, width, height])
        return boxes, scores.max(-1) if scores.ndim == 2 else scores, labels.astype(np.int64)
    maps = [value for value in one.values() if value.ndim == 3 and value.shape[-1] == 2]
    if maps:
        return _regions(maps[0])
    raise BadInput(
        f"no boxes in the outputs {', '.join(one)}: boxes and scores, logits and pred_boxes, or a map [h, w, 2]"
    )


def _regions(text_and_link: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Upright boxes of connected text, as CRAFT's own code finds them, as shares of the sides."""
    from scipy import ndimage

    text, link = text_and_link[..., 0], text_and_link[..., 1]
    regions, count = ndimage.label((text > 0.4) | (link > 0.4))
    height, width = text.shape
    boxes, scores = [], []
    for i, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        inside = (regions[rows, columns] == i) & ~((link[rows, columns] > 0.4) & (text[rows, columns] <= 0.4))
        area, h, w = int((regions[rows, columns] == i).sum()), rows.stop - rows.start, columns.stop - columns.start
        best = float(text[rows, columns][regions[rows, columns] == i].max())
        if area < 10 or best < 0.7 or not inside.any():
            continue
        ys, xs = np.nonzero(inside)
        grow = int(np.sqrt(area * min(w, h) / (w * h)) * 2) / 2
        x0, y0 = columns.start + xs.min() - grow, rows.start + ys.min() - grow
        x1, y1 = columns.start + xs.max() + 1 + grow, rows.start + ys.max() + 1 + grow
        boxes.append([max(x0, 0) / width, max(y0, 0) / height, min(x1, width) / width, min(y1, height) / height])
        scores.append(best)
    return np.array(boxes).reshape(-1, 4), np.array(scores), np.zeros(len(scores), np.int64)


class Matches:
    """Which boxes hit: for each class and threshold, one row per box, best score first."""

    def __init__(self, said: Sequence[dict[str, np.ndarray]], wanted: Sequence[dict[str, np.ndarray]]) -> None:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        self.count = len(said)
        truth, answers, number = COCO(), COCO(), 0
        classes = sorted({int(c) for each in (*said, *wanted) for c in each["labels"]}) or [0]
        for data, every in ((truth, wanted), (answers, said)):
            marks = []
            for i, one in enumerate(every):
                for j, (x0, y0, x1, y1) in enumerate(one["boxes"].tolist()):
                    number += 1
                    size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
                    score = {"score": float(one["scores"][j])} if data is answers else {}
                    marks.append({"id": number, "image_id": i, "category_id": int(one["labels"][j]), **size, **score})
            data.dataset = {
                "images": [{"id": i} for i in range(self.count)], "annotations": marks,
                "categories": [{"id": c} for c in classes],
            }  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                data.createIndex()
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCOeval(truth, answers, "bbox")
            self.coco.params.maxDets = [MOST]
            self.coco.params.areaRng, self.coco.params.areaRngLbl = [[0, 1e10]], ["all"]
            self.coco.evaluate()
        found = [each for each in self.coco.evalImgs if each is not None]
        self.classes = [self._of(c, [each for each in found if each["category_id"] == c]) for c in classes]

    def _of(self, category: int, found: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Picture of each box, hit [thresholds, boxes], score, and number of true boxes in each picture, of a class."""
        true = np.zeros(self.count)
        for each in found:
            true[each["image_id"]] = len(each["gtIds"])
        place = np.concatenate([np.full(len(e["dtScores"]), e["image_id"]) for e in found] or [np.zeros(0)]).astype(int)
        scores = np.concatenate([np.asarray(e["dtScores"], float) for e in found] or [np.zeros(0)])
        hits = np.concatenate([e["dtMatches"] > 0 for e in found] or [np.zeros((len(THRESHOLDS), 0), bool)], 1)
        order = np.argsort(-scores, kind="mergesort")
        return place[order], hits[:, order], scores[order], true

    def precision(self, weights: np.ndarray, thresholds: slice) -> np.ndarray:
        """Mean average precision [resamples] over classes that have true boxes and over the thresholds."""
        total, classes = np.zeros(len(weights)), np.zeros(len(weights))
        for place, hits, _, true in self.classes:
            many = weights @ true
            drawn = weights[:, place]
            for hit in hits[thresholds]:
                right = np.cumsum(drawn * hit, 1)
                total += _average(right, np.cumsum(drawn, 1), many)
            classes += (many > 0) * len(hits[thresholds])
        return np.where(classes > 0, total / np.maximum(classes, 1), np.nan)


def _average(right: np.ndarray, told: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Average precision [resamples] at 101 recalls, from running sums [resamples, boxes] and true boxes [resamples]."""
    out = np.zeros(len(many))
    if not right.shape[1]:
        return out
    envelope = np.maximum.accumulate((right / np.maximum(told, 1e-12))[:, ::-1], 1)[:, ::-1]
    for i in np.flatnonzero(many > 0):
        at = np.searchsorted(right[i] / many[i], RECALLS, side="left")
        out[i] = np.append(envelope[i], 0.0)[at].mean()
    return out


def metrics(said: Sequence[dict[str, np.ndarray]], wanted: Sequence[dict[str, np.ndarray]], task: Task) -> list[Metric]:
    """mAP, mAP at IoU 0.5, and F1, precision, recall of boxes with a score of at least 0.5 at IoU 0.5."""
    found, count = Matches(said, wanted), len(said)
    counts = np.zeros((3, count))
    for place, hits, scores, true in found.classes:
        sure = scores >= SURE
        counts += [np.bincount(place[sure & hits[0]], minlength=count), np.bincount(place[sure], minlength=count), true]
    note = f"{int(counts[2].sum())} boxes"
    return [
        Metric("map", lambda w: found.precision(w, slice(None)), count, note=f"{note}, IoU 0.5 to 0.95"),
        Metric("map at 0.5", lambda w: found.precision(w, slice(0, 1)), count, note=note),
        *f1("box", counts, f"{note}, score {SURE:g} or more, IoU 0.5"),
    ]


def details(said: Sequence[Any], wanted: Sequence[Any], task: Task, where: str) -> Report:
    """Nothing more."""
    return Report()
