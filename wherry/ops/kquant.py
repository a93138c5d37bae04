"""K-quants: super-blocks of 256 weights whose scales (and minimums) are small integers over one fp16, bit by bit.

    Q2_K  16 groups of 16   w = d sc q - dmin m   q 2 bits, sc and m 4 bits             84 bytes
    Q3_K  16 groups of 16   w = d sc (q - 4)      q 3 bits, sc 6 bits signed           110 bytes
    Q4_K   8 groups of 32   w = d sc q - dmin m   q 4 bits, sc and m 6 bits            144 bytes
    Q5_K   8 groups of 32   w = d sc q - dmin m   q 5 bits, sc and m 6 bits            176 bytes
    Q6_K  16 groups of 16   w = d sc (q - 32)     q 6 bits, sc 8 bits signed           210 bytes
Here a QTensor holds d sc as `scale` and dmin m as `zero`, float32, products of an fp16 and an integer, hence exact;
`nested` makes them so, with the largest integer used in every super-block, so that d can be found again from them.
Source: ggml, src/ggml-common.h and ggml-quants.c (layout of block_q2_K to block_q6_K).
Shapes: code [n, k]; scale, zero [n, k / group]; blocks uint8 [n, k / 256 * bytes].
"""

import torch

from wherry.errors import Unsupported
from wherry.scheme import QTensor, Scheme

SUPER = 256
NAMES = {(2, 16): "Q2_K", (3, 16): "Q3_K", (4, 32): "Q4_K", (5, 32): "Q5_K", (6, 16): "Q6_K"}
BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
MOST = {"Q2_K": 15, "Q3_K": 31, "Q4_K": 63, "Q5_K": 63, "Q6_K": 127}


def name_of(scheme: Scheme) -> str | None:
    """Which k-quant a scheme is, or None."""
    if not isinstance(scheme.scale, Scheme):
        return None
    return NAMES.get((scheme.bits, scheme.group_size or 0))


def nested(value: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round scales or minimums [..., g] >= 0 to integers over one fp16 for each super-block of 256 weights."""
    assert scheme.group_size is not None
    name = name_of(scheme)
    assert name is not None
    v = value.float().unflatten(-1, (-1, SUPER // scheme.group_size))
    most = v.amax(-1, keepdim=True)
    d = (most / MOST[name]).half().float()
    d = torch.where((most > 0) & (d == 0), torch.full_like(d, 2.0**-24), d)
    integer = torch.round(v / torch.where(d > 0, d, torch.ones_like(d))).clamp(0, MOST[name])
    integer = torch.where(v == most, torch.full_like(v, MOST[name]), integer)  # so that d can be found again
    return (integer * d).flatten(-2)


def split(value: torch.Tensor, groups: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(d [n, blocks], integers [n, blocks, groups]) of what `nested` gave. Raises Unsupported when it is not such."""
    v = value.float().unflatten(-1, (-1, groups))
    d = v.amax(-1, keepdim=True) / most
    integer = torch.round(v / torch.where(d > 0, d, torch.ones_like(d)))
    half = d.half()
    if not torch.equal(integer * half.float(), v):
        raise Unsupported("scales that are not integers over one fp16 per super-block cannot be a k-quant")
    return half.squeeze(-1), integer.to(torch.uint8)


def pack(q: QTensor) -> torch.Tensor:
    """Blocks uint8 [n, k / 256 * bytes] of a k-quant's codes and scales."""
    name = name_of(q.scheme)
    assert name is not None
    n, k = q.code.shape
    groups = SUPER // (q.scheme.group_size or 1)
    d, sc = split(q.scale, groups, MOST[name])
    low = 1 << (q.scheme.bits - 1)
    x = (q.code.to(torch.int16) + low).to(torch.uint8).reshape(n, k // SUPER, SUPER)
    head = [d.unsqueeze(-1).view(torch.uint8)]
    if q.zero is not None:
        dmin, m = split(q.zero, groups, MOST[name])
        head.append(dmin.unsqueeze(-1).view(torch.uint8))
    if name == "Q2_K":
        y = x.unflatten(-1, (2, 4, 32))  # halves of 128, four shifts, 32 bytes
        qs = (y[..., 0, :] | y[..., 1, :] << 2 | y[..., 2, :] << 4 | y[..., 3, :] << 6).flatten(-2)
        return torch.cat([sc | m << 4, qs, *head], -1).flatten(1)
    if name == "Q3_K":
        low2, high = (x & 3).unflatten(-1, (2, 4, 32)), (x >> 2).unflatten(-1, (8, 32))
        qs = (low2[..., 0, :] | low2[..., 1, :] << 2 | low2[..., 2, :] << 4 | low2[..., 3, :] << 6).flatten(-2)
        mask = torch.zeros_like(high[..., 0, :])
        for i in range(8):
            mask |= high[..., i, :] << i
        s = sc + 32  # 6 bits, signed by offset
        four = (s[..., :8] & 15) | (s[..., 8:] & 15) << 4
        two = (s >> 4).unflatten(-1, (4, 4))  # of scales i, i + 4, i + 8, i + 12
        two = two[..., 0, :] | two[..., 1, :] << 2 | two[..., 2, :] << 4 | two[..., 3, :] << 6
        return torch.cat([mask, qs, four, two, *head], -1).flatten(1)
    if name == "Q6_K":
        y = x.unflatten(-1, (2, 4, 32))
        low4, high2 = y & 15, y >> 4
        ql = torch.cat([low4[..., 0, :] | low4[..., 2, :] << 4, low4[..., 1, :] | low4[..., 3, :] << 4], -1).flatten(-2)
        qh = (high2[..., 0, :] | high2[..., 1, :] << 2 | high2[..., 2, :] << 4 | high2[..., 3, :] << 6).flatten(-2)
        return torch.cat([ql, qh, sc, *head], -1).flatten(1)
    first = torch.cat([sc[..., :4] | (sc[..., 4:] >> 4) << 6, m[..., :4] | (m[..., 4:] >> 4) << 6], -1)
    scales = torch.cat([first, (sc[..., 4:] & 15) | (m[..., 4:] & 15) << 4], -1)
    y = x.unflatten(-1, (4, 2, 32))
    qs = ((y[..., 0, :] & 15) | (y[..., 1, :] & 15) << 4).flatten(-2)
    if name == "Q4_K":
        return torch.cat([*head, scales, qs], -1).flatten(1)
    high = (x >> 4).unflatten(-1, (8, 32))
    mask = torch.zeros_like(high[..., 0, :])
    for i in range(8):
        mask |= high[..., i, :] << i
    return torch.cat([*head, scales, mask, qs], -1).flatten(1)


def unpack(blocks: torch.Tensor, scheme: Scheme) -> QTensor:
    """The opposite of `pack`."""
    name = name_of(scheme)
    assert name is not None
    n = len(blocks)
    b = blocks.reshape(n, -1, BYTES[name])

    def half(at: int) -> torch.Tensor:
        return b[..., at : at + 2].contiguous().view(torch.float16).float()

    def shifts(part: torch.Tensor, halves: int) -> torch.Tensor:
        """Four 2-bit fields of each byte, [n, blocks, 256]."""
        y = part.unflatten(-1, (halves, -1))
        return torch.stack([y >> s & 3 for s in (0, 2, 4, 6)], -2).flatten(-3)

    def bits(part: torch.Tensor) -> torch.Tensor:
        """Bit i of 32 bytes for group i, [n, blocks, 256]."""
        return torch.stack([part >> i & 1 for i in range(8)], -2).flatten(-2)

    zero = None
    if name == "Q2_K":
        x, s = shifts(b[..., 16:80], 2), b[..., :16]
        scale, zero = half(80) * (s & 15), half(82) * (s >> 4)
    elif name == "Q3_K":
        x = shifts(b[..., 32:96], 2) | bits(b[..., :32]) << 2
        four, two = b[..., 96:104], b[..., 104:108]
        low = torch.cat([four & 15, four >> 4], -1)
        s = low | torch.cat([two >> i & 3 for i in (0, 2, 4, 6)], -1) << 4
        scale = half(108) * (s.float() - 32)
    elif name == "Q6_K":
        ql, qh = b[..., :128].unflatten(-1, (2, 2, 32)), shifts(b[..., 128:192], 2).unflatten(-1, (2, 4, 32))
        low = torch.cat([ql & 15, ql >> 4], -2)
        x = (low | qh << 4).flatten(-3)
        scale = half(208) * b[..., 192:208].contiguous().view(torch.int8).float()
    else:
        s = b[..., 4:16]
        sc = torch.cat([s[..., :4] & 63, (s[..., 8:] & 15) | (s[..., :4] >> 6) << 4], -1)
        m = torch.cat([s[..., 4:8] & 63, (s[..., 8:] >> 4) | (s[..., 4:8] >> 6) << 4], -1)
        scale, zero = half(0) * sc, half(2) * m
        at = 16 if name == "Q4_K" else 48
        qs = b[..., at:].unflatten(-1, (4, 32))
        x = torch.stack([qs & 15, qs >> 4], -2).flatten(-3)
        if name == "Q5_K":
            x = x | bits(b[..., 16:48]) << 4
    code = (x.to(torch.int16) - (1 << (scheme.bits - 1))).to(torch.int8).flatten(1)
    return QTensor(scheme, code, scale.flatten(1), None if zero is None else zero.flatten(1))
