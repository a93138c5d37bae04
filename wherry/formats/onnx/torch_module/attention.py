"""Attention (opset 23 and 24) and RotaryEmbedding of ONNX's own domain, written out in torch."""

import torch
from torch import Tensor

from wherry.formats.onnx.torch_module.table import runs
from wherry.formats.onnx.torch_module.values import dtype_of


def heads(x: Tensor, count: int) -> Tensor:
    """[n, l, heads * d] to [n, heads, l, d]."""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


@runs("Attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, past_k: Tensor | None = None,
    past_v: Tensor | None = None, lengths: Tensor | None = None, is_causal: int = 0, kv_num_heads: int = 0,
    q_num_heads: int = 0, qk_matmul_output_mode: int = 0, scale: float | None = None, softcap: float = 0.0,
    softmax_precision: int = 0, left_window_size: int = -1, right_window_size: int = -1, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """softmax(q k^T * scale + mask) v by heads; also the keys and values with those of the past, and the scores.

    q, k, v [n, heads, l, d] or [n, l, heads * d]; fewer heads in k and v are shared; lengths [n]: keys that count.
    """
    flat = q.dim() == 3
    if flat:
        q, k, v = heads(q, q_num_heads), heads(k, kv_num_heads), heads(v, kv_num_heads)
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    present = k, v
    if q.shape[1] != k.shape[1]:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    root = (1 / q.shape[-1] ** 0.5 if scale is None else scale) ** 0.5
    scores = torch.matmul(q * root, (k * root).transpose(-1, -2))
    first, rows, columns = scores, q.shape[2], k.shape[2]
    bias = torch.zeros(rows, columns, dtype=q.dtype)
    offset: Tensor | int = past_k.shape[2] if past_k is not None else 0
    if lengths is not None and past_k is None:
        offset = (lengths - rows)[:, None, None, None]
    far = torch.arange(columns)[None] - torch.arange(rows)[:, None] - offset  # of a key from its query
    if is_causal:
        bias = torch.where(far <= 0, bias, -torch.inf)
    if left_window_size >= 0:
        bias = torch.where(far >= -left_window_size, bias, -torch.inf)
    if right_window_size >= 0:
        bias = torch.where(far <= right_window_size, bias, -torch.inf)
    if lengths is not None:
        bias = torch.where(torch.arange(columns) < lengths[:, None, None, None], bias, -torch.inf)
    if mask is not None:
        if mask.shape[-1] < columns:
            fill = False if mask.dtype == torch.bool else -torch.inf
            mask = torch.nn.functional.pad(mask, (0, columns - mask.shape[-1]), value=fill)
        bias = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
    capped = softcap * torch.tanh(scores / softcap) if softcap else scores
    biased = capped + bias.to(scores.dtype)
    wide = biased.to(dtype_of(softmax_precision)) if softmax_precision else biased
    weights = torch.softmax(wide, -1)
    weights = torch.where((wide == -torch.inf).all(-1, keepdim=True), 0, weights).to(q.dtype)
    y = torch.matmul(weights, v)
    y = y.transpose(1, 2).reshape(y.shape[0], rows, -1) if flat else y
    return (y, *present, (first, capped, biased, weights)[qk_matmul_output_mode])[:outputs]


@runs("RotaryEmbedding")
def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:  # fmt: skip
    """Pairs of x turned by their position's angles; cos and sin [places, d / 2], or [n, l, d / 2] without positions."""
    flat = x.dim() == 3
    y = x.reshape(x.shape[0], x.shape[1], num_heads, -1) if flat else x.transpose(1, 2)
    width = rotary_embedding_dim or y.shape[-1]
    turn, rest = y[..., :width], y[..., width:]
    cos, sin = (c if positions is None else c[positions] for c in (cos, sin))
    cos, sin = cos[..., : width // 2].unsqueeze(2), sin[..., : width // 2].unsqueeze(2)
    a, b = (turn[..., 0::2], turn[..., 1::2]) if interleaved else turn.chunk(2, -1)
    real, imaginary = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    out = torch.cat([turned, rest], -1)
    return out.reshape(x.shape) if flat else out.transpose(1, 2)
