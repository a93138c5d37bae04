"""Text: as tokens in a file that is never read whole; cut into windows, rows of documents, or windows to judge on.

Text (.txt, .jsonl, .npy of ids, a folder of texts) becomes `Windows` of `length` tokens and the next of each, rows of
whole documents (`Packed`), or `Overlapping` windows in which every token but the first is judged once.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherry import data
from wherry.errors import BadInput, Corrupt
from wherry.objective import IGNORE
from wherry.report import read_object, write_atomic
from wherry.task import Task

Batch = dict[str, torch.Tensor]
PIECE = 1 << 20  # characters of text that are tokenized at once
TEXTS = (".txt", ".text", ".md", ".jsonl")


@dataclass(frozen=True)
class Cut:
    """How text becomes samples of `length` tokens.

    packing: "stream" or "documents". stride: tokens from the start of a window to the next one's; 0 = length.
    overlap: of windows to judge on, tokens that are only context; 0: they are those that one trains on.
    judged: whether the bytes of the text must be known.
    """

    length: int
    packing: str = "stream"
    stride: int = 0
    overlap: int = 0
    judged: bool = False

    def __post_init__(self) -> None:
        if self.packing == "documents" and (self.stride or self.overlap):
            raise BadInput("stride and overlap are of windows of the running text: --set packing=stream")
        if self.overlap and self.overlap >= self.length:
            raise BadInput(f"overlap {self.overlap}: fewer than the {self.length} tokens of a window are wanted")


@dataclass
class Windows:
    """Windows of a stream of tokens: sample i is `length` tokens from i * stride on, and the next of each.

    tokens: int [n], usually a file. stride: 0 = length. size: UTF-8 bytes of the text, 0: not known.
    """

    name: str
    digest: str
    tokens: np.ndarray
    length: int
    stride: int = 0
    size: int = 0

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1 - self.length) // (self.stride or self.length) + 1)

    def batch(self, ids: np.ndarray) -> Batch:
        """`input_ids` and `targets`, int64 [B, length]."""
        starts = [int(i) * (self.stride or self.length) for i in ids]
        found = torch.from_numpy(np.stack([self.tokens[i : i + self.length + 1] for i in starts]).astype(np.int64))
        return {"input_ids": found[:, :-1].contiguous(), "targets": found[:, 1:].contiguous()}


@dataclass
class Overlapping:
    """Windows to judge on: every token of a stream but the first is a target once.

    Source: "strided" perplexity, as Baevski and Auli 2019 (arXiv:1809.10853) evaluate.
    All windows but the first have `overlap` tokens before the first target. Places behind the end do not count.
    """

    name: str
    digest: str
    tokens: np.ndarray
    length: int
    overlap: int
    size: int = 0

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - 1 - self.length) // (self.length - self.overlap)))

    def batch(self, ids: np.ndarray) -> Batch:
        """`input_ids` and `targets`, int64 [B, length]."""
        inputs = torch.zeros(len(ids), self.length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE)
        for row, i in enumerate(ids):
            start = int(i) * (self.length - self.overlap)
            found = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
            inputs[row, : len(found) - 1], targets[row, : len(found) - 1] = found[:-1], found[1:]
            targets[row, : self.overlap if i else 0] = IGNORE
        return {"input_ids": inputs, "targets": targets}


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
    size: int = 0
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


def opened(path: Path, task: Task, cut: Cut, folder: Path) -> Any:
    """Text as tokens in a file of `folder`, made once; then as samples.

    Raises Corrupt; BadInput for what is no text, or too short for one sample.
    """
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadInput(f"{path} is not an array file of token ids: {error}") from error
        if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2) or not tokens.size:
            raise BadInput(f"{path}: whole numbers [n] or [windows, length] wanted, not {tokens.dtype} {tokens.shape}")
        if cut.packing == "documents" and not cut.judged:
            raise BadInput(f"{path} does not say where documents begin: packing=stream, or give text or .jsonl")
        with open(path, "rb") as file:  # of what it holds: a file written again is the same data
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        tokens, starts = tokens.reshape(-1), np.array([0])
        size = spelled(tokens, task) if cut.judged else 0
    else:
        tokens, starts, digest, size = tokenized(path, task, folder)
    made: Any
    if cut.packing == "documents" and path.suffix != ".npy":
        made = Packed(path.name, digest, tokens, starts, cut.length, size)
    elif cut.judged and cut.overlap:
        made = Overlapping(path.name, digest, tokens, cut.length, cut.overlap, size)
    else:
        made = Windows(path.name, digest, tokens, cut.length, cut.stride, size)
    if not len(made) or len(tokens) < 2:
        raise BadInput(
            f"{path} has {len(tokens)} tokens, fewer than one sample of {cut.length}: give more text, or --length"
        )
    return made


def spelled(tokens: np.ndarray, task: Task) -> int:
    """UTF-8 bytes of the text that these tokens are, without the special ones. Cost: all of it in memory."""
    return len(task.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode())


def tokenized(path: Path, task: Task, folder: Path) -> tuple[np.ndarray, np.ndarray, str, int]:
    """Tokens, places where documents begin, digest and UTF-8 bytes of the text at a path; see `tokenize`."""
    files = _texts(path)
    facts = {
        "files": [[str(f.relative_to(path if path.is_dir() else path.parent)), f.stat().st_size, f.stat().st_mtime_ns]
                  for f in files],
        "tokenizer": hashlib.sha256((task.folder / "tokenizer.json").read_bytes()).hexdigest()
        if (task.folder / "tokenizer.json").exists() else "",
        "version": 2,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    where = folder / f"tokens-{key}"
    if not (where / "facts.json").exists():
        tokenize(files, task, where)
    known = read_object(where / "facts.json")
    try:
        tokens = np.memmap(where / "tokens.bin", dtype=known["dtype"], mode="r", shape=(known["tokens"],))
        return tokens, np.fromfile(where / "starts.bin", np.int64), str(known["digest"]), int(known["bytes"])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise Corrupt(f"{where} is damaged: {error}\nRemove it; the tokens are made again.") from error


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
    digest, total, size, starts = hashlib.sha256(), 0, 0, [0]
    with open(part / "tokens.bin", "wb") as out:
        for path in files:
            for document in documents(path):
                before = total
                for piece in document:
                    digest.update(piece.encode())
                    size += len(piece.encode())
                    found = np.asarray(task.encode(piece), dtype)
                    out.write(found.tobytes())
                    total += len(found)
                if total == before:
                    continue
                out.write(np.asarray(end, dtype).tobytes())
                total += len(end)
                starts.append(total)
        out.flush()
        os.fsync(out.fileno())
    if not total:
        raise BadInput(f"{files[0]} is empty: it holds no text to learn from")
    np.asarray(starts, np.int64).tofile(part / "starts.bin")
    facts = {"dtype": np.dtype(dtype).name, "tokens": total, "digest": digest.hexdigest(), "bytes": size}
    write_atomic(part / "facts.json", json.dumps(facts))
    try:
        part.rename(where)
    except OSError:  # another process was faster
        if not (where / "facts.json").exists():
            raise
