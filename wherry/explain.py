"""Explain: what an answer rests on, in one model or in the original and the compressed one, as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from wherry import audio, data, image
from wherry.errors import BadInput, Missing
from wherry.evaluate import attribute
from wherry.evaluate.perplexity import Progress
from wherry.judge import short_names
from wherry.opened import opened
from wherry.page import attribution
from wherry.report import Report, write_atomic
from wherry.task import Task

MEANING = {
    "log-probability": "fall of the answer's log-probability when this part is hidden (red: speaks for it)",
    "cosine": "fall of the score when this part is hidden (red: speaks for it)",
}
WORDS = 3


def explain(
    model: str | Path, given: str, against: str | Path | None, out: Path, runtime: str, progress: Progress
) -> Report:
    """See `api.explain`."""
    if out.suffix.lower() not in (".png", ".html"):
        raise BadInput(f"--out {out}: a name that ends with .png or .html is wanted")
    if not out.resolve().parent.is_dir():
        raise Missing(f"no such folder: {out.resolve().parent}")
    names: tuple[str, ...] = short_names(against, model) if against else (Path(model).name,)
    paths = (against, model) if against else (model,)
    report, heats, cut, target, kind = Report(f"what {names[-1]} rests on"), [], None, None, ""
    for name, path in zip(names, paths, strict=True):
        found = opened(path, runtime)
        try:
            if cut is None:
                cut = attribute.parts(found.task, example(found.task, given))
            if kind not in ("", found.task.kind):
                raise BadInput(f"{names[0]} is for {kind}, {name} for {found.task.kind}: they cannot be compared")
            kind = found.task.kind
            heat, target = attribute.occlusion(found.session, found.task, cut, target, progress)
        finally:
            found.session.close()
        heats.append((name, heat))
        report.add("answer", name, heat.answer, note=f"score {heat.score:.4g}")
        report.extend(_strongest(name, heat.heat, cut.shown))
    assert cut is not None
    if len(heats) == 2:
        report.rows.append(_agreement(heats[0][1].heat, heats[1][1].heat, names))
    heads = [f"before ({names[0]}): ", f"after ({names[1]}): "] if len(heats) == 2 else [""]
    panels = [(head + heat.answer, heat.heat) for head, (_, heat) in zip(heads, heats, strict=True)]
    title = " before and after compression" if len(heats) == 2 else ""
    meaning = MEANING["cosine" if target is None else "log-probability"]
    picture = attribution.draw(cut.shown, panels, f"What the answer rests on{title}", meaning)
    if out.suffix.lower() == ".png":
        write_atomic(out, picture)
    else:
        rows = [(f"{row.what}, {row.where}", f"{row.text()} {row.note}".strip()) for row in report]
        write_atomic(out, attribution.page(picture, f"What the answer rests on{title}", rows))
    report.add("picture", "", str(out))
    return report


def example(task: Task, given: str) -> Any:
    """The raw example that `given` names: a file of a picture or a sound; a text, a file of it, or "A || B", a pair."""
    path = Path(given)
    try:
        there = path.is_file()
    except OSError:  # a text too long for a file name
        there = False
    if task.modality != "text":
        if not there:
            raise Missing(f"no such file: {given}\n{task.kind} is explained on a file: a picture or a sound.")
        if task.modality == "image":
            image.check(path)
        else:
            audio.check(path)
        return path
    if there:
        found = data.read(path).examples
        return found[0]
    a, bar, b = given.partition("||")
    return (a.strip(), b.strip()) if bar else given


def _strongest(name: str, heat: np.ndarray, shown: Any) -> Report:
    """Rows of the parts that count most."""
    report = Report()
    for flat in np.argsort(-np.abs(heat), axis=None)[:WORDS]:
        place = np.unravel_index(int(flat), heat.shape)
        if isinstance(shown, list):
            part = shown[place[0]]
        else:
            part = f"row {place[0] + 1} of {heat.shape[0]}, column {place[1] + 1} of {heat.shape[1]}"
        report.add("strongest part", name, float(heat[place]), note=part)
    return report


def _agreement(a: np.ndarray, b: np.ndarray, names: tuple[str, ...]) -> Any:
    """Pearson's correlation of two heats."""
    x, y = a.ravel() - a.mean(), b.ravel() - b.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    value = float(x @ y) / norm if norm else None
    note = f"Pearson's correlation of the two heats over {a.size} parts" if norm else "a heat does not vary"
    return Report().add("agreement of reasons", names[-1], value, note=note)
