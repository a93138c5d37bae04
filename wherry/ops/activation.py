"""Activations as integers would see them: rounded to their grid and back, for measuring in float what int8 will do.

Source: Jacob et al. 2018, arXiv:1712.05877; the rounding of compressed-tensors' fake_quantize.
Shapes: x [..., k]. Dynamic: one symmetric scale per token, from that token's largest value. Static: one scale and
    zero for the tensor, measured in calibration.
"""

import torch

from wherry.scheme import Scheme


def fake_quantize(
    x: torch.Tensor, scheme: Scheme, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x rounded to the grid of an activation scheme. scale, zero: [1], only for static schemes."""
    if scheme.dynamic or scale is None:
        scale = 2 * x.abs().amax(-1, keepdim=True) / (scheme.qmax - scheme.qmin)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    offset = 0.0 if zero is None or scheme.dynamic else zero.float()
    code = torch.clamp(torch.round(x / scale + offset), scheme.qmin, scheme.qmax)
    return (code - offset) * scale


def cached(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Keys or values [..., tokens, d] as a cache of integers gives them back, a scale for `group` neighbours of d."""
    return fake_quantize(x.unflatten(-1, (-1, group)), Scheme(bits, dynamic=True)).flatten(-2)
