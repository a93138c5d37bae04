"""The affine integer grid: from the range of a group to its scale and zero, and from weights to codes.

Shapes: w [..., n, k]; scale, zero [..., n, g] with g scales per row; codes int8 [..., n, k].
Source: Jacob et al. 2018, arXiv:1712.05877 (affine quantization); the rounding of ranges is that of
    compressed-tensors, so that round-to-nearest here equals llm-compressor's.
"""

from collections.abc import Callable

import torch

from wherry.errors import Unsupported
from wherry.scheme import Group, QTensor, Row, Scheme

Rounding = Callable[[torch.Tensor], torch.Tensor]
PORTABLE_BITS = 7  # significant bits of a portable scale: 7 + 4 <= 11, what fp16 holds
COARSE_BITS = 3  # of a scale whose 8-bit codes must decode exactly in fp16: 3 + 8 <= 11
FP16_LEAST = 2.0**-24
PORTABLE_MOST = 127 * 2.0**5  # the largest of 7 bits that fp16 holds 16 times
COARSE_MOST = 7 * 2.0**6  # the largest of 3 bits that fp16 holds 128 times


def portable(scale: torch.Tensor) -> torch.Tensor:
    """Round a positive scale to 7 significant bits, within the range in which fp16 holds it exactly.

    Then s, s*z and s*(q-z) are exact in fp16 for codes of up to 4 bits, so that one set of codes means the
    same weights in GGUF (fp16 d and m), ONNX and compressed-tensors. Error of the scale: at most 2^-7 of it.
    """
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp(torch.round(mantissa * 2**PORTABLE_BITS), exponent - PORTABLE_BITS)
    return rounded.clamp(FP16_LEAST * 2 ** (PORTABLE_BITS - 1), PORTABLE_MOST)


def coarse(scale: torch.Tensor) -> torch.Tensor:
    """Round a positive scale up to 3 significant bits: then s*q is exact in fp16 for codes of 8 bits.

    For embeddings and heads: a format that cannot share int8 codes between both holds them as fp16, and still
    decodes to the same weights. The step grows by 0 to 25%; it never clips.
    """
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp(torch.ceil(mantissa * 2**COARSE_BITS), exponent - COARSE_BITS)
    return rounded.clamp(FP16_LEAST * 2 ** (COARSE_BITS - 1), COARSE_MOST)


def grouped(w: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """View w [..., n, k] as [..., n, g, k/g]. Raises BadInput when the group does not divide k."""
    if not isinstance(scheme.grain, Group | Row):
        raise Unsupported(f"weights per {type(scheme.grain).__name__.lower()} are not implemented; use group or row")
    return w.unflatten(-1, (scheme.scales_per_row(w.shape[-1]), -1))


def fit(
    w: torch.Tensor, scheme: Scheme, rounding: Rounding | None = portable
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero of each group from its minimum and maximum; the scale is rounded by `rounding`, if any.

    Returns scale float32 [..., n, g] > 0 and zero int8 of the same shape (None when symmetric).
    """
    groups = grouped(w.float(), scheme)
    return between(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), scheme, rounding)


def between(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, rounding: Rounding | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero of the grid that spans low <= 0 to high >= 0, each [..., n, g]."""
    span = float(scheme.qmax - scheme.qmin)
    scale = 2 * torch.maximum(-low, high) / span if scheme.symmetric else (high - low) / span
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=torch.finfo(torch.float32).tiny)
    if rounding is not None:
        scale = rounding(scale)
    if scheme.symmetric:
        return scale, None
    zero = (scheme.qmin - torch.round(low / scale)).clamp(scheme.qmin, scheme.qmax)
    return scale, zero.to(torch.int8)


def search(
    w: torch.Tensor, scheme: Scheme, rounding: Rounding | None, importance: torch.Tensor | None = None,
    least: float = 0.4, steps: int = 31,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Scale and zero of each group whose range, shrunk by 1 to `least`, gives the smallest weighted squared error.

    importance: [k], weight of each input's error (the diagonal of the Hessian), or None for plain squared error.
    Source: the search of llm-compressor's observers memoryless_mse and imatrix_mse. Cost: `steps` roundings of w.
    """
    groups = grouped(w.float(), scheme)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    weight = None if importance is None else importance.float().unflatten(-1, groups.shape[-2:])
    best_scale, best_zero = between(low, high, scheme, rounding)
    best = torch.full_like(low, torch.inf)
    for shrink in torch.linspace(1.0, least, steps).tolist():
        scale, zero = between(low * shrink, high * shrink, scheme, rounding)
        offset = 0 if zero is None else zero.float().unsqueeze(-1)
        code = torch.round(groups / scale.unsqueeze(-1) + offset).clamp_(scheme.qmin, scheme.qmax)
        error = ((code - offset) * scale.unsqueeze(-1) - groups).square_()
        total = (error if weight is None else error * weight).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def encode(w: torch.Tensor, scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor | None) -> QTensor:
    """Round each weight to the nearest code of its group's grid."""
    x = grouped(w.float(), scheme) / scale.unsqueeze(-1)
    if zero is not None:
        x = x + zero.unsqueeze(-1)
    code = torch.round(x).clamp(scheme.qmin, scheme.qmax).to(torch.int8).flatten(-2)
    return QTensor(scheme, code, scale, zero)
