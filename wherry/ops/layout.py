"""Layout: a QTensor as named tensors on disk, and back. Those of compressed-tensors where it has words for the scheme.

    pack-quantized        weight_packed int32 (pack.py), weight_scale, weight_shape, weight_zero_point  W2A16
    int-quantized         weight int8, weight_scale, input_scale, input_zero_point                      W8A8
    float-quantized       weight float8_e4m3fn, weight_scale                                            FP8A16
    nvfp4-pack-quantized  weight_packed uint8, weight_scale float8_e4m3fn, weight_global_scale          NVFP4A16
    mxfp4-pack-quantized  weight_packed uint8, weight_scale uint8 (exponent + 127)                      MXFP4A16
    wherry                weight_blocks uint8: k-quants in ggml's blocks; else as pack-quantized        Q4_K, NF4
                          weight_scale float8_e4m3fn over weight_global_scale, or exponents uint8       W4A16,scale=fp8
                          weight_left, weight_right float16 beside them: a low-rank correction          W4A16,rank=16
Source: compressed-tensors 0.20, compressors/*; ggml for k-quants (kquant.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from wherry.errors import Unsupported
from wherry.levels import levels
from wherry.ops import kquant
from wherry.ops.pack import pack, unpack
from wherry.scheme import Block, QTensor, Scheme, Tensor

SMALL = ("float8_e4m3fn", "e8m0")  # scales of one byte
ZERO = 7  # place of 0 among the 15 levels of e2m1


def form(scheme: Scheme) -> str:
    """Name of the layout."""
    if scheme.nested or scheme.planes > 1 or scheme.kind == "codebook" or scheme.rank:
        return "wherry"
    if scheme.kind == "int" and scheme.scale in SMALL:
        return "wherry"
    if scheme.kind == "fp":
        names = {"float8_e4m3fn": "nvfp4-pack-quantized", "e8m0": "mxfp4-pack-quantized"}
        own = "float-quantized" if scheme.table == "e4m3" else "wherry"
        return names.get(str(scheme.scale), own)
    return "pack-quantized" if scheme.activations is None or scheme.bits < 8 else "int-quantized"


def nibbles(code: torch.Tensor) -> torch.Tensor:
    """Codes of e2m1 [n, k] as bytes [n, k / 2]: sign and magnitude, the even element low."""
    place = code.to(torch.int16) + 8 - ZERO
    half = torch.where(place >= 0, place, 8 - place).to(torch.uint8)
    return half[:, ::2] | half[:, 1::2] << 4


def from_nibbles(byte: torch.Tensor) -> torch.Tensor:
    """The opposite; minus zero is zero."""
    half = torch.stack([byte & 15, byte >> 4], -1).flatten(-2).to(torch.int16)
    place = torch.where(half < 8, half, 8 - half)
    return (place + ZERO - 8).to(torch.int8)


def small(scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales that are e4m3 over one power of two, as the two tensors that hold them."""
    over = torch.exp2(torch.ceil(torch.log2(scale.amax() / 448.0)))
    return {"weight_scale": (scale / over).to(torch.float8_e4m3fn), "weight_global_scale": (1 / over).reshape(1)}


def parts(q: QTensor) -> dict[str, torch.Tensor]:
    """The tensors that hold q on disk, by their names after the layer's."""
    scheme, kind = q.scheme, form(q.scheme)
    exact = scheme.bits <= 4 and bool((q.scale == q.scale.half().float()).all())
    scale = q.scale.to(torch.float16 if exact else torch.float32)
    if scheme.scale in ("bfloat16", "float32"):
        scale = q.scale.to(getattr(torch, str(scheme.scale)))
    thin: dict[str, torch.Tensor] = {}
    if q.left is not None and q.right is not None:
        thin = {"weight_left": q.left.half(), "weight_right": q.right.half()}
    if scheme.nested:
        return {"weight_blocks": kquant.pack(q)} | thin
    if kind == "float-quantized":
        value = torch.tensor(levels(scheme.table))[q.code.long() - scheme.qmin]
        return {"weight": value.to(torch.float8_e4m3fn), "weight_scale": scale}
    if kind == "nvfp4-pack-quantized":
        return {"weight_packed": nibbles(q.code)} | small(q.scale)
    if kind == "mxfp4-pack-quantized":
        exponent = (torch.log2(q.scale).round() + 127).to(torch.uint8)
        return {"weight_packed": nibbles(q.code), "weight_scale": exponent}
    out: dict[str, torch.Tensor] = {}
    if q.activation_scale is not None and q.activation_zero is not None:
        out = {"input_scale": q.activation_scale, "input_zero_point": q.activation_zero}
    if kind == "int-quantized":
        return {"weight": q.code, "weight_scale": scale} | out
    bits = scheme.bits * scheme.planes
    out |= {"weight_packed": pack(q.code, bits), "weight_scale": scale} | thin
    if scheme.scale == "float8_e4m3fn":
        out |= small(q.scale)
    elif scheme.scale == "e8m0":
        out["weight_scale"] = (torch.log2(q.scale).round() + 127).to(torch.uint8)
    out["weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    if q.zero is not None:
        out["weight_zero_point"] = pack(q.zero.T.contiguous(), bits).T.contiguous()
    return out


def whole(have: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The QTensor that `parts` took apart."""
    kind = form(scheme)
    if "weight_left" in have:
        rest = {name: value for name, value in have.items() if name not in ("weight_left", "weight_right")}
        left, right = have["weight_left"].float(), have["weight_right"].float()
        return replace(whole(rest, scheme), left=left, right=right)
    if scheme.nested:
        return kquant.unpack(have["weight_blocks"], scheme)
    scale = have["weight_scale"]
    if kind == "mxfp4-pack-quantized":
        return QTensor(scheme, from_nibbles(have["weight_packed"]), torch.exp2(scale.float() - 127))
    if kind == "nvfp4-pack-quantized":
        return QTensor(scheme, from_nibbles(have["weight_packed"]), scale.float() / have["weight_global_scale"].float())
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if "weight_global_scale" in have:
        scale = scale / have["weight_global_scale"].float()
    if kind == "float-quantized":
        from wherry.ops.grid import nearest

        code = nearest(have["weight"].float(), scheme).to(torch.int8)
        return QTensor(scheme, code, spread(scale, code.shape, scheme))
    extra = (have.get("input_scale"), have.get("input_zero_point"))
    if "weight" in have and have["weight"].dtype == torch.int8:  # int-quantized, of any width where others wrote it
        code, zero = have["weight"], None if scheme.symmetric else have["weight_zero_point"]
        zero = zero if zero is None else spread(zero, code.shape, scheme)
        return QTensor(scheme, code, spread(scale, code.shape, scheme), zero, *extra)
    rows, k = have["weight_shape"].tolist()
    bits, zero = scheme.bits * scheme.planes, None
    if not scheme.symmetric:
        zero = unpack(have["weight_zero_point"].T.contiguous(), bits, len(scale)).T.contiguous()
        zero = spread(zero, (rows, k), scheme)
    return QTensor(scheme, unpack(have["weight_packed"], bits, k), spread(scale, (rows, k), scheme), zero, *extra)


def spread(scale: torch.Tensor, shape: Sequence[int], scheme: Scheme) -> torch.Tensor:
    """Scales or zeros as a QTensor holds them [n, g]: one for each row, where a file has one for a block or a tensor.

    Raises Unsupported where blocks do not divide the inputs of a row, ValueError where rows are missing.
    """
    rows, k = shape[-2:]
    if isinstance(scheme.grain, Tensor):
        return scale.reshape(1, 1).expand(rows, 1).contiguous()
    if not isinstance(scheme.grain, Block):
        if scale.shape[-2] != rows:
            raise ValueError(f"{scale.shape[-2]} rows of scales for {rows} rows of weights")
        return scale
    if k % scheme.grain.columns:
        raise Unsupported(f"blocks of {scheme.grain.columns} inputs do not divide a row of {k}")
    return scale.repeat_interleave(scheme.grain.rows, 0)[:rows].contiguous()


def shape(name: str, found: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the weight from that of its main part (weight, weight_packed as bytes, weight_blocks)."""
    if name == "weight_blocks":
        block = kquant.name_of(scheme)
        assert block is not None
        return (found[0], found[1] // kquant.BYTES[block] * kquant.SUPER)
    return (found[0], found[1] * 2) if name == "weight_packed" else found
