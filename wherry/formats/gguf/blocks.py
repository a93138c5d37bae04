"""Our codes as GGUF blocks: Q4_0 and Q4_1 for up to 4 bits, Q8_0 for up to 8, TQ2_0, k-quants, MXFP4, all exact.

    Q4_0   d fp16, 16 bytes             w = d * (q - 8)      symmetric: q = code + 8
    Q4_1   d fp16, m fp16, 16 bytes     w = d * q + m        q = code + 2^(bits-1), m = -d * (zero + 2^(bits-1))
    Q8_0   d fp16, 32 bytes             w = d * q            q = code
    TQ2_0  64 bytes, d fp16             w = d * (q - 1)      ternary with a scale for 256 or for the row: q = code + 1
    MXFP4  e8m0 byte, 16 bytes          w = 2^(e - 127) * level of e2m1
    Q2_K to Q6_K: ops/kquant.py
In a 4-bit block byte j holds weight j in its low half and weight j + 16 in its high half; in TQ2_0 byte 32 h + j holds
the weights 128 h + 32 s + j, each at bit 2 s.
Shapes: code [n, k], scale [n, g]; blocks uint8 [n, k / 32 * bytes of a block].
Source: ggml, src/ggml-common.h (block_q4_0, block_q4_1, block_q8_0, block_tq2_0).
"""

import numpy as np
import torch

from wherry.errors import Unsupported
from wherry.ops import kquant, layout
from wherry.scheme import Group, QTensor, Row, Scheme

BLOCK, WIDE = 32, 256  # weights of a block
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "TQ2_0": 66, "MXFP4": 17}


def kind_of(scheme: Scheme, shape: tuple[int, ...]) -> str:
    """The type of block for a scheme. Raises Unsupported with the nearest scheme that GGUF can hold."""
    k = shape[-1]
    if scheme.nested and len(shape) == 2 and k % kquant.SUPER == 0:
        return str(kquant.name_of(scheme))
    if scheme.kind == "fp" and scheme.scale == "e8m0" and len(shape) == 2 and k % BLOCK == 0:
        return "MXFP4"
    if scheme.kind != "int" or scheme.planes != 1 or len(shape) != 2 or scheme.nested:
        small = "Q2_K" if k % kquant.SUPER == 0 else f"W{max(2, scheme.bits * scheme.planes)}A16,group_size={BLOCK}"
        near = "MXFP4A16" if scheme.bits == 4 else "W8A16" if scheme.bits == 8 else small
        raise Unsupported(f"GGUF has no block for {scheme} of shape {list(shape)}; {near} is the nearest that fits")
    if scheme.activations is not None:
        raise Unsupported(f"{scheme}: GGUF stores weights only, llama.cpp rounds activations; use W{scheme.bits}A16")
    if k % BLOCK:
        raise Unsupported(f"rows of {k} do not fill GGUF's blocks of {BLOCK}; leave it float with ignore=")
    if not isinstance(scheme.grain, Group | Row):
        grain = type(scheme.grain).__name__.lower()
        raise Unsupported(f"one scale per {grain} has no block in GGUF; use group_size=32 or -1")
    if isinstance(scheme.grain, Group) and scheme.grain.size % BLOCK:
        size = max(BLOCK, scheme.grain.size // BLOCK * BLOCK)
        size = size if k % size == 0 else BLOCK
        raise Unsupported(
            f"group_size={scheme.grain.size}: GGUF has one scale for a block of {BLOCK} weights; use group_size={size}"
        )
    whole = isinstance(scheme.grain, Row) or scheme.grain.size % WIDE == 0
    if scheme.table == "ternary" and k % WIDE == 0 and whole:
        return "TQ2_0"
    if scheme.bits > 4 and not scheme.symmetric:
        raise Unsupported(f"{scheme}: GGUF's 8-bit blocks have no zero; use W8A16 (symmetric), or W4A16_ASYM")
    return "Q8_0" if scheme.bits > 4 else "Q4_0" if scheme.symmetric else "Q4_1"


def row_bytes(kind: str, k: int) -> int:
    """Bytes of a row of k weights in blocks of that kind."""
    if kind in kquant.BYTES:
        return k // kquant.SUPER * kquant.BYTES[kind]
    return k // (WIDE if kind == "TQ2_0" else BLOCK) * BYTES[kind]


def note_of(scheme: Scheme, kind: str) -> str:
    """What a person should know of a scheme that fits a kind of block, or an empty string."""
    notes = [f"its correction of rank {scheme.rank} is a LoRA adapter beside the file"] if scheme.rank else []
    if scheme.kind == "int" and scheme.scale in layout.SMALL:
        notes.append("scales lie as fp16, which holds them exactly")
    if scheme.nested or scheme.kind == "fp" or kind == "TQ2_0":
        return "; ".join(notes)
    if scheme.bits not in (4, 8):
        notes.append(f"{scheme.bits}-bit codes live in {4 if scheme.bits < 4 else 8}-bit blocks: no bytes saved")
    if scheme.table == "ternary":
        notes.append("with group_size=256 or -1, and rows of whole 256s, they fit TQ2_0, half of that")
    if isinstance(scheme.grain, Row):
        notes.append("the row's scale is repeated in every block of 32: same bytes as group_size=32")
    elif isinstance(scheme.grain, Group) and scheme.grain.size > BLOCK:
        size = scheme.grain.size
        notes.append(f"group {size} = {size // BLOCK} blocks of 32: same bytes as group_size=32")
    return "; ".join(notes)


def pack(name: str, tensor: QTensor) -> tuple[str, np.ndarray]:
    """(type of block, blocks) of one weight.

    Raises:
        Unsupported: the scheme has no block, or a scale or minimum is not exact in fp16.
    """
    kind, scheme = kind_of(tensor.scheme, tensor.shape), tensor.scheme
    n, k = tensor.shape
    if kind == "TQ2_0":
        part = (tensor.code.numpy() + 1).astype(np.uint8).reshape(n, k // WIDE, 2, 4, BLOCK)
        part = np.bitwise_or.reduce(part << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=-2)
        scale = tensor.scale.float().repeat_interleave(k // WIDE // tensor.scale.shape[-1], -1)
        return kind, np.concatenate([part.reshape(n, k // WIDE, -1), _half(name, scale)], axis=-1).reshape(n, -1)
    if scheme.nested:
        return kind, kquant.pack(tensor).numpy()
    if kind == "MXFP4":
        half = layout.nibbles(tensor.code.unflatten(-1, (-1, 2, BLOCK // 2)).transpose(-1, -2).reshape(n, k))
        exponent = (torch.log2(tensor.scale).round() + 127).to(torch.uint8).unsqueeze(-1)
        return kind, torch.cat([exponent, half.unflatten(-1, (-1, BLOCK // 2))], -1).flatten(1).numpy()
    scale = tensor.scale.float().repeat_interleave(k // BLOCK // tensor.scale.shape[-1], -1)
    header = [_half(name, scale)]
    code = tensor.code.to(torch.int16)
    if kind == "Q4_1":
        assert tensor.zero is not None
        offset = 1 << (scheme.bits - 1)
        zero = tensor.zero.float().repeat_interleave(k // BLOCK // tensor.zero.shape[-1], -1) + offset
        header.append(_half(name, -scale * zero))
    elif kind == "Q4_0":
        offset = 8
    else:
        data = tensor.code.numpy().reshape(n, k // BLOCK, BLOCK).view(np.uint8)
        return kind, np.concatenate([*header, data], axis=-1).reshape(n, -1)
    q = (code + offset).numpy().astype(np.uint8).reshape(n, k // BLOCK, 2, BLOCK // 2)
    return kind, np.concatenate([*header, q[:, :, 0] | q[:, :, 1] << 4], axis=-1).reshape(n, -1)


def _half(name: str, value: torch.Tensor) -> np.ndarray:
    """Values [n, blocks] as the two bytes of fp16 [n, blocks, 2]; refuses to round."""
    half = value.half()
    if not torch.equal(half.float(), value):
        raise Unsupported(
            f"{name}: its scales are not exact in fp16, which GGUF stores, and would be rounded.\n"
            f"Compress again with portable=true, the default."
        )
    return half.numpy().view(np.uint8).reshape(*value.shape, 2)
