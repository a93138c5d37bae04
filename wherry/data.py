"""Data for calibration and evaluation: texts, pairs, pictures, sounds, arrays and token ids, with labels; seeded.

Data that was used to fit, to choose and to judge are separate arguments everywhere; the shipped defaults come
from different sources, so that what is tuned on one text is judged on another.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from wherry import audio, image, table
from wherry.errors import BadInput, Missing
from wherry.task import Task

SHIPPED = {"calibration": "calibration.txt", "evaluation": "evaluation.txt", "pairs": "pairs.tsv"}
MAX_BAD = 0.01  # share of pictures or sounds that may be undecodable
LABEL_FILES = ("labels", "metadata")  # of a folder, with the suffix of a table


@dataclass(frozen=True)
class Data:
    """Raw examples with their labels, and the older views of them: texts, pairs, token ids.

    name: what the report calls it; digest: sha256 of its content.
    examples: text; (text, text); a path, bytes or PIL picture; {input name: array}. Every picture and sound was decoded
        once when it was read.
    labels: as they stand in the file, one per example, or None where there are none; `targets` makes them fit a task.
    places: file and line of each example.
    bad: what could not be decoded and is left out; notes: what else was left out.
    """

    name: str
    digest: str
    texts: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str, float], ...] = ()
    tokens: np.ndarray | None = None  # [windows, length] int64
    examples: tuple[Any, ...] = ()
    labels: tuple[Any, ...] | None = None
    places: tuple[str, ...] = field(default=(), repr=False)
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def take(self, chosen: Any) -> "Data":
        """The same with these examples alone, by index; texts, pairs and tokens are dropped."""
        pick = lambda values: tuple(values[int(i)] for i in chosen)  # noqa: E731
        return replace(
            self, texts=(), pairs=(), tokens=None, examples=pick(self.examples),
            labels=None if self.labels is None else pick(self.labels), places=pick(self.places),
        )  # fmt: skip


def shipped(which: str) -> Path:
    """Path of a text that the package ships: "calibration", "evaluation" or "pairs"."""
    return Path(str(files("wherry") / "texts" / SHIPPED[which]))


def read(path: str | Path, max_bad: float = MAX_BAD) -> Data:
    """Read a file or a folder of examples.

    Args:
        path: .txt; .jsonl, .json, .csv, .tsv or .parquet with columns text and label, sentence1, sentence2 and score,
            source and target, or file and label; COCO .json; .npy token ids; .npz one array per model input, and
            `label`; a folder of pictures or sounds (a sub-folder per class, or a labels.csv / .tsv / .jsonl: file,
            label); a video, as frames.
        max_bad: share of pictures or sounds that may fail to decode; they are named in `bad`. More is an error.

    Raises:
        Missing: no such file, or a package; BadInput: empty, or not of that form (with the line).
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, max_bad)
    if not path.is_file():
        raise Missing(f"no such data file: {path}\nGive a .txt, .jsonl, .csv, .tsv, .parquet, .npy file or a folder.")
    kind = path.suffix.lower()
    if kind in image.VIDEOS:
        return _video(path)
    raw = path.read_bytes()
    if not raw.strip():
        raise BadInput(f"{path} is empty: it must hold examples to measure on")
    digest = hashlib.sha256(raw).hexdigest()
    if kind in image.SUFFIXES + audio.SUFFIXES:
        return _decoded(Data(path.name, digest, examples=(path,), places=(path.name,)), max_bad)
    if kind in (".npy", ".npz"):
        return _arrays(path, raw, digest)
    if kind == ".json" and b'"annotations"' in raw:
        return _decoded(coco(path, raw, digest), max_bad)
    if kind in table.SUFFIXES:
        rows, places, _ = table.read(path, raw)
        return _decoded(_of_rows(path, digest, rows, places), max_bad)
    try:
        text = raw.decode("utf8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: byte {error.start}") from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    places = [f"{path.name}:{i}" for i, _ in lines]
    return Data(path.name, digest, (text,), examples=tuple(line for _, line in lines), places=tuple(places))


def _arrays(path: Path, raw: bytes, digest: str) -> Data:
    kind = path.suffix.lower()
    try:
        loaded = np.load(io.BytesIO(raw), allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if kind == ".npz" else {"input_ids": loaded}
        if any(array.dtype.hasobject for array in arrays.values()) or not arrays:
            raise ValueError("no arrays of numbers")
    except (ValueError, EOFError, OSError, LookupError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is not a {kind} file of token ids or inputs by name") from error
    labels = next((arrays.pop(name) for name in ("label", "labels") if name in arrays), None)
    first = next(iter(arrays.values()), np.empty(0))
    if not first.size:
        raise BadInput(f"{path} is empty: it must hold token ids [windows, length], or inputs by name")
    whole = first.dtype.kind in "iu" and first.ndim <= 2
    if kind == ".npy" and not whole:
        raise BadInput(f"{path}: token ids must be whole numbers [windows, length], not {first.dtype} {first.shape}")
    if whole and first.ndim == 1 and len(arrays) == 1:
        arrays = {name: array[None] for name, array in arrays.items()}
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    counts |= {} if labels is None else {"label": len(labels) if labels.ndim else 0}
    if len(set(counts.values())) != 1:
        raise BadInput(f"{path}: the arrays hold different numbers of examples: {counts}")
    count = next(iter(counts.values()))
    return Data(
        path.name, digest, tokens=np.atleast_2d(first).astype(np.int64) if whole else None,
        examples=tuple({name: array[i] for name, array in arrays.items()} for i in range(count)),
        labels=None if labels is None else tuple(labels.tolist()),
        places=tuple(f"{path.name}[{i}]" for i in range(count)),
    )  # fmt: skip


def _of_rows(path: Path, digest: str, rows: list[table.Row], places: list[str]) -> Data:
    """Examples and labels of a table; files are looked for beside it."""
    if not rows:
        raise BadInput(f"{path} has no rows: it must hold examples to measure on")
    examples: list[Any] = []
    labels: list[Any] = []
    for row, place in zip(rows, places, strict=True):
        examples.append(_example(row, path.parent, place))
        if "boxes" in row:
            labels.append({"boxes": row["boxes"], "labels": row.get("label")})
        else:
            labels.append(row.get("segments", row.get("label")))
    texts = tuple(e for e in examples if isinstance(e, str))
    pairs = []
    if all(isinstance(e, tuple) for e in examples):
        for example, label, place in zip(examples, labels, places, strict=True):
            pairs.append((*example, _number(label, place)))
    return Data(
        path.name, digest, texts, tuple(p for p in pairs if p[2] is not None), examples=tuple(examples),
        labels=None if all(label is None for label in labels) else tuple(labels), places=tuple(places),
    )  # fmt: skip


def _number(value: Any, place: str) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    if not np.isfinite(found):
        raise BadInput(f"{place}: the score {value!r} is not a finite number")
    return found


def _example(row: table.Row, folder: Path, place: str) -> Any:
    for what in ("image", "audio", "file"):
        value = row.get(what)
        if isinstance(value, dict):  # as data sets of the hub store them
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Encoded(value, what)
        if isinstance(value, str):
            return _inside(folder, value, place)
        if what in row and value is None:
            raise BadInput(f"{place}: no {what}")
    found: Any
    if "first" in row:
        found = (row["first"], row.get("second"))
    else:
        found = row.get("source", row.get("text"))
        if "words" in row and found is None:
            found = row["words"]
            if not (isinstance(found, list) and found and all(isinstance(word, str) for word in found)):
                raise BadInput(f"{place}: words must be a list of texts")
            return found
    for part in found if isinstance(found, tuple) else (found,):
        if not isinstance(part, str):
            raise BadInput(f"{place}: a text is wanted, not {part!r}")
    return found


class Encoded(bytes):
    """A picture or a sound as the bytes of its file; kind "image" or "audio"."""

    def __new__(cls, value: bytes, kind: str) -> "Encoded":
        """The bytes, and what they are."""
        made = super().__new__(cls, value)
        made.kind = kind
        return made

    kind: str


def _inside(folder: Path, name: str, place: str) -> Path:
    found = Path(os.path.normpath(folder / name))  # links that the user made may lead elsewhere; names may not
    if not found.is_relative_to(os.path.normpath(folder)):
        raise BadInput(f"{place}: {name} is outside of {folder}: put the files beside or below the table")
    if not found.is_file():
        raise Missing(f"{place}: no such file: {found}")
    return found


def _folder(path: Path, max_bad: float) -> Data:
    """Pictures or sounds of a folder: by its label file, else a class per sub-folder, else without labels."""
    tables = [path / f"{name}{suffix}" for name in LABEL_FILES for suffix in table.SUFFIXES]
    found = next((file for file in tables if file.is_file()), None)
    if found is not None:
        rows, places, named = table.read(found, found.read_bytes())
        if not named and all("text" in row for row in rows):  # two columns without a header: file, label
            rows = [{"file": row["text"], "label": row["label"]} for row in rows]
        data = _of_rows(found, "", rows, places)
        if data.texts or data.pairs:
            raise BadInput(f"{found} has no column 'file': file and label are wanted")
        beside = {file.name for file in _media(path)} - {e.name for e in data.examples if isinstance(e, Path)}
        notes = [f"{len(beside)} files of {path.name} are not in {found.name}"] if beside else []
        listed = [e for e in data.examples if isinstance(e, Path)]
        digest = _digest(path, [found, *listed])
        return _decoded(replace(data, name=path.name, digest=digest, notes=tuple(notes)), max_bad)
    classes = {file.name: _media(file) for file in sorted(path.iterdir()) if file.is_dir()}
    classes = {name: media for name, media in classes.items() if media}
    loose = [file for file in _media(path) if file.parent == path]
    if not classes and not loose:
        raise BadInput(f"{path} holds no pictures and no sounds: {' '.join(image.SUFFIXES + audio.SUFFIXES)}")
    examples = [file for media in classes.values() for file in media] or loose
    labels = tuple(name for name, media in classes.items() for _ in media) or None
    left = classes and loose
    data = Data(
        path.name, _digest(path, examples), examples=tuple(examples), labels=labels,
        places=tuple(file.relative_to(path).as_posix() for file in examples),
        notes=(f"{len(loose)} files beside the class folders of {path.name} are left out",) if left else (),
    )  # fmt: skip
    return _decoded(data, max_bad)


def _media(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in image.SUFFIXES + audio.SUFFIXES and f.is_file())


def _digest(folder: Path, found: list[Path]) -> str:
    """sha256 over the sorted relative names and contents."""
    digest = hashlib.sha256()
    for file in sorted(set(found)):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _video(path: Path) -> Data:
    kept, total = image.frames(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    notes = (f"{len(kept)} of {total} frames, evenly spaced",) if len(kept) < total else ()
    places = tuple(f"{path.name}: frame {i * total // len(kept)}" for i in range(len(kept)))
    return Data(path.name, digest, examples=tuple(kept), places=places, notes=notes)


def checker(example: Any) -> Callable[[Any], Any] | None:
    """What decodes such an example, raising BadInput; None for texts and arrays."""
    if isinstance(example, Encoded):
        return audio.check if example.kind == "audio" else image.check
    if isinstance(example, Path):
        suffix = example.suffix.lower()
        if suffix in image.SUFFIXES:
            return image.check
        if suffix in audio.SUFFIXES:
            return audio.check
        raise BadInput(f"{example} is neither a picture nor a sound by its name")
    return None


def _decoded(data: Data, max_bad: float) -> Data:
    """The data without what cannot be decoded; BadInput where that is more than the bound allows."""
    good, bad = [], []
    for i, example in enumerate(data.examples):
        check = checker(example)
        try:
            if check is not None:
                check(example)
            good.append(i)
        except BadInput as error:
            bad.append(f"{data.places[i]}: {error}")
    if not bad:
        return data
    if not good or len(bad) > max_bad * len(data.examples):
        raise BadInput(
            f"{data.name}: {len(bad)} of {len(data.examples)} examples cannot be decoded, {max_bad:.1%} may be.\n"
            f"{bad[0]}\nMend or remove them, or allow more with --max-bad."
        )
    return replace(data.take(good), bad=tuple(bad))


def windows(data: Data, task: Task, length: int, most: int, seed: int | None = None) -> np.ndarray:
    """Token windows [count <= most, length] of text, without overlap; in order, or drawn with a seed.

    Raises BadInput when the text has fewer tokens than one window.
    """
    if data.tokens is not None:
        return data.tokens[:most, :length]
    texts = data.texts or tuple(f"{a}\n{b}" for a, b, _ in data.pairs)
    if not texts:
        raise BadInput(f"{data.name} holds no text: a language model is measured on text")
    stream = np.concatenate([np.asarray(task.encode(text), dtype=np.int64) for text in texts])
    count = len(stream) // length
    if count == 0:
        raise BadInput(f"{data.name} has {len(stream)} tokens, fewer than one window of {length}: give more text")
    cut = stream[: count * length].reshape(count, length)
    if seed is None:
        return cut[:most]
    return cut[np.sort(np.random.default_rng(seed).permutation(count)[:most])]


def sentences(data: Data, most: int, seed: int | None = None) -> list[str]:
    """Single sentences for encoders: both sides of pairs, or the lines of texts."""
    found = [s for a, b, _ in data.pairs for s in (a, b)] or [
        line.strip() for text in data.texts for line in text.splitlines() if len(line.split()) > 3
    ]
    if not found:
        raise BadInput(f"{data.name} holds no sentences")
    if seed is not None:
        found = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    return found[:most]


def inputs(
    source: Data, task: Task, samples: int, seed: int | None = None, batch: int = 16
) -> list[dict[str, np.ndarray]]:
    """Model inputs for calibration: at most `samples` examples, in order or drawn with a seed, `batch` at a time.

    Sentence encoders get single sentences, also of pairs. Texts of like length go together, to save padding.

    Raises:
        BadInput: no examples, or not of the task's kind (naming the place).
    """
    if task.kind == "sentence-similarity" and (source.pairs or source.texts):
        chosen: list[Any] = sentences(source, samples, seed)
    else:
        order: Any = range(len(source.examples))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(len(source.examples))
        chosen = [source.examples[int(i)] for i in order[:samples]]
    if not chosen:
        raise BadInput(f"{source.name} holds no examples for {task.kind}")
    if task.modality == "text":
        chosen.sort(key=lambda text: len(str(text)))
    return [task.prepare(chosen[i : i + batch]) for i in range(0, len(chosen), batch)]


def targets(source: Data, task: Task) -> list[Any]:
    """The labels as the task understands them, one per example: see `Task.target`.

    Raises:
        BadInput: there are none, or one does not fit; names file and line.
    """
    if source.labels is None:
        raise BadInput(f"{source.name} has no labels: {task.kind} is judged by them. Give a column 'label'.")
    return [task.target(label, place) for label, place in zip(source.labels, source.places, strict=True)]


def coco(path: Path, raw: bytes, digest: str) -> Data:
    """Pictures and boxes of a COCO file (instances_*.json): images beside or below it.

    labels: {"boxes": [[x0, y0, x1, y1], ...] in pixels, "labels": [category name, ...]} per picture.
    """
    try:
        found = json.loads(raw)
        names = {c["id"]: c["name"] for c in found["categories"]}
        boxes: dict[Any, list[Any]] = {entry["id"]: [] for entry in found["images"]}
        for entry in found["annotations"]:
            x, y, w, h = entry["bbox"]
            boxes[entry["image_id"]].append(([x, y, x + w, y + h], names[entry["category_id"]]))
        rows = [
            {"file": e["file_name"], "boxes": [b for b, _ in boxes[e["id"]]], "label": [n for _, n in boxes[e["id"]]]}
            for e in found["images"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        kind = type(error).__name__
        raise BadInput(f"{path} is not a COCO file of images, annotations and categories: {kind}: {error}") from error
    return _of_rows(path, digest, rows, [f"{path.name}: {row['file']}" for row in rows])
