"""Codes as ONNX Runtime's block-wise operators want them (MatMulNBits, GatherBlockQuantized), and back. Numpy only.

Idea:   unsigned codes u = q + 2^(bits-1), so w = scale * (u - (zero + 2^(bits-1))); a byte's lowest bits come first.
        3-bit codes live in 4-bit blocks; one scale per row is repeated for each block of the row. No code changes.
Shapes: code int8 [n, k], scale [n, g], zero [n, g] -> codes uint8 [n, g, size * bits / 8], scales float32 [n, g],
        zeros uint8 [n, g], packed by rows for MatMulNBits (left out when symmetric: the default is 2^(bits-1)).
Source: the operators' documentation in ONNX Runtime, docs/ContribOperators.md.
"""

from dataclasses import dataclass

import numpy as np

from wherry.errors import Unsupported
from wherry.scheme import Group, QTensor, Row, Scheme

CONTAINER = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a code -> bits of its place
SMALLEST = 16  # inputs of a block
ROW_BLOCK = 128  # the largest block that a row is cut into


@dataclass(frozen=True)
class Blocks:
    """One weight [n, k] in blocks of `size` inputs, `bits` per code. Shapes as above."""

    n: int
    k: int
    bits: int
    size: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @property
    def bytes(self) -> int:
        """Size in the file."""
        zeros = 0 if self.zeros is None else pack(self.zeros, self.bits).nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros


def block_size(scheme: Scheme, k: int) -> int:
    """Inputs per block for a weight with k inputs.

    Raises Unsupported, naming the nearest that works, when no block of the operators can hold the scheme.
    """
    powers = [1 << i for i in range(4, 9) if k % (1 << i) == 0]
    if not powers:
        raise Unsupported(
            f"{k} inputs cannot be cut into blocks of {SMALLEST} or more; leave this layer out with ignore="
        )
    if isinstance(scheme.grain, Row):
        return max(p for p in powers if p <= ROW_BLOCK)
    if isinstance(scheme.grain, Group):
        size = scheme.grain.size
        if size not in powers:
            near = min(powers, key=lambda p: abs(p - size))
            raise Unsupported(
                f"group_size={size} is not a power of two from 16 to 256 that divides {k}; group_size={near} is"
            )
        return size
    raise Unsupported(f"weights per {type(scheme.grain).__name__.lower()} have no ONNX operator; use group_size=32")


def container(scheme: Scheme) -> int:
    """Bits of the place that a code gets. Raises Unsupported for widths that the operators do not know."""
    if scheme.kind != "int" or scheme.planes != 1 or scheme.minimum != "code":
        raise Unsupported(f"{scheme} is not a plain integer scheme, and ONNX Runtime has no operator for it; use W4A16")
    if scheme.bits not in CONTAINER:
        near = "W4A16" if scheme.bits < 6 else "W8A16"
        raise Unsupported(
            f"{scheme.bits}-bit codes have no ONNX operator (2, 3 in 4, 4 and 8 have); the nearest is {near}"
        )
    return CONTAINER[scheme.bits]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values uint8 [..., m] of `bits` bits to bytes [..., ceil(m * bits / 8)], lowest bits first."""
    per = 8 // bits
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per)])
    places = padded.reshape(*padded.shape[:-1], -1, per)
    out = np.zeros(places.shape[:-1], np.uint8)
    for i in range(per):
        out |= places[..., i] << (bits * i)
    return out


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [..., m] to codes [..., m * 8 / bits], lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def blocks(tensor: QTensor) -> Blocks:
    """The codes, scales and zeros of a weight [n, k], bit for bit, in the operators' layout."""
    n, k = tensor.shape
    bits, size = container(tensor.scheme), block_size(tensor.scheme, k)
    offset = 1 << (bits - 1)
    repeat = k // size // tensor.scale.shape[-1]
    unsigned = (
        (tensor.code.numpy() ^ -128).view(np.uint8) if bits == 8 else (tensor.code.numpy() + offset).view(np.uint8)
    )
    scales = np.repeat(tensor.scale.numpy().astype(np.float32), repeat, axis=-1)
    zeros = None
    if tensor.zero is not None:
        zeros = (np.repeat(tensor.zero.numpy(), repeat, axis=-1).astype(np.int16) + offset).astype(np.uint8)
    codes = pack(unsigned.reshape(n, k // size, size), bits)
    return Blocks(n, k, bits, size, codes, np.ascontiguousarray(scales), zeros)
