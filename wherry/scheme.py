"""Scheme: how one tensor's numbers are stored. QTensor: a tensor stored so. No files, no models.

    w = scale * (code - zero)            code, zero: signed integers of `bits` bits; zero = 0 when symmetric

with one scale (and zero) per grain: the whole tensor, a row, a group of `size` inputs of one row, a block.
The scale and the minimum are dtypes or schemes themselves, so that super-blocks fit: Q4_K is 4-bit codes whose
scales and minimums are 6-bit integers over an fp16 scale; NVFP4 has fp8 scales over one fp32.
The spelling is the ecosystem's: W4A16 (symmetric), W4A16_ASYM, W8A16, W3A16, W8A8, with group_size beside it.
Source of the vocabulary: compressed-tensors' QuantizationArgs and preset schemes.
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Union

from wherry.errors import BadInput, Unsupported
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

    bits: width of a code, 1 to 8 for kind "int".
    kind: "int" (affine integer grid), "fp" (float codes), "codebook".
    symmetric: zero is 0 and codes span [-2^(bits-1), 2^(bits-1) - 1].
    dynamic: the scale is found when the model runs (activations only).
    scale, minimum: how scales and minimums are stored: dtype names or schemes. minimum "code" = an integer
        zero of the same bits.
    activations: scheme of the layer's input, or None when it stays float (A16).
    planes: number of residual code planes that are summed (residual binary); 1 for all plain schemes.
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

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def group_size(self) -> int | None:
        """Inputs per scale, or None when the grain is not a group."""
        return self.grain.size if isinstance(self.grain, Group) else None

    def with_group(self, size: int) -> "Scheme":
        """The same scheme with another group_size; -1 means one scale per row."""
        if size != -1 and size < 1:
            raise BadInput(f"group_size={size} is not a size; use a positive number, or -1 for one scale per row")
        return replace(self, grain=Row() if size == -1 else Group(size))

    def scales_per_row(self, k: int) -> int:
        """Number of scales that a row of k inputs has. Raises BadInput when the group does not divide k."""
        if isinstance(self.grain, Group):
            if k % self.grain.size:
                powers = [1 << i for i in range(4, 9) if k % (1 << i) == 0]
                near = max((p for p in powers if p <= self.grain.size), default=max(divisors(k)[:-1]))
                raise BadInput(f"group_size={self.grain.size} does not divide the {k} inputs; group_size={near} does")
            return k // self.grain.size
        return 1

    def bytes(self, shape: tuple[int, ...], scale_bytes: int = 2) -> int:
        """Bytes of codes, scales and zeros for a weight [..., n, k], padding left out."""
        rows, k = 1, shape[-1]
        for extent in shape[:-1]:
            rows *= extent
        scales = rows * self.scales_per_row(k)
        zeros = 0 if self.symmetric else (scales * self.bits + 7) // 8
        return (rows * k * self.bits * self.planes + 7) // 8 + scales * scale_bytes + zeros

    def explain(self) -> str:
        """The scheme in a sentence, for lists."""
        per = {Tensor: "tensor", Row: "row", Token: "token"}.get(type(self.grain), f"group of {self.group_size}")
        text = f"{self.bits}-bit {'symmetric' if self.symmetric else 'asymmetric'} weights, one scale per {per}"
        if self.activations is None:
            return f"{text}; activations stay float"
        how = "found per token when it runs" if self.activations.dynamic else "one range per tensor, from calibration"
        return f"{text}; {self.activations.bits}-bit activations, {how}"

    def __str__(self) -> str:
        spelling = f"W{self.bits}A{16 if self.activations is None else self.activations.bits}"
        spelling += "" if self.symmetric else "_ASYM"
        if self.activations is not None and not self.activations.dynamic:
            spelling += "_STATIC"
        default = PRESETS.get(spelling)
        if default == self:
            return spelling
        size = -1 if isinstance(self.grain, Row) else self.group_size
        if size is not None and default is not None and default.with_group(size) == self:
            return f"{spelling},group_size={size}"
        return f"custom:{self!r}"

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read "W4A16_ASYM" or "W4A16_ASYM,group_size=64" (group_size=-1: one scale per row).

        Raises:
            BadInput: not a known spelling; the message has the nearest.
        """
        name, _, rest = text.strip().partition(",")
        if name not in PRESETS:
            raise BadInput(f"unknown scheme '{name}'{suggest(name.upper(), PRESETS)}; there are: {', '.join(PRESETS)}")
        scheme = PRESETS[name]
        if rest:
            match = re.fullmatch(r"\s*group_size=(-?\d+)\s*", rest)
            if not match:
                raise BadInput(f"scheme '{text}': after the name only group_size=N may follow")
            scheme = scheme.with_group(int(match[1]))
        return scheme

    def to_compressed_tensors(self) -> dict[str, Any]:
        """The scheme as a compressed-tensors config group (without targets).

        Raises:
            Unsupported: QuantizationArgs has no words for it (schemes as scales, several planes, codebooks).
        """
        if self.kind != "int" or self.planes != 1 or not isinstance(self.scale, str) or self.minimum != "code":
            raise Unsupported(f"compressed-tensors cannot say the scheme {self}; it can say plain integer schemes")
        weights: dict[str, Any] = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": self.dynamic,
            "strategy": _STRATEGY[type(self.grain)], "group_size": self.group_size,
        }  # fmt: skip
        if isinstance(self.grain, Block):
            weights["block_structure"] = [self.grain.rows, self.grain.columns]
        group: dict[str, Any] = {"weights": weights, "input_activations": None}
        if self.activations is not None:
            group["input_activations"] = self.activations.to_compressed_tensors()["weights"]
        return group

    @classmethod
    def from_compressed_tensors(cls, group: dict[str, Any]) -> "Scheme":
        """The opposite: a config group of a `quantization_config` as a Scheme. Raises Unsupported for float types."""
        args = group["weights"]
        if args.get("type", "int") != "int":
            raise Unsupported(f"weights of type {args.get('type')} are not read yet; integer schemes are")
        strategy, size = args.get("strategy"), args.get("group_size")
        grains: dict[str, Grain] = {"tensor": Tensor(), "channel": Row(), "token": Token()}
        if strategy == "block":
            grain: Grain = Block(*args["block_structure"])
        elif strategy == "group" or (strategy is None and size):
            grain = Group(int(size))
        elif strategy in grains:
            grain = grains[strategy]
        else:
            raise Unsupported(
                f"quantization strategy '{strategy}' is not read; tensor, channel, token, group, block are"
            )
        activations = group.get("input_activations")
        return cls(
            bits=args["num_bits"],
            grain=grain,
            symmetric=args.get("symmetric", True),
            dynamic=args.get("dynamic", False) is True,
            activations=None if activations is None else cls.from_compressed_tensors({"weights": activations}),
        )


_STRATEGY = {Tensor: "tensor", Row: "channel", Token: "token", Group: "group", Block: "block"}
_TOKEN8 = Scheme(8, grain=Token(), dynamic=True)
_TENSOR8 = Scheme(8, grain=Tensor(), symmetric=False)
PRESETS = {
    "W8A16": Scheme(8),
    "W4A16": Scheme(4),
    "W4A16_ASYM": Scheme(4, symmetric=False),
    "W3A16": Scheme(3),
    "W3A16_ASYM": Scheme(3, symmetric=False),
    "W2A16": Scheme(2),
    "W2A16_ASYM": Scheme(2, symmetric=False),
    "W8A8": Scheme(8, grain=Row(), activations=_TOKEN8),
    "W8A8_STATIC": Scheme(8, grain=Row(), activations=_TENSOR8),
}


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class QTensor:
    """A weight stored by a scheme. `code` keeps the weight's shape [..., n, k], one int8 per code, unpacked.

    scale: float32 [..., n, scales per row]; zero: int8 of the same shape, or None when symmetric.
    activation_scale, activation_zero: of the layer's input, [1] each, for static activation schemes:
        x = scale * (code - zero), code in [-128, 127].
    """

    scheme: Scheme
    code: "torch.Tensor"
    scale: "torch.Tensor"
    zero: "torch.Tensor | None" = None
    activation_scale: "torch.Tensor | None" = None
    activation_zero: "torch.Tensor | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.code.shape)

    def decode(self) -> "torch.Tensor":
        """The weight in float32: scale * (code - zero)."""
        groups = self.scale.shape[-1]
        q = self.code.unflatten(-1, (groups, -1)).float()
        if self.zero is not None:
            q = q - self.zero.float().unsqueeze(-1)
        return (q * self.scale.float().unsqueeze(-1)).flatten(-2)
