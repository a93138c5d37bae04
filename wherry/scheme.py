"""Scheme: how one tensor's numbers are stored. QTensor: a tensor stored so. No files, no models.

    w = scale * (code - zero)            code, zero: signed integers of `bits` bits; zero = 0 when symmetric

with one scale (and zero) per grain: the whole tensor, a row, a group of `size` inputs of one row, a block.
The scale and the minimum are dtypes or schemes themselves, so that super-blocks fit: Q4_K is 4-bit codes whose
scales and minimums are 6-bit integers over an fp16 scale; NVFP4 has fp8 scales over one fp32.
The spelling is the ecosystem's: W4A16 (symmetric), W4A16_ASYM, W8A16, W3A16, W8A8, NVFP4A16, Q4_K, NF4, with group_size
beside it. Where codes are no integers, w = scale * level[code] (levels.py). A k-quant has a float minimum in place of
an integer zero: w = scale * (code + 2^(bits-1)) - minimum.
Options follow the name: group_size=64, or strategy=tensor for one scale in all, or block_structure=128x128 for one per
tile of outputs x inputs; scale=e8m0 (how scales are stored: fp16, bf16, fp32, fp8, e8m0); and rank=16 for two float
matrices beside the codes, w = scale * (code - zero) + left right (quant/lowrank.py).
Source of the vocabulary: compressed-tensors' QuantizationArgs and preset schemes.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Union

from wherry.errors import BadInput
from wherry.levels import levels
from wherry.shelf import suggest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tensor:
    """One scale for the whole tensor: w [n, k] -> scale [1, 1]."""


@dataclass(frozen=True)
class Row:
    """One scale per output ("channel"): w [n, k] -> scale [n, 1]."""


@dataclass(frozen=True)
class Group:
    """One scale per `size` neighbouring inputs of a row: w [n, k] -> scale [n, k / size]."""

    size: int


@dataclass(frozen=True)
class Block:
    """One scale per tile: w [n, k] -> scale [n / rows, k / columns]."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Token:
    """One scale per token of an activation, found when it runs: x [tokens, k] -> scale [tokens, 1]."""


Grain = Tensor | Row | Group | Block | Token
Stored = Union[str, "Scheme"]  # a dtype name ("float16") or a scheme


@dataclass(frozen=True)
class Scheme:
    """A value: equal schemes are equal, and `Scheme.parse(str(scheme)) == scheme`.

    bits: width of a code, 1 to 8.
    kind: "int" (affine integer grid), "fp" (float codes), "codebook".
    table: name of the levels (levels.py) that codes stand for; "" for integers.
    symmetric: zero is 0 and codes span [-2^(bits-1), 2^(bits-1) - 1].
    dynamic: the scale is found when the model runs (activations only).
    scale, minimum: how scales and minimums are stored: dtype names or schemes. minimum "code" = an integer
        zero of the same bits.
    activations: scheme of the layer's input, or None when it stays float (A16).
    planes: number of residual code planes that are summed (residual binary); 1 for all plain schemes.
    rank: of the float correction beside the codes; 0 = none.
    """

    bits: int = 4
    kind: Literal["int", "fp", "codebook"] = "int"
    grain: Grain = Group(128)
    symmetric: bool = True
    dynamic: bool = False
    scale: Stored = "float16"
    minimum: Stored = "code"
    activations: "Scheme | None" = None
    planes: int = 1
    table: str = ""
    rank: int = 0

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -1 if self.table == "ternary" else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.table == "ternary":
            return 1
        return self.qmin + len(levels(self.table)) - 1 if self.table else (1 << (self.bits - 1)) - 1

    @property
    def tabled(self) -> bool:
        """Whether codes are places in a table of levels (ternary codes are integers)."""
        return self.table not in ("", "ternary")

    @property
    def nested(self) -> bool:
        """Whether scales are themselves codes over a coarser scale: the k-quants."""
        return isinstance(self.scale, Scheme)

    @property
    def group_size(self) -> int | None:
        """Inputs per scale, or None when the grain is not a group."""
        return self.grain.size if isinstance(self.grain, Group) else None

    @property
    def tiled(self) -> bool:
        """Whether rows share scales: one for a block, or for the whole weight (ops/tiles.py)."""
        return isinstance(self.grain, Tensor | Block)

    def rows_per_scale(self, n: int) -> int:
        """How many neighbouring rows of a weight of n rows share their scales; 1 but for tiles."""
        if isinstance(self.grain, Tensor):
            return n
        return min(self.grain.rows, n) if isinstance(self.grain, Block) else 1

    @property
    def by_rows(self) -> "Scheme":
        """The same weights for a format that knows no tiles: each tile's scale repeated in every row of it."""
        if isinstance(self.grain, Block):
            return replace(self, grain=Group(self.grain.columns))
        return replace(self, grain=Row()) if self.tiled else self

    def option(self, key: str, value: str) -> "Scheme":
        """The same scheme with what may follow a name: group_size, strategy, block_structure, scale or rank."""
        if key == "scale":
            return self.with_scale(value)
        if key == "rank" and re.fullmatch(r"\d+", value):
            return replace(self, rank=int(value))
        if key == "group_size" and re.fullmatch(r"-?\d+", value):
            return self.with_group(int(value))
        block = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value) if key == "block_structure" else None
        if block or (key, value) == ("strategy", "tensor"):
            if self.fixed:
                raise BadInput(f"{self} has groups of {self.group_size} by its definition; leave {key} out")
            return replace(self, grain=Block(int(block[1]), int(block[2])) if block else Tensor())
        if (key, value) == ("strategy", "channel"):
            return self.with_group(-1)
        right = {"group_size": "64, or -1 for one scale per row", "block_structure": "128x128, outputs x inputs",
                 "strategy": "tensor or channel; groups and blocks are said by group_size and block_structure",
                 "rank": "16"}  # fmt: skip
        if key not in right:
            raise BadInput(f"'{key}' is no option of a scheme{suggest(key, OPTIONS)}; there are {', '.join(OPTIONS)}")
        raise BadInput(f"{key}={value}: write {right[key]}")

    def with_group(self, size: int) -> "Scheme":
        """The same scheme with another group_size; -1 means one scale per row."""
        if size != -1 and size < 1:
            raise BadInput(f"group_size={size} is not a size; use a positive number, or -1 for one scale per row")
        if self.fixed and size != self.group_size:
            raise BadInput(f"{self} has groups of {self.group_size} by its definition; leave group_size out")
        return replace(self, grain=Row() if size == -1 else Group(size))

    def with_scale(self, kind: str) -> "Scheme":
        """The same scheme with scales stored as fp16, bf16, fp32, fp8 (e4m3 over a power of two), or e8m0."""
        if kind not in SCALES:
            raise BadInput(f"scale={kind} is not known{suggest(kind, SCALES)}; there are: {', '.join(SCALES)}")
        if self.nested or self.kind == "fp":
            raise BadInput(f"{self} has its scales by definition; NVFP4A16 has fp8, MXFP4A16 e8m0: leave scale= out")
        return replace(self, scale=SCALES[kind])

    def scales_per_row(self, k: int, whole: int = 0) -> int:
        """Number of scales that a row of k inputs has.

        Raises BadInput when the group does not divide k; the size that it names divides `whole`, too.
        """
        if self.nested and k % 256:
            size = max((1 << i for i in range(3, 8) if math.gcd(k, whole) % (1 << i) == 0), default=-1)
            fits = f"W{self.bits}A16,group_size={size} fits"
            raise BadInput(f"{self} has super-blocks of 256, which do not divide the {k} inputs; {fits}")
        if isinstance(self.grain, Group):
            if k % self.grain.size:
                powers = [1 << i for i in range(4, 9) if math.gcd(k, whole) % (1 << i) == 0]
                near = max((p for p in powers if p <= self.grain.size), default=max(divisors(k)[:-1]))
                raise BadInput(f"group_size={self.grain.size} does not divide the {k} inputs; group_size={near} does")
            return k // self.grain.size
        if isinstance(self.grain, Block):
            if k % self.grain.columns:
                near = math.gcd(k, whole or k, 1 << (self.grain.columns.bit_length() - 1))
                own = f"block_structure={self.grain.rows}x"
                raise BadInput(f"{own}{self.grain.columns} does not divide the {k} inputs; {own}{near} does")
            return k // self.grain.columns
        return 1

    def bytes(self, shape: tuple[int, ...], scale_bytes: int = 2) -> int:
        """Bytes of codes, scales and zeros for a weight [..., n, k], padding left out."""
        rows, k = 1, shape[-1]
        for extent in shape[:-1]:
            rows *= extent
        scales = -(-rows // self.rows_per_scale(rows)) * self.scales_per_row(k)
        if isinstance(self.scale, Scheme):
            small = self.scale.bits * (1 if self.symmetric else 2)
            over = rows * k // 256 * (2 if self.symmetric else 4)
            return (rows * k * self.bits + scales * small) // 8 + over + 2 * self.rank * (rows + k)
        scale_bytes = {"float8_e4m3fn": 1, "e8m0": 1, "bfloat16": 2, "float32": 4}.get(str(self.scale), scale_bytes)
        scales *= self.planes
        zeros = 0 if self.symmetric else (scales * self.bits + 7) // 8
        thin = 2 * self.rank * (rows + k)
        return (rows * k * self.bits * self.planes + 7) // 8 + scales * scale_bytes + zeros + thin

    def explain(self) -> str:
        """The scheme in a sentence, for lists."""
        per = {Tensor: "tensor", Row: "row", Token: "token"}.get(type(self.grain), f"group of {self.group_size}")
        per = f"block of {self.grain.rows}x{self.grain.columns}" if isinstance(self.grain, Block) else per
        kind = f"{self.planes} planes of {self.table}" if self.planes > 1 else self.table or "symmetric"
        text = f"{self.bits}-bit {kind if self.symmetric else 'asymmetric'} weights, one scale per {per}"
        if self.activations is None:
            return f"{text}; activations stay float"
        how = "found per token when it runs" if self.activations.dynamic else "one range per tensor, from calibration"
        return f"{text}; {self.activations.bits}-bit activations, {how}"

    @property
    def near(self) -> str:
        """The nearest that every folder can say, mostly plain integers, as a recipe spells it."""
        plain = {"Q4_K": "W4A16_ASYM", "Q5_K": "W5A16_ASYM", "FP4A16": "NVFP4A16", "FP8_E5M2A16": "FP8A16"}
        name = plain.get(str(self).split(",")[0], f"W{max(self.bits * self.planes, 2)}A16")
        if name.startswith(("NV", "FP")):
            return name
        name += "_ASYM" if not self.symmetric and not self.nested else ""
        size = -1 if isinstance(self.grain, Row | Tensor) else self.by_rows.group_size
        return name if size == 128 else f"{name},group_size={size}"

    @property
    def fixed(self) -> bool:
        """Whether its group size belongs to its definition (NVFP4, MXFP4, k-quants)."""
        return self.nested or (self.kind == "fp" and self.scale in ("float8_e4m3fn", "e8m0"))

    def __str__(self) -> str:
        if self.rank:
            return f"{replace(self, rank=0)},rank={self.rank}"
        short = next((name for name, kind in SCALES.items() if kind == self.scale), "fp16")
        if short != "fp16" and self.kind != "fp":
            return f"{replace(self, scale='float16')},scale={short}"
        size = -1 if isinstance(self.grain, Row) else self.group_size
        grain = "strategy=tensor" if isinstance(self.grain, Tensor) else f"group_size={size}"
        if isinstance(self.grain, Block):
            grain = f"block_structure={self.grain.rows}x{self.grain.columns}"
        for name, preset in PRESETS.items():
            if preset == self:
                return name
            if not isinstance(self.grain, Token) and not preset.fixed and replace(preset, grain=self.grain) == self:
                return f"{name},{grain}"
        return f"custom:{self!r}"

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read "W4A16_ASYM", "W4A16_ASYM,group_size=64" (-1: one scale per row) or "W8A16,block_structure=128x128".

        Raises:
            BadInput: not a known spelling; the message has the nearest.
        """
        name, *options = text.strip().split(",")
        if name not in PRESETS:
            raise BadInput(f"unknown scheme '{name}'{suggest(name.upper(), PRESETS)}; there are: {', '.join(PRESETS)}")
        scheme = PRESETS[name]
        keys = [option.partition("=")[0].strip() for option in options]
        one_grain(keys)
        for key, option in zip(keys, options, strict=True):
            scheme = scheme.option(key, option.partition("=")[2].strip())
        return scheme


def one_grain(keys: Collection[str]) -> None:
    """Raise BadInput where options say twice what shares a scale."""
    said = [key for key in OPTIONS[:3] if key in keys]
    if len(said) > 1:
        raise BadInput(f"{' and '.join(said)} both say which weights share a scale: give one of them")


OPTIONS = ("group_size", "strategy", "block_structure", "scale", "rank")  # of a scheme, after its name
SCALES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp8": "float8_e4m3fn", "e8m0": "e8m0"}
_TOKEN8 = Scheme(8, grain=Token(), dynamic=True)
_TENSOR8 = Scheme(8, grain=Tensor(), symmetric=False)


def _k(bits: int, group: int, small: int, symmetric: bool) -> Scheme:
    """A k-quant: `bits` codes in groups whose scales (and minimums) have `small` bits over one fp16 for 256 weights."""
    over = Scheme(small, grain=Group(256 // group), symmetric=symmetric)
    return Scheme(bits, grain=Group(group), symmetric=symmetric, scale=over, minimum="code" if symmetric else over)


def _planes(count: int) -> Scheme:
    return Scheme(1, "codebook", table="binary", planes=count)


PRESETS = {
    "W8A16": Scheme(8),
    "W8A16_ASYM": Scheme(8, symmetric=False),
    "W6A16": Scheme(6),
    "W6A16_ASYM": Scheme(6, symmetric=False),
    "W5A16": Scheme(5),
    "W5A16_ASYM": Scheme(5, symmetric=False),
    "W4A16": Scheme(4),
    "W4A16_ASYM": Scheme(4, symmetric=False),
    "W3A16": Scheme(3),
    "W3A16_ASYM": Scheme(3, symmetric=False),
    "W2A16": Scheme(2),
    "W2A16_ASYM": Scheme(2, symmetric=False),
    "W1.58A16": Scheme(2, table="ternary"),
    "W1A16": _planes(1),
    "W2A16_BINARY": _planes(2),
    "W3A16_BINARY": _planes(3),
    "W8A8": Scheme(8, grain=Row(), activations=_TOKEN8),
    "W8A8_STATIC": Scheme(8, grain=Row(), activations=_TENSOR8),
    "W4A8": Scheme(4, activations=_TOKEN8),
    "W4A8_STATIC": Scheme(4, activations=_TENSOR8),
    "FP8A16": Scheme(8, "fp", Row(), table="e4m3"),
    "FP8_E5M2A16": Scheme(8, "fp", Row(), table="e5m2"),
    "FP4A16": Scheme(4, "fp", Group(32), table="e2m1"),
    "NF4": Scheme(4, "codebook", Group(64), table="nf4"),
    "NVFP4A16": Scheme(4, "fp", Group(16), table="e2m1", scale="float8_e4m3fn"),
    "MXFP4A16": Scheme(4, "fp", Group(32), table="e2m1", scale="e8m0"),
    "Q2_K": _k(2, 16, 4, False),
    "Q3_K": _k(3, 16, 6, True),
    "Q4_K": _k(4, 32, 6, False),
    "Q5_K": _k(5, 32, 6, False),
    "Q6_K": _k(6, 16, 8, True),
}


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class QTensor:
    """A weight stored by a scheme. `code` keeps the weight's shape [..., n, k], one int8 per code, unpacked.

    scale: float32 [..., n, scales per row] (times planes); zero: int8 of the same shape, or None when symmetric; for a
        k-quant the float32 minimum in its place.
    activation_scale, activation_zero: of the layer's input, [1] each, for static activation schemes:
        x = scale * (code - zero), code in [-128, 127].
    left, right: float matrices [n, rank] and [rank, k] whose product is added to what the codes mean; fixed point of
        11 bits per column and row, so that their product is exact in float64 in any order (quant/lowrank.py).
    """

    scheme: Scheme
    code: "torch.Tensor"
    scale: "torch.Tensor"
    zero: "torch.Tensor | None" = None
    activation_scale: "torch.Tensor | None" = None
    activation_zero: "torch.Tensor | None" = None
    left: "torch.Tensor | None" = None
    right: "torch.Tensor | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.code.shape)

    def decode(self) -> "torch.Tensor":
        """The weight in float32: scale * (code - zero), and the correction where there is one."""
        groups = self.scale.shape[-1] // self.scheme.planes
        plain = values(self.code.unflatten(-1, (groups, -1)), self.scheme, self.scale, self.zero).flatten(-2)
        if self.left is None or self.right is None:
            return plain
        return (plain.double() + self.left.double() @ self.right.double()).float()


def values(code: "torch.Tensor", scheme: Scheme, scale: "torch.Tensor", zero: "torch.Tensor | None") -> "torch.Tensor":
    """What codes [..., n, g, size] mean in float32; scale, zero [..., n, g] (scale [..., n, g * planes])."""
    import torch

    if scheme.planes > 1:
        bits = [(code.to(torch.int16) + (1 << (scheme.planes - 1))) >> p & 1 for p in range(scheme.planes)]
        parts = scale.float().unflatten(-1, (-1, scheme.planes)).unsqueeze(-1)
        return torch.stack([(2 * b.float() - 1) * parts[..., p, :] for p, b in enumerate(bits)]).sum(0)
    s = scale.float().unsqueeze(-1)
    if scheme.tabled:
        table = torch.tensor(levels(scheme.table), dtype=torch.float32, device=code.device)
        return table[code.long() - scheme.qmin] * s
    q = code.float()
    if zero is None:
        return q * s
    z = zero.float().unsqueeze(-1)
    return s * (q - scheme.qmin) - z if scheme.minimum != "code" else (q - z) * s
