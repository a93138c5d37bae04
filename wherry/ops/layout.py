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
from typing import Any

import torch

from wherry.errors import Unsupported
from wherry.levels import levels
from wherry.ops import kquant, tiles
from wherry.ops.pack import pack, unpack
from wherry.scheme import Block, Grain, Group, QTensor, Row, Scheme, Tensor, Token

SMALL = ("float8_e4m3fn", "e8m0")  # scales of one byte
ZERO = 7  # place of 0 among the 15 levels of e2m1
STRATEGY = {Tensor: "tensor", Row: "channel", Token: "token", Group: "group", Block: "block"}


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


def words(scheme: Scheme) -> dict[str, Any]:
    """The scheme as a compressed-tensors config group (without targets).

    Raises:
        Unsupported: QuantizationArgs has no words for it (schemes as scales, several planes, codebooks).
    """
    unsaid = scheme.planes != 1 or scheme.nested or scheme.kind == "codebook" or scheme.table == "e5m2" or scheme.rank
    small = scheme.kind == "int" and scheme.scale in SMALL
    if unsaid or small or (scheme.table == "e2m1" and not scheme.fixed):
        near = scheme.near + (" without lowrank" if scheme.rank else "")
        raise Unsupported(f"compressed-tensors cannot say the scheme {scheme}; the nearest that it can is {near}")
    weights: dict[str, Any] = {
        "num_bits": scheme.bits, "type": "float" if scheme.kind == "fp" else "int", "symmetric": scheme.symmetric,
        "dynamic": scheme.dynamic, "strategy": STRATEGY[type(scheme.grain)], "group_size": scheme.group_size,
    }  # fmt: skip
    if scheme.scale == "float8_e4m3fn":
        weights |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    if scheme.scale == "e8m0":
        weights |= {"scale_dtype": "torch.uint8"}
    if scheme.kind == "int" and scheme.scale in ("bfloat16", "float32"):
        weights |= {"scale_dtype": f"torch.{scheme.scale}"}
    if isinstance(scheme.grain, Block):
        weights["block_structure"] = [scheme.grain.rows, scheme.grain.columns]
    group: dict[str, Any] = {"weights": weights, "input_activations": None}
    if scheme.activations is not None:
        group["input_activations"] = words(scheme.activations)["weights"]
    return group


def from_words(group: Mapping[str, Any]) -> Scheme:
    """The opposite: a config group of a `quantization_config` as a Scheme. Raises Unsupported for float types."""
    args = group["weights"]
    strategy, size = args.get("strategy"), args.get("group_size")
    grains: dict[str, Grain] = {"tensor": Tensor(), "channel": Row(), "token": Token()}
    if strategy == "block":
        grain: Grain = Block(*args["block_structure"])
    elif strategy in ("group", "tensor_group") or (strategy is None and size):
        grain = Group(int(size))
    elif strategy in grains:
        grain = grains[strategy]
    else:
        raise Unsupported(f"quantization strategy '{strategy}' is not read; {', '.join(STRATEGY.values())} are")
    activations = group.get("input_activations")
    if args.get("type", "int") == "float":
        tables, four = {8: "e4m3", 4: "e2m1"}, args["num_bits"] == 4
        if args["num_bits"] not in tables or activations:
            raise Unsupported(f"float weights {args} are not read; FP8A16, NVFP4A16 and MXFP4A16 are")
        scale = ("float8_e4m3fn" if strategy == "tensor_group" else "e8m0") if four else "float16"
        return Scheme(args["num_bits"], "fp", grain, scale=scale, table=tables[args["num_bits"]])
    said = str(args.get("scale_dtype") or "").removeprefix("torch.")
    return Scheme(
        bits=args["num_bits"],
        grain=grain,
        scale=said if said in ("bfloat16", "float32") else "float16",
        symmetric=args.get("symmetric", True),
        dynamic=args.get("dynamic", False) is True,
        activations=None if activations is None else from_words({"weights": activations}),
    )


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
    own = once(q.scale, scheme)
    exact = scheme.bits <= 4 and bool((own == own.half().float()).all())
    scale = own.to(torch.float16 if exact else torch.float32)
    if scheme.scale in ("bfloat16", "float32"):
        scale = own.to(getattr(torch, str(scheme.scale)))
    thin: dict[str, torch.Tensor] = {}
    if q.left is not None and q.right is not None:
        thin = {"weight_left": q.left.half(), "weight_right": q.right.half()}
    if scheme.nested:
        return {"weight_blocks": kquant.pack(q)} | thin
    if kind == "float-quantized":
        value = torch.tensor(levels(scheme.table))[q.code.long() - scheme.qmin]
        return {"weight": value.to(torch.float8_e4m3fn), "weight_scale": scale}
    if kind == "nvfp4-pack-quantized":
        return {"weight_packed": nibbles(q.code)} | small(own)
    if kind == "mxfp4-pack-quantized":
        exponent = (torch.log2(own).round() + 127).to(torch.uint8)
        return {"weight_packed": nibbles(q.code), "weight_scale": exponent}
    out: dict[str, torch.Tensor] = {}
    if q.activation_scale is not None and q.activation_zero is not None:
        out = {"input_scale": q.activation_scale, "input_zero_point": q.activation_zero}
    if kind == "int-quantized":
        return {"weight": q.code, "weight_scale": scale} | out
    bits = scheme.bits * scheme.planes
    out |= {"weight_packed": pack(q.code, bits), "weight_scale": scale} | thin
    if scheme.scale == "float8_e4m3fn":
        out |= small(own)
    elif scheme.scale == "e8m0":
        out["weight_scale"] = (torch.log2(own).round() + 127).to(torch.uint8)
    out["weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    if q.zero is not None:
        zero = once(q.zero, scheme)  # of a tile it is never packed
        out["weight_zero_point"] = zero if scheme.tiled else pack(zero.T.contiguous(), bits).T.contiguous()
    return out


def once(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales or zeros [n, g] as a file holds them: one for each tile, [1] where there is one in all."""
    held = tiles.once(scale, scheme)
    return held.flatten() if isinstance(scheme.grain, Tensor) else held


def bytes_of(scheme: Scheme, shape: Sequence[int], scale_bytes: int) -> int:
    """Bytes of the parts of a weight [n, k], with the padding to int32 that packed codes have."""
    n, k = shape[-2:]
    kind, plain = form(scheme), scheme.bytes((n, k), scale_bytes)
    plain += 5 if scheme.activations and not scheme.activations.dynamic else 0  # input_scale, input_zero_point
    if scheme.nested or kind == "mxfp4-pack-quantized":
        return plain
    if kind == "nvfp4-pack-quantized":
        return plain + 4
    if kind in ("int-quantized", "float-quantized"):
        return plain
    bits = scheme.bits * scheme.planes
    padding = 4 * n * -(-k * bits // 32) - (n * k * bits + 7) // 8
    if not scheme.symmetric:
        scales = scheme.scales_per_row(k) * -(-n // scheme.rows_per_scale(n))
        exact = scales if scheme.tiled else 4 * -(-n * bits // 32) * scheme.scales_per_row(k)
        padding += exact - (scales * bits + 7) // 8
    return plain + padding + 16 + (4 if scheme.scale == "float8_e4m3fn" else 0)


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
        return QTensor(scheme, code, by_rows(scale, code.shape, scheme))
    extra = (have.get("input_scale"), have.get("input_zero_point"))
    if "weight" in have and have["weight"].dtype == torch.int8:  # int-quantized, of any width where others wrote it
        code, zero = have["weight"], None if scheme.symmetric else have["weight_zero_point"]
        zero = zero if zero is None else by_rows(zero, code.shape, scheme)
        return QTensor(scheme, code, by_rows(scale, code.shape, scheme), zero, *extra)
    rows, k = have["weight_shape"].tolist()
    bits, zero = scheme.bits * scheme.planes, None
    if not scheme.symmetric:
        zero = have["weight_zero_point"]
        zero = zero if scheme.tiled else unpack(zero.T.contiguous(), bits, len(scale)).T.contiguous()
        zero = by_rows(zero.to(torch.int8), (rows, k), scheme)
    return QTensor(scheme, unpack(have["weight_packed"], bits, k), by_rows(scale, (rows, k), scheme), zero, *extra)


def by_rows(scale: torch.Tensor, shape: Sequence[int], scheme: Scheme) -> torch.Tensor:
    """Scales or zeros as a QTensor holds them [n, g]: one for each row, where a file has one for a block or a tensor.

    Raises Unsupported where blocks do not divide the inputs of a row, ValueError where rows are missing.
    """
    rows, k = shape[-2:]
    if isinstance(scheme.grain, Block) and k % scheme.grain.columns:
        raise Unsupported(f"blocks of {scheme.grain.columns} inputs do not divide a row of {k}")
    scale = scale.reshape(1, -1) if isinstance(scheme.grain, Tensor) else scale
    found = tiles.spread(scale, rows, scheme)
    if found.shape[-2] != rows:
        raise ValueError(f"{scale.shape[-2]} rows of scales for {rows} rows of weights")
    return found


def shape(name: str, found: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the weight from that of its main part (weight, weight_packed as bytes, weight_blocks)."""
    if name == "weight_blocks":
        block = kquant.name_of(scheme)
        assert block is not None
        return (found[0], found[1] // kquant.BYTES[block] * kquant.SUPER)
    return (found[0], found[1] * 2) if name == "weight_packed" else found
