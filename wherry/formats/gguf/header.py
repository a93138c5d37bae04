"""A GGUF file's header, read with suspicion: every count, length and offset is checked against the file's size.

    magic "GGUF", version u32, tensors u64, keys u64
    key string, type u32, value                      metadata, `keys` times
    name string, dims u32, extents u64, type u32, offset u64      `tensors` times, fastest axis first
    padding to general.alignment, then the data

Nothing is allocated on the word of the file: a list is never longer than the bytes that could hold it. Torch-free.
Source: the GGUF specification, ggml/docs/gguf.md; sizes of blocks from the `gguf` package.
"""

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from wherry.errors import Corrupt, Missing, Unsupported

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DIMS_MOST = 4  # what ggml can hold
HEADER_MOST = 1 << 30  # bytes; the largest vocabularies need some 20 MB


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies. shape: slowest axis first, as in numpy; kind: name of a ggml type, "Q4_1"."""

    name: str
    shape: tuple[int, ...]
    kind: str
    begin: int
    bytes: int


class Header:
    """Metadata and tensor table of one file.

    metadata: {key: value}, arrays as lists. tensors: {name: Tensor}, in the file's order.
    digest: sha256 of the header's bytes.

    Raises:
        Missing: no such file.
        Corrupt: not GGUF, cut short, or with a claim that its own bytes contradict; says which.
        Unsupported: GGUF of version 1, or written for a big-endian machine, or one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise Missing(f"no such file: {path}")
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._file: BinaryIO = file
            self._end = min(self.size, HEADER_MOST)
            self._hash = hashlib.sha256()
            try:
                self._read()
            except UnicodeDecodeError as error:
                raise self._bad(f"a text in its header is not UTF-8 ({error.reason})") from error
            del self._file
        self.digest = self._hash.hexdigest()
        del self._hash

    @property
    def arch(self) -> str:
        """The architecture, "llama"."""
        return str(self.metadata.get("general.architecture", ""))

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor [bytes], uint8, in memory of their own."""
        tensor = self.tensors[name]
        data = np.empty(tensor.bytes, dtype=np.uint8)
        with open(self.path, "rb") as file:
            file.seek(tensor.begin)
            if file.readinto(memoryview(data)) != tensor.bytes:  # type: ignore[arg-type]
                raise Corrupt(f"{self.path} is cut short inside of {name}")
        return data

    def _bad(self, reason: str) -> Corrupt:
        return Corrupt(f"{self.path} is damaged: {reason}.\nDownload or export it again.")

    def _read(self) -> None:
        magic = self._take(min(4, self.size))
        if magic != b"GGUF":
            raise Corrupt(f"{self.path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
                raise Unsupported(f"{self.path} was written for a big-endian machine; convert it on such a machine")
            if version == 1:
                raise Unsupported(
                    f"{self.path} is GGUF version 1 (2023), which nothing reads any more; get a newer file"
                )
            raise self._bad(f"its version would be {version}")
        tensors, keys = self._number("Q"), self._number("Q")
        for count, least, what in ((tensors, 24, "tensors"), (keys, 13, "metadata keys")):
            if count * least > self.size:
                raise self._bad(f"its header claims {count:,} {what}, more than its {self.size:,} bytes can hold")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in self.metadata:
                raise self._bad(f"the key {key!r} is there twice")
            self.metadata[key] = self._value(self._number("I"), key)
        if self.metadata.get("split.count", 0) > 1:
            parts = self.metadata["split.count"]
            raise Unsupported(f"{self.path} is one part of {parts}; join them with llama-gguf-split --merge")
        table = [self._entry() for _ in range(tensors)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise self._bad(f"general.alignment is {align}, not a power of two")
        start = -(-self._file.tell() // align) * align
        self.tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset, size in table:
            if name in self.tensors:
                raise self._bad(f"the tensor {name} is there twice")
            if offset % align:
                raise self._bad(f"the tensor {name} begins at {offset}, not at a multiple of {align}")
            if start + offset + size > self.size:
                raise self._bad(
                    f"{name} would end at byte {start + offset + size:,} of {self.size:,}: the file is cut short"
                )
            self.tensors[name] = Tensor(name, shape, kind, start + offset, size)
        begin = start
        for tensor in sorted(self.tensors.values(), key=lambda t: t.begin):
            if tensor.begin < begin:
                raise self._bad(f"the tensor {tensor.name} overlaps the one before it")
            begin = tensor.begin + tensor.bytes

    def _take(self, count: int) -> bytes:
        if count > self._end - self._file.tell():
            raise self._bad(f"its header ends in the middle, at byte {self._file.tell():,} of {self.size:,}")
        data = self._file.read(count)
        self._hash.update(data)
        return data

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf8")

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise self._bad(f"the value of {key!r} has the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            code = SCALARS[inner]
            if count * struct.calcsize(f"<{code}") > self._end - self._file.tell():
                raise self._bad(f"the list {key!r} claims {count:,} entries, more than the file can hold")
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))
        if inner not in (STRING, ARRAY):
            raise self._bad(f"the list {key!r} is of the unknown type {inner}")
        if inner == ARRAY or count * 8 > self._end - self._file.tell():
            raise self._bad(f"the list {key!r} is nested or claims {count:,} entries, more than the file can hold")
        return [self._value(STRING, key) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name, dims = self._string(), self._number("I")
        if not 1 <= dims <= DIMS_MOST:
            raise self._bad(f"the tensor {name} would have {dims} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dims)]))
        number, offset = self._number("I"), self._number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise Unsupported(f"{self.path}: the tensor {name} is of the unknown ggml type {number}") from error
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        if not count:
            raise self._bad(f"the tensor {name} would have the shape {list(shape)}")
        if shape[-1] % per_block:
            raise self._bad(f"the tensor {name} has rows of {shape[-1]}, which blocks of {per_block} do not fill")
        return name, shape, kind.name, offset, count // per_block * block_bytes
