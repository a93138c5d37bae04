"""Cache: the k largest log-probabilities of the teacher at every position, made once; then no teacher is in memory.

    FOLDER/facts.json     k, temperature, classes, dtype; digests of teacher and data, tokens of a sample
    FOLDER/part-R.bin     one compressed block for each sample that rank R made
    FOLDER/part-R.npy     int64 [samples, 3]: number of the sample, place and size of its block

A block is zlib of the bytes of values [T, k] (float16 or float32) and places (uint16 or uint32), each by planes of
bytes: first bytes of all numbers, then the second, which packs better. Blocks are read from the file when their samples
are asked for, so the cache may be larger than memory.
Source: Hinton et al. 2015, arXiv:1503.02531; Anshumann et al. 2025, arXiv:2503.16870, on what a bare top-k loses: here
    the rest is kept as one bucket (distill/kl.py), so the divergence is a lower bound of the whole, and equal at k = V.
Bytes:  about 0.8 x 4 k a position in float16 for vocabularies up to 65,536.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherry.errors import BadInput, Corrupt, Diverged, Missing, Unsupported
from wherry.report import read_object, write_atomic

FACTS = "facts.json"
BEGUN = "begun.json"  # what the parts of an unfinished cache are of
ROWS = ("top_values", "top_indices")
PREFIX = "cached:"  # of their names in a batch: no inputs of the student
LEVEL = 1  # of zlib: 6 saves 2% more in four times the time
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Facts:
    """What a cache holds. teacher, data: digests; length: tokens of a sample, 0 where the samples are no text."""

    top: int
    temperature: float
    classes: int
    dtype: str
    teacher: str
    data: str
    length: int

    def check(self, wanted: "Facts", folder: Path) -> None:
        """Raises BadInput when the cache was made for something else."""
        for name, own in asdict(self).items():
            other = getattr(wanted, name)
            if own != other:
                raise BadInput(
                    f"{folder} was made with {name} {own}, this run has {other}.\nRemove it, or give another folder."
                )


def planes(array: np.ndarray) -> bytes:
    """Bytes of an array, those of the same rank together."""
    return np.ascontiguousarray(array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T).tobytes()


def unplanes(raw: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The opposite."""
    table = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(table.T).view(dtype).reshape(shape)


def largest(logits: torch.Tensor, top: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities at the temperature, descending, and their classes: each [..., k]."""
    values, indices = (logits.float() / temperature).log_softmax(-1).topk(min(top, logits.shape[-1]), -1)
    return values, indices


class Writer:
    """Blocks of one rank, written under a temporary name; `close` gives them their own."""

    def __init__(self, folder: Path, facts: Facts, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.facts, self.rank = folder, facts, rank
        self.part = folder / f".part-{rank:05}.bin"
        self.file = open(self.part, "wb")
        self.index: list[tuple[int, int, int]] = []
        self.at = 0

    def add(self, ids: np.ndarray, logits: torch.Tensor) -> None:
        """Samples [B] and the teacher's logits [B, T, V] or [B, C]. Raises Diverged when they are not finite."""
        values, indices = largest(logits, self.facts.top, self.facts.temperature)
        if not torch.isfinite(values).all():
            raise Diverged("the teacher's logits are not finite: it cannot teach")
        kinds = np.dtype(self.facts.dtype), place_type(self.facts.classes)
        v, p = values.cpu().numpy().astype(kinds[0]), indices.cpu().numpy().astype(kinds[1])
        for i, number in enumerate(ids):
            block = zlib.compress(planes(v[i]) + planes(p[i]), LEVEL)
            self.file.write(block)
            self.index.append((int(number), self.at, len(block)))
            self.at += len(block)

    def close(self) -> None:
        """Flush, index, rename."""
        self.file.close()
        name = f"part-{self.rank:05}"
        temporary = self.folder / f".{name}.npy"
        with open(temporary, "wb") as file:
            np.save(file, np.array(self.index, np.int64).reshape(-1, 3))
        self.part.rename(self.folder / f"{name}.bin")
        temporary.rename(self.folder / f"{name}.npy")

    def drop(self) -> None:
        """Leave nothing of an unfinished part."""
        self.file.close()
        self.part.unlink(missing_ok=True)


def place_type(classes: int) -> np.dtype:
    """Type of a class's number."""
    return np.dtype(np.uint16 if classes <= 1 << 16 else np.uint32)


def make(
    folder: Path, facts: Facts, ids: Iterable[np.ndarray], logits: Callable[[np.ndarray], torch.Tensor],
    rank: int = 0, progress: Progress = lambda *_: None, total: int = 0,
) -> None:  # fmt: skip
    """Write one rank's part: batches of sample numbers, and what the teacher says of each; each sample once.

    The part that is there already is left alone. `finish` makes a folder of parts a cache.
    """
    if (folder / f"part-{rank:05}.npy").exists():
        return
    writer, seen = Writer(folder, facts, rank), set()
    try:
        for done, batch in enumerate(ids):
            new = np.array([i for i in dict.fromkeys(batch.tolist()) if i not in seen], np.int64)
            seen.update(new.tolist())
            if len(new):
                progress(done, total, "teacher's answers")
                with torch.no_grad():
                    writer.add(new, logits(new))
        writer.close()
    except BaseException:
        writer.drop()
        raise


def begin(folder: Path, facts: Facts, **more: int) -> None:
    """Remove the parts that a run of other facts left unfinished, and note what the next are of."""
    wanted = asdict(facts) | more
    if not (folder / BEGUN).exists() or read_object(folder / BEGUN) != wanted:
        for part in folder.glob("part-*"):
            part.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / BEGUN, json.dumps(wanted) + "\n")


def finish(folder: Path, facts: Facts) -> None:
    """All parts are there: write the facts."""
    write_atomic(folder / FACTS, json.dumps(asdict(facts), indent=1) + "\n")


def ready(folder: Path) -> bool:
    """Whether a folder is a finished cache."""
    return (folder / FACTS).exists()


class Cached:
    """A cache to read from, in place of a teacher."""

    def __init__(self, folder: Path) -> None:
        if not ready(folder):
            raise Missing(f"{folder} is no finished cache of a teacher: it has no {FACTS}")
        found: Mapping[str, Any] = read_object(folder / FACTS)
        try:
            self.facts = Facts(**found)
        except TypeError as error:
            raise Corrupt(f"{folder / FACTS} is not a teacher cache's: {error}") from error
        self.folder = folder
        self.blocks: dict[int, tuple[np.ndarray, int, int]] = {}
        for file in sorted(folder.glob("part-*.npy")):
            index = np.load(file, allow_pickle=False)
            if not len(index):
                continue
            raw = np.memmap(file.with_suffix(".bin"), np.uint8, "r")
            if int((index[:, 1] + index[:, 2]).max()) > len(raw):
                raise Corrupt(f"{file.with_suffix('.bin')} is cut off.\nRemove {folder} and make it again.")
            for number, at, size in index.tolist():
                self.blocks[number] = (raw, at, size)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(f.stat().st_size for f in self.folder.iterdir())

    def rows(self, ids: np.ndarray) -> dict[str, Any]:
        """`top_values`, `top_indices` [B, T, k] (or [B, k]) and `temperature`.

        Raises BadInput for a sample that the cache has not, Corrupt for a damaged block.
        """
        k = min(self.facts.top, self.facts.classes)
        kinds = np.dtype(self.facts.dtype), place_type(self.facts.classes)
        shape = (self.facts.length, k) if self.facts.length else (k,)
        size = int(np.prod(shape))
        values, places = [], []
        for number in ids.tolist():
            if number not in self.blocks:
                raise BadInput(f"{self.folder} lacks sample {number}: it was made for other data or fewer steps")
            raw, at, length = self.blocks[number]
            try:
                block = zlib.decompress(raw[at : at + length].tobytes())
            except zlib.error as error:
                raise Corrupt(f"{self.folder}: sample {number} is damaged ({error}).\nMake the cache again.") from error
            if len(block) != size * (kinds[0].itemsize + kinds[1].itemsize):
                raise Corrupt(f"{self.folder}: sample {number} has {len(block)} bytes, not those of {shape}")
            middle = size * kinds[0].itemsize
            values.append(unplanes(block[:middle], kinds[0], shape))
            places.append(unplanes(block[middle:], kinds[1], shape))
        return {
            "top_values": torch.from_numpy(np.stack(values).astype(np.float32)),
            "top_indices": torch.from_numpy(np.stack(places).astype(np.int64)),
            "temperature": self.facts.temperature,
        }

    def call(self, batch: Mapping[str, Any], needs: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What a teacher says of a batch of `Answered` samples. Raises Unsupported when more than logits is asked."""
        if more := sorted(needs - {"teacher"}):
            raise Unsupported(f"{self.folder} holds the teacher's logits alone, not its {' and '.join(more)} states")
        return {name: batch[PREFIX + name] for name in ROWS} | {"temperature": self.facts.temperature}


def fits(job: Any, objective: Any) -> None:
    """Raise BadInput where a run asks its teacher what a cache cannot know."""
    losses = [step for step in objective.losses if "teacher" in step.needs]
    if sorted(objective.needs - {"teacher"}) or [step.method for step in losses] != ["kl"]:
        raise BadInput("top: a cache holds the teacher's logits for one step kl; leave top out for this recipe")
    if objective.having("sample") or job.augment:
        changing = "augment" if job.augment else "onpolicy"
        raise BadInput(f"top: with {changing} each sample is new every time, and no cache knows it; leave top out")


class Answered:
    """Samples with the cached teacher's answers in each batch, read by whoever makes the batches."""

    def __init__(self, data: Any, cached: Cached) -> None:
        self.data, self.cached = data, cached

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """The samples' own tensors, and ROWS."""
        rows = self.cached.rows(ids)
        return {**self.data.batch(ids), **{PREFIX + name: rows[name] for name in ROWS}}


def answered(
    teacher: Any, data: Any, ids: Iterable[np.ndarray], folder: Path, wanted: Facts, rank: int,
    agree: Callable[[], None], progress: Progress, total: int, ranks: int = 1,
) -> Answered:  # fmt: skip
    """The data with answers from the cache in `folder`, made now where it is not there.

    Args:
        teacher: a `student.Student` on its device, or None where the cache must be there.
        ids: the batches of sample numbers that this rank will ask for. agree: waits for all ranks.
        wanted: what the cache must be of. Each rank writes its part; the first says that all are done.
    """
    if not ready(folder):
        if teacher is None:
            raise Missing(f"{folder} is no finished cache of a teacher")
        if rank == 0:
            begin(folder, wanted, total=total, ranks=ranks)
        agree()
        device = next(teacher.module.parameters()).device

        def logits(numbers: np.ndarray) -> torch.Tensor:
            batch = {name: tensor.to(device) for name, tensor in data.batch(numbers).items()}
            found: torch.Tensor = teacher.call(batch)["logits"]
            return found

        make(folder, wanted, ids, logits, rank, progress, total)
        agree()
        if rank == 0:
            finish(folder, wanted)
        agree()
    cached = Cached(folder)
    cached.facts.check(wanted, folder)
    return Answered(data, cached)
