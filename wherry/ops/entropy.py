"""Entropy: arrays of few or uneven values as few bytes, without loss.

    few values    palette, and the place of each element in it                    shared weights, codes of few bits
    zeros         a bitmap in bytes of 8 flags, and what is not zero              pruned floats: half the bytes at 50%
    else          planes: the first byte of every element, then the second ...    exponents repeat themselves
each stream under a range coder with the stream's own frequencies, or as it is where that is not shorter.
Source: Martin 1979 (range coding), in constriction (Bamler 2022, arXiv:2201.01741); bitmaps as in compressed-tensors'
    sparse-bitmask; byte planes as in ZipNN (arXiv:2411.05239). Deep Compression (arXiv:1510.00149) has Huffman's codes
    in this place: a range coder needs at most as many bits.
Cost:   a few passes over the array; streams of CHUNK symbols at a time.
"""

import struct

import numpy as np

from wherry.errors import Corrupt

PALETTE_MOST = 1024  # values of a palette
ZEROS_LEAST = 0.04  # share from which a bitmap pays: it costs at most an eighth of a byte for each element
CHUNK = 1 << 22
RAW, CODED, ONE = 0, 1, 2


def encode(symbols: np.ndarray) -> bytes:
    """A stream of uint8 or uint16 as bytes: which way, its frequencies, its code words."""
    flat = np.ascontiguousarray(symbols).reshape(-1)
    assert flat.dtype in (np.uint8, np.uint16)
    counts = np.bincount(flat, minlength=1)
    there = np.flatnonzero(counts)
    raw = bytes([RAW]) + flat.tobytes()
    if len(there) <= 1:
        return bytes([ONE]) + struct.pack("<H", int(there[0]) if len(there) else 0)
    share = counts[there] / len(flat)
    table = struct.pack("<H", len(there) - 1) + there.astype("<u2").tobytes() + counts[there].astype("<u4").tobytes()
    if -float((share * np.log2(share)).sum()) * len(flat) / 8 + len(table) + 8 > len(raw):
        return raw
    from constriction import stream

    place = np.zeros(len(counts), np.int32)
    place[there] = np.arange(len(there))
    model, coder = stream.model.Categorical(share, perfect=False), stream.queue.RangeEncoder()
    for i in range(0, len(flat), CHUNK):
        coder.encode(place[flat[i : i + CHUNK]], model)
    coded = bytes([CODED]) + table + coder.get_compressed().astype("<u4").tobytes()
    return min(coded, raw, key=len)


def decode(data: bytes, count: int, dtype: type = np.uint8) -> np.ndarray:
    """The stream of `count` symbols again. Raises Corrupt where the bytes do not hold one."""
    kind = data[:1]
    try:
        if kind == bytes([RAW]):
            return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), count, 1).astype(dtype)
        if kind == bytes([ONE]):
            return np.full(count, struct.unpack("<H", data[1:3])[0], dtype)
        if kind != bytes([CODED]):
            raise ValueError("no such kind of stream")
        size = struct.unpack("<H", data[1:3])[0] + 1
        there = np.frombuffer(data, "<u2", size, 3)
        counts = np.frombuffer(data, "<u4", size, 3 + 2 * size)
        words = np.frombuffer(data[3 + 6 * size :], "<u4").astype(np.uint32)
        if int(counts.sum(dtype=np.int64)) != count or (there[1:] <= there[:-1]).any() or not counts.all():
            raise ValueError("its frequencies are not those of so many symbols")
    except (ValueError, struct.error) as error:
        raise Corrupt(f"an entropy-coded stream is damaged: {error}") from error
    from constriction import stream

    model, coder = stream.model.Categorical(counts / count, perfect=False), stream.queue.RangeDecoder(words)
    out: np.ndarray = np.empty(count, dtype)
    for i in range(0, count, CHUNK):
        j = min(i + CHUNK, count)
        out[i:j] = there[coder.decode(model, j - i)]
    return out


def squeeze(array: np.ndarray) -> tuple[str, list[bytes]]:
    """A contiguous array of items of 1, 2, 4 or 8 bytes: how ("palette", "bitmap", "planes"), and its streams."""
    size = array.dtype.itemsize
    items = np.ascontiguousarray(array).reshape(-1).view(f"<u{size}")
    values = np.unique(items[: 1 << 16])
    if len(values) <= PALETTE_MOST and len(values := np.unique(items)) <= PALETTE_MOST and len(values) < len(items) / 2:
        kind: type = np.uint8 if len(values) <= 256 else np.uint16
        return "palette", [values.tobytes(), encode(np.searchsorted(values, items).astype(kind))]
    there = items != 0
    if len(items) and there.mean() <= 1 - ZEROS_LEAST:
        return "bitmap", [encode(np.packbits(there)), *planes(items[there])]
    return "planes", planes(items)


def planes(items: np.ndarray) -> list[bytes]:
    """One stream for each byte of the items."""
    table = items.view(np.uint8).reshape(len(items), items.dtype.itemsize)
    return [encode(table[:, i]) for i in range(table.shape[1])]


def restore(how: str, streams: list[bytes], count: int, size: int) -> np.ndarray:
    """The items of `size` bytes again, as unsigned integers [count]. Raises Corrupt."""
    try:
        if how == "palette":
            values = np.frombuffer(streams[0], f"<u{size}")
            return values[decode(streams[1], count, np.uint8 if len(values) <= 256 else np.uint16)]
        there = None
        if how == "bitmap":
            there = np.unpackbits(decode(streams[0], -(-count // 8)), count=count).astype(bool)
            streams = streams[1:]
        if how not in ("bitmap", "planes") or len(streams) != size:
            raise ValueError(f"'{how}' of {len(streams)} streams")
        kept = count if there is None else int(there.sum())
        items = np.stack([decode(stream, kept) for stream in streams], 1).view(f"<u{size}").reshape(-1)
    except (ValueError, IndexError) as error:
        raise Corrupt(f"an entropy-coded tensor is damaged: {error}") from error
    if there is None:
        return items
    out = np.zeros(count, f"<u{size}")
    out[there] = items
    return out
