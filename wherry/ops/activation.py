"""Activations as integers would see them: rounded to their grid and back, for measuring in float what int8 will do.

Source: Jacob et al. 2018, arXiv:1712.05877; the rounding of compressed-tensors' fake_quantize.
Shapes: x [..., k]. Dynamic: one symmetric scale per token, from that token's largest value. Static: one scale and
    zero for the tensor, measured in calibration.
"""

import torch
from torch.utils.hooks import RemovableHandle

from wherry.scheme import QTensor, Scheme


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


def round_inputs(layer: torch.nn.Module, q: QTensor) -> list[RemovableHandle]:
    """Round what a layer is given as a kernel for the activations of q would; nothing where its inputs stay floats.

    Gradients pass straight through. Returns the handle of the hook, if there is one, to take it off again.
    """
    scheme = q.scheme.activations
    if scheme is None:
        return []

    def rounded(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        found = fake_quantize(x.detach(), scheme, q.activation_scale, q.activation_zero)
        return (x + (found - x.detach()) if x.requires_grad else found, *args[1:])

    return [layer.register_forward_pre_hook(rounded)]


def cached(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Keys or values [..., tokens, d] as a cache of integers gives them back, a scale for `group` neighbours of d."""
    return fake_quantize(x.unflatten(-1, (-1, group)), Scheme(bits, dynamic=True)).flatten(-2)
