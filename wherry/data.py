"""Text and sentence pairs for calibration and evaluation: read, tokenized, cut into windows; seeded.

Data that was used to fit, to choose and to judge are separate arguments everywhere; the shipped defaults come
from different sources, so that what is tuned on one text is judged on another.
"""

import csv
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from wherry.errors import BadInput, Missing
from wherry.task import Task

SHIPPED = {"calibration": "calibration.txt", "evaluation": "evaluation.txt", "pairs": "pairs.tsv"}


@dataclass(frozen=True)
class Data:
    """Raw examples: texts, or pairs of sentences with a similarity, or ready token ids.

    name: what the report calls it; digest: sha256 of its content.
    """

    name: str
    digest: str
    texts: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str, float], ...] = ()
    tokens: np.ndarray | None = None  # [windows, length] int64


def shipped(which: str) -> Path:
    """Path of a text that the package ships: "calibration", "evaluation" or "pairs"."""
    return Path(str(files("wherry") / "texts" / SHIPPED[which]))


def read(path: str | Path) -> Data:
    """Read .txt, .jsonl (field "text"), .csv or .tsv (sentence, sentence, score; or a column "text"), .npy or .npz.

    Raises:
        Missing: no such file; BadInput: empty, or not of that form (with the line).
    """
    path = Path(path)
    if not path.is_file():
        raise Missing(f"no such data file: {path}\nGive a .txt, .jsonl, .csv, .tsv or .npy file.")
    raw = path.read_bytes()
    if not raw.strip():
        raise BadInput(f"{path} is empty: it must hold text to measure on")
    digest, kind = hashlib.sha256(raw).hexdigest(), path.suffix.lower()
    if kind in (".npy", ".npz"):
        try:
            loaded = np.load(io.BytesIO(raw), allow_pickle=False)
            ids = np.atleast_2d(loaded[loaded.files[0]] if kind == ".npz" else loaded)
        except (ValueError, EOFError, OSError, LookupError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise BadInput(f"{path} is not a {kind} file of token ids") from error
        if not ids.size:
            raise BadInput(f"{path} is empty: it must hold token ids [windows, length]")
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise BadInput(f"{path}: token ids must be whole numbers [windows, length], not {ids.dtype} {ids.shape}")
        return Data(path.name, digest, tokens=ids.astype(np.int64))
    try:
        text = raw.decode("utf8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: byte {error.start}") from error
    if kind in (".jsonl", ".json"):
        return Data(path.name, digest, texts=_jsonl(path, text))
    if kind in (".csv", ".tsv"):
        return _table(path, text, digest, "\t" if kind == ".tsv" else ",")
    return Data(path.name, digest, texts=(text,))


def _jsonl(path: Path, text: str) -> tuple[str, ...]:
    out = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            out.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f'{path}:{number}: not a JSON object with a field "text"') from error
    return tuple(out)


def _table(path: Path, text: str, digest: str, delimiter: str) -> Data:
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    try:
        rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter, quoting=quoting) if row]
    except csv.Error as error:
        raise BadInput(f"{path} is not a table: {error}") from error
    if "text" in rows[0]:
        column = rows[0].index("text")
        return Data(path.name, digest, texts=tuple(row[column] for row in rows[1:]))
    pairs = []
    for number, row in enumerate(rows, 1):
        if row[0].startswith("#"):
            continue
        try:
            pairs.append((row[0], row[1], float(row[2])))
        except (IndexError, ValueError) as error:
            if number == 1:  # a header
                continue
            raise BadInput(
                f"{path}:{number}: not two sentences and a score, nor a table with a column 'text'"
            ) from error
    return Data(path.name, digest, pairs=tuple(pairs))


def windows(data: Data, task: Task, length: int, most: int, seed: int | None = None) -> np.ndarray:
    """Token windows [count <= most, length] of text, without overlap; in order, or drawn with a seed.

    Raises BadInput when the text has fewer tokens than one window.
    """
    if data.tokens is not None:
        return data.tokens[:most, :length]
    texts = data.texts or tuple(f"{a}\n{b}" for a, b, _ in data.pairs)
    if not texts:
        raise BadInput(f"{data.name} has no rows: it must hold text to measure on")
    stream = np.concatenate([np.asarray(task.encode(text), dtype=np.int64) for text in texts])
    count = len(stream) // length
    if count == 0:
        raise BadInput(f"{data.name} has {len(stream)} tokens, fewer than one window of {length}: give more text")
    table = stream[: count * length].reshape(count, length)
    if seed is None:
        return table[:most]
    return table[np.sort(np.random.default_rng(seed).permutation(count)[:most])]


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
