"""Samples: data as tensors, one batch of sample ids at a time; text lies as tokens in a file that is never read whole.

Text (.txt, .jsonl, .npy of ids, a folder of texts) becomes `Windows` of `length` tokens and the next of each, or rows
of whole documents (`Packed`); tables with labels, pictures, sounds and arrays become `Examples`, prepared by the task.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from wherry import data
from wherry.errors import BadInput, Corrupt, Missing
from wherry.objective import IGNORE
from wherry.report import read_object, write_atomic
from wherry.task import Task

Batch = dict[str, torch.Tensor]
PIECE = 1 << 20  # characters of text that are tokenized at once
TEACHER = "teacher:"  # before the names of inputs that are the teacher's own
TEXTS = (".txt", ".text", ".md", ".jsonl")


class Samples(Protocol):
    """Numbered samples."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of its content."""
        ...

    def __len__(self) -> int: ...

    def batch(self, ids: np.ndarray) -> Batch:
        """The model's inputs and `targets` of these samples, on the CPU."""
        ...


@dataclass
class Windows:
    """Windows of a stream of tokens: sample i is tokens i * length ... (i + 1) * length, and the next of each."""

    name: str
    digest: str
    tokens: np.ndarray  # [n], usually a file
    length: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def batch(self, ids: np.ndarray) -> Batch:
        """`input_ids` and `targets`, int64 [B, length]."""
        rows = [self.tokens[i * self.length : (i + 1) * self.length + 1] for i in ids]
        found = torch.from_numpy(np.stack(rows).astype(np.int64))
        return {"input_ids": found[:, :-1].contiguous(), "targets": found[:, 1:].contiguous()}


@dataclass
class Packed:
    """Whole documents in rows of `length`, in order; `position_ids` begin anew with each: attention stays inside.

    A longer document goes on in the next rows. Places after the last document of a row do not count.
    """

    name: str
    digest: str
    tokens: np.ndarray
    starts: np.ndarray  # [documents + 1] places in tokens
    length: int
    rows: list[list[tuple[int, int]]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        room = self.length
        row: list[tuple[int, int]] = []
        for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            while end - start > 1:
                if end - start - 1 > room and row:  # inputs are one fewer than tokens
                    self.rows.append(row)
                    room, row = self.length, []
                stop = min(end, start + room + 1)
                row.append((start, stop))
                room -= stop - start - 1
                start = stop - 1
                if room == 0:
                    self.rows.append(row)
                    room, row = self.length, []
        if row:
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids: np.ndarray) -> Batch:
        """`input_ids`, `position_ids`, `targets`, int64 [B, length]."""
        inputs = torch.zeros(len(ids), self.length, dtype=torch.int64)
        places, targets = torch.zeros_like(inputs), torch.full_like(inputs, IGNORE)
        for row, i in enumerate(ids):
            at = 0
            for start, stop in self.rows[i]:
                found = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
                size = len(found) - 1
                inputs[row, at : at + size], targets[row, at : at + size] = found[:-1], found[1:]
                places[row, at : at + size] = torch.arange(size)
                at += size
            places[row, at:] = torch.arange(self.length - at)  # what is left is a document of its own
        return {"input_ids": inputs, "position_ids": places, "targets": targets}


@dataclass
class Examples:
    """Labelled raw examples, made inputs by the task when they are asked for."""

    source: data.Data
    task: Task
    targets: np.ndarray  # int64 [n]

    @property
    def name(self) -> str:
        """The data's."""
        return self.source.name

    @property
    def digest(self) -> str:
        """The data's."""
        return self.source.digest

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, ids: np.ndarray) -> Batch:
        """The task's inputs by name, and `targets` int64 [B]. Raises BadInput for what cannot be decoded."""
        prepared = self.task.prepare([self.source.examples[int(i)] for i in ids])
        made = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in prepared.items()}
        return made | {"targets": torch.from_numpy(self.targets[ids])}


@dataclass
class Sentences:
    """Texts without labels for encoders, one per sample, cut to `length` tokens; `targets` say which tokens are real.

    teacher: the task of a teacher that cuts texts into other tokens; its inputs then are there too, as `teacher:NAME`.
    """

    name: str
    digest: str
    texts: Sequence[str]
    task: Task
    length: int
    teacher: Task | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, ids: np.ndarray) -> Batch:
        """The encoder's inputs by name, int64 [B, longest], and `targets` [B, longest]: 0, or IGNORE at padding."""
        texts = [self.texts[int(i)] for i in ids]
        made = self._inputs(self.task, texts, "")
        made["targets"] = torch.where(made["attention_mask"] > 0, 0, IGNORE)
        return made | (self._inputs(self.teacher, texts, TEACHER) if self.teacher else {})

    def _inputs(self, task: Task, texts: list[str], prefix: str) -> Batch:
        prepared = {name: array[:, : self.length or None].copy() for name, array in task.batch(texts).items()}
        return {prefix + name: torch.from_numpy(array) for name, array in prepared.items()}


@dataclass
class Joined:
    """Several sources; the samples of each are numbered after those of the sources before it."""

    parts: Sequence[Samples]
    weights: list[float]

    @property
    def name(self) -> str:
        """Names of all."""
        return ";".join(part.name for part in self.parts)

    @property
    def digest(self) -> str:
        """Of all digests."""
        return hashlib.sha256("".join(part.digest for part in self.parts).encode()).hexdigest()

    @property
    def sizes(self) -> list[int]:
        """Samples of each."""
        return [len(part) for part in self.parts]

    def __len__(self) -> int:
        return sum(self.sizes)

    def batch(self, ids: np.ndarray) -> Batch:
        """Of one source or of several whose tensors have the same shapes."""
        ends = np.cumsum(self.sizes)
        which = np.searchsorted(ends, ids, side="right")
        made, rows = [], []
        for i, part in enumerate(self.parts):
            here = np.flatnonzero(which == i)
            if len(here):
                made.append(part.batch(ids[here] - (ends[i] - len(part))))
                rows.append(here)
        if len(made) == 1:
            return made[0]
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        return {name: torch.cat([one[name] for one in made])[back] for name in made[0]}


def told(data: Joined, teacher: Task) -> None:
    """Let sentences be cut into the teacher's tokens too, where its tokenizer is another."""
    for part in data.parts:
        if isinstance(part, Sentences):
            ours, theirs = ((task.folder / "tokenizer.json").read_bytes() for task in (part.task, teacher))
            part.teacher = teacher if ours != theirs else None


def opened(text: str, task: Task, length: int, packing: str, folder: Path, writes: bool = True) -> Joined:
    """The samples of "SOURCE*WEIGHT;SOURCE*WEIGHT".

    Args:
        folder: where tokens are kept, by what they are made of. writes: whether this process makes them, or waits.

    Raises:
        Missing: no such file. BadInput: nothing in it, no labels, or a label that does not fit (file and line).
    """
    parts, weights = [], []
    for item in text.split(";"):
        name, star, weight = item.rpartition("*")
        try:
            weights.append(float(weight) if star else 1.0)
        except ValueError as error:
            raise BadInput(f"data '{item}': after * a weight is wanted, like corpus.txt*0.7") from error
        if not 0 < weights[-1] < float("inf"):
            raise BadInput(f"data '{item}': the weight must be above 0")
        parts.append(source(Path(name if star else item), task, length, packing, folder, writes))
    return Joined(parts, weights)


def source(path: Path, task: Task, length: int, packing: str, folder: Path, writes: bool) -> Samples:
    """One source; see `opened`."""
    if not path.exists():
        raise Missing(f"no such data: {path}\nGive a text, a table, an array file, or a folder of texts or pictures.")
    if task.kind == "text-generation":
        return windows(path, task, length, packing, folder, writes)
    found = data.read(path)
    if task.kind == "sentence-similarity":
        parts = [part for each in found.examples for part in (each if isinstance(each, tuple) else (each,))]
        texts = [line.strip() for part in parts if isinstance(part, str) for line in part.splitlines() if line.strip()]
        if not texts:
            raise BadInput(f"{found.name} has no texts: an encoder learns from sentences, one in a line")
        return Sentences(found.name, found.digest, texts, task, length)
    if found.labels is None:
        raise BadInput(f"{found.name} has no labels: {task.kind} is learned from them. Give a column 'label'.")
    targets = data.targets(found, task)
    if not all(isinstance(target, int | np.integer) for target in targets):
        raise BadInput(f"{task.kind} is not trained here: its labels are no classes ({found.places[0]})")
    return Examples(found, task, np.asarray(targets, np.int64))


def windows(path: Path, task: Task, length: int, packing: str, folder: Path, writes: bool) -> Samples:
    """Text as tokens in a file of `folder`, made once; then as windows or packed documents."""
    if path.suffix == ".npy":
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadInput(f"{path} is not an array file of token ids: {error}") from error
        if found.dtype.kind not in "iu" or found.ndim not in (1, 2) or not found.size:
            raise BadInput(f"{path}: whole numbers [n] or [windows, length] wanted, not {found.dtype} {found.shape}")
        stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns} {found[:64].tobytes()!r}"
        return _long_enough(
            Windows(path.name, hashlib.sha256(stamp.encode()).hexdigest(), found.reshape(-1), length), path, length
        )
    files = _texts(path)
    facts = {
        "files": [[str(f.relative_to(path if path.is_dir() else path.parent)), f.stat().st_size, f.stat().st_mtime_ns]
                  for f in files],
        "tokenizer": hashlib.sha256((task.folder / "tokenizer.json").read_bytes()).hexdigest()
        if (task.folder / "tokenizer.json").exists() else "",
        "version": 1,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    where = folder / f"tokens-{key}"
    if not (where / "facts.json").exists():
        if not writes:
            raise Missing(f"{where}: tokens that another process makes are not there yet")
        tokenize(files, task, where)
    known = read_object(where / "facts.json")
    try:
        tokens = np.memmap(where / "tokens.bin", dtype=known["dtype"], mode="r", shape=(known["tokens"],))
        starts = np.fromfile(where / "starts.bin", np.int64)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise Corrupt(f"{where} is damaged: {error}\nRemove it; the tokens are made again.") from error
    if packing == "documents":
        return _long_enough(Packed(path.name, known["digest"], tokens, starts, length), path, length)
    return _long_enough(Windows(path.name, known["digest"], tokens, length), path, length)


def _long_enough(samples: Any, path: Path, length: int) -> Samples:
    if not len(samples):
        raise BadInput(
            f"{path} has {len(samples.tokens)} tokens, fewer than one sample of {length}: give more text, or --length"
        )
    return samples


def _texts(path: Path) -> list[Path]:
    """The text files at a path, in order."""
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in TEXTS and f.is_file())
        if not found:
            raise BadInput(f"{path} holds no texts: {' '.join(TEXTS)}")
        return found
    return [path]


def documents(path: Path) -> Iterator[list[str]]:
    """Documents of a file, each as pieces of about a million characters that end at the end of a line.

    A text file is one document; a .jsonl file has one in the field `text` of each line; other tables one per row.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        with open(path, encoding="utf8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise BadInput(f"{path.name}:{number}: an object with the field 'text' is wanted") from error
                if not isinstance(text, str):
                    raise BadInput(f"{path.name}:{number}: text is {type(text).__name__}, not a string")
                yield [text]
    elif suffix in TEXTS:
        yield _pieces(path)  # type: ignore[misc]
    else:
        for text in data.read(path).texts:
            yield [text]


def _pieces(path: Path) -> Iterator[str]:
    with open(path, encoding="utf8", newline="") as file:
        while True:
            try:
                piece = file.read(PIECE)
                piece += file.readline() if piece and not piece.endswith("\n") else ""
            except UnicodeDecodeError as error:
                raise BadInput(f"{path} is not UTF-8 text: {error.reason} near byte {error.start}") from error
            if not piece:
                return
            yield piece


def tokenize(files: list[Path], task: Task, where: Path) -> None:
    """Write tokens.bin, starts.bin (places where documents begin) and facts.json; the folder gets its name at the end.

    Cost: one pass; memory: a piece of text and its tokens.
    """
    part = where.with_name(f".{where.name}.{os.getpid()}.{os.uname().nodename}")
    part.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if task.tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    end = task.stop[:1]
    digest, total, starts = hashlib.sha256(), 0, [0]
    with open(part / "tokens.bin", "wb") as out:
        for path in files:
            for document in documents(path):
                size = 0
                for piece in document:
                    digest.update(piece.encode())
                    found = np.asarray(task.encode(piece), dtype)
                    out.write(found.tobytes())
                    size += len(found)
                if not size:
                    continue
                out.write(np.asarray(end, dtype).tobytes())
                total += size + len(end)
                starts.append(total)
        out.flush()
        os.fsync(out.fileno())
    if not total:
        raise BadInput(f"{files[0]} is empty: it holds no text to learn from")
    np.asarray(starts, np.int64).tofile(part / "starts.bin")
    facts = {"dtype": np.dtype(dtype).name, "tokens": total, "digest": digest.hexdigest()}
    write_atomic(part / "facts.json", json.dumps(facts))
    try:
        part.rename(where)
    except OSError:  # another process was faster
        if not (where / "facts.json").exists():
            raise
