"""Read and write safetensors files one tensor at a time: no mmap, so that memory stays that of one tensor.

Source: the safetensors format (8-byte little-endian header length, JSON header, raw data). Every claim of the
header is checked against the file before a byte of data is read: a truncated or junk file is named at once.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from wherry.errors import Corrupt, Exhausted, Missing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_MOST = 100 << 20  # the limit of the reference implementation, in bytes


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype, shape, and its bytes [begin, end) in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """One safetensors file; the header is read and checked when it is opened.

    Raises:
        Missing: no such file.
        Corrupt: junk header, truncated data, or entries that overlap or do not fit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise Missing(f"no such file: {path}")
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(HEADER_MOST, size - 8):
                raise Corrupt(f"{path} is not a safetensors file: its header would be {length:,} bytes of {size:,}")
            raw = file.read(length)
        self.header_digest = hashlib.sha256(prefix + raw).hexdigest()
        try:
            header = json.loads(raw)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            start = 8 + length
            self.entries = {
                name: Entry(
                    DTYPES[item["dtype"]],
                    tuple(int(extent) for extent in item["shape"]),
                    start + int(item["data_offsets"][0]),
                    start + int(item["data_offsets"][1]),
                )
                for name, item in header.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise Corrupt(f"{path} has a junk safetensors header ({why}); download or save it again") from error
        end = start
        for name, entry in sorted(self.entries.items(), key=lambda pair: pair[1].begin):
            expected = math.prod(entry.shape) * entry.dtype.itemsize
            if entry.begin != end or entry.end - entry.begin != expected or min(entry.shape, default=0) < 0:
                raise Corrupt(f"{path}: the header's entry for {name} does not fit its shape or its neighbours")
            end = entry.end
        if end != size:
            raise Corrupt(f"{path} is truncated or padded: {size:,} bytes, its header says {end:,}; get it again")

    def entry(self, name: str) -> Entry:
        """Where a tensor lies. Raises Corrupt when the file has none of that name."""
        if name not in self.entries:
            raise Corrupt(f"{self.path} has no tensor {name}; it is damaged, or of another model")
        return self.entries[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read into memory of its own."""
        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)  # aligned, so that kernels sum in the same order each time
        if not tensor.numel():
            return tensor
        data = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with open(self.path, "rb") as file:
            file.seek(entry.begin)
            if file.readinto(data) != len(data):
                raise Corrupt(f"{self.path} is truncated inside of {name}")
        return tensor

    def chunks(self, name: str, size: int = 16 << 20) -> Iterator[bytes]:
        """The raw bytes of one tensor in pieces."""
        entry = self.entry(name)
        with open(self.path, "rb") as file:
            file.seek(entry.begin)
            left = entry.end - entry.begin
            while left:
                piece = file.read(min(size, left))
                if not piece:
                    raise Corrupt(f"{self.path} is truncated inside of {name}")
                left -= len(piece)
                yield piece


def header_bytes(entries: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The prefix and header of a safetensors file that holds `entries` in their order, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a temporary name, flush to disk, rename. Raises Exhausted when the disk is full."""

    def pieces() -> Iterator[bytes]:
        yield header_bytes({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata or {})
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""  # type: ignore[misc,arg-type]

    write_pieces(path, pieces())


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a stream of bytes so that the file is either whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Exhausted(f"cannot write {path}: {error.strerror or error}.\nFree space or choose another -o.") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
