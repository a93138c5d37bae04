"""Operators of ONNX Runtime (domain com.microsoft) that its optimizer and exporters write for transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wherry.formats.onnx.torch_module.attention import heads
from wherry.formats.onnx.torch_module.convolution import convolution
from wherry.formats.onnx.torch_module.matrix import gemm
from wherry.formats.onnx.torch_module.normalisation import layer_norm, rms_norm
from wherry.formats.onnx.torch_module.quantized import block_weight
from wherry.formats.onnx.torch_module.table import runs


@runs("com.microsoft::FastGelu")
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh form of GELU, of x + bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@runs("com.microsoft::BiasGelu", "com.microsoft::FusedGelu")
def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias."""
    return F.gelu(x if bias is None else x + bias)


@runs("com.microsoft::FusedMatMul", "com.microsoft::TransposeMatMul")
def fused_matmul(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """Alpha * a @ b, the last two axes of each swapped where asked."""
    if transBatchA or transBatchB:
        raise NotImplementedError("transBatchA and transBatchB are not imported")
    y = torch.matmul(a.transpose(-1, -2) if transA else a, b.transpose(-1, -2) if transB else b)
    return y if alpha == 1 else y * alpha


def named(name: str, alpha: float = 0.01, beta: float = 0.0) -> Any:
    """The activation that a fused operator names."""
    if not name:
        return lambda x: x
    table = {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "HardSwish": F.hardswish,
             "LeakyRelu": lambda x: F.leaky_relu(x, alpha), "Clip": lambda x: x.clamp(alpha, beta),
             "HardSigmoid": lambda x: torch.clamp(x * alpha + beta, 0, 1)}  # fmt: skip
    return table[name]


@runs("com.microsoft::FusedGemm")
def fused_gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
    transB: int = 0, activation: str = "", activation_alpha: float = 0.01, activation_beta: float = 0.0,
    activation_gamma: float = 0.0,
) -> Tensor:  # fmt: skip
    """An activation of a Gemm."""
    return named(activation, activation_alpha, activation_beta)(gemm(a, b, c, alpha, beta, transA, transB))


@runs("com.microsoft::FusedConv")
def fused_conv(
    x: Tensor, w: Tensor, bias: Tensor | None = None, z: Tensor | None = None, activation: str = "",
    activation_params: list[float] = [], auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,  # noqa: B006
    kernel_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """An activation of a Conv plus z."""
    y = convolution(x, w, bias, auto_pad, dilations, group, kernel_shape, pads, strides)
    return named(activation, *activation_params)(y if z is None else y + z)


@runs("com.microsoft::SkipLayerNormalization")
def skip_layer_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None,
    epsilon: float = 1e-12, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """LayerNorm of x + skip + bias; the sum is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    y, mean, inverse = layer_norm(total, gamma, beta, -1, epsilon, outputs=3)
    return (y, mean, inverse, total)[:outputs]


@runs("com.microsoft::SkipSimplifiedLayerNormalization")
def skip_rms_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, epsilon: float = 1e-5, outputs: int = 1
) -> tuple[Tensor, ...]:
    """RMSNorm of x + skip + bias; the sum is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    return (rms_norm(total, gamma, -1, epsilon), total, total, total)[:outputs]


@runs("com.microsoft::EmbedLayerNormalization")
def embed_layer_norm(
    ids: Tensor, segments: Tensor | None, words: Tensor, places: Tensor, kinds: Tensor | None, gamma: Tensor,
    beta: Tensor, mask: Tensor | None = None, at: Tensor | None = None, epsilon: float = 1e-12,
    mask_index_type: int = 0, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """LayerNorm of the sum of word, position and segment embeddings; the lengths that the mask says; the sum."""
    at = torch.arange(ids.shape[1])[None] if at is None else at
    total = words[ids.long()] + places[at.long()]
    if kinds is not None and segments is not None:
        total = total + kinds[segments.long()]
    lengths = torch.zeros(ids.shape[0], dtype=torch.int32) if mask is None else mask.sum(1, dtype=torch.int32)
    return (layer_norm(total, gamma, beta, -1, epsilon, outputs=1)[0], lengths, total)[:outputs]


@runs("com.microsoft::RotaryEmbedding")
def rotary(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0, is_packed_batching: int = 0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """X [n, l, hidden] or [n, heads, l, d], pairs turned by the angles of positions [n, l], or [1]: the first one."""
    flat = x.dim() == 3
    width = rotary_embedding_dim or 2 * cos.shape[1]
    y = heads(x, num_heads or x.shape[-1] // width) if flat else x
    if positions.numel() == 1:
        positions = positions.reshape(1, 1) + torch.arange(y.shape[2])[None]
    c, s = cos[positions][:, None, :, : width // 2], sin[positions][:, None, :, : width // 2]
    turn, rest = y[..., :width], y[..., width:]
    a, b = (turn[..., 0::2], turn[..., 1::2]) if interleaved else turn.chunk(2, -1)
    real, imaginary = a * c - b * s, a * s + b * c
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    out = torch.cat([turned, rest], -1)
    return out.transpose(1, 2).reshape(x.shape) if flat else out


@runs("com.microsoft::MultiHeadAttention")
def multi_head_attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, bias: Tensor | None = None, mask: Tensor | None = None,
    scores: Tensor | None = None, past_k: Tensor | None = None, past_v: Tensor | None = None, *, num_heads: int,
    mask_filter_value: float = -10000.0, scale: float = 0.0, unidirectional: int = 0, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """softmax(q k^T * scale + scores) v by heads; q, k, v [n, l, hidden]; mask [n, keys]: 1 where one may look."""
    if k is None or v is None:
        raise NotImplementedError("packed queries, keys and values are not imported")
    if bias is not None:
        parts = torch.split(bias, [q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = q + parts[0], k + parts[1], v + parts[2]
    a, b, c = (
        heads(q, num_heads),
        k if k.dim() == 4 else heads(k, num_heads),
        v if v.dim() == 4 else heads(v, num_heads),
    )
    if past_k is not None and past_v is not None:
        b, c = torch.cat([past_k, b], 2), torch.cat([past_v, c], 2)
    s = torch.matmul(a, b.transpose(-1, -2)) * (scale or 1 / a.shape[-1] ** 0.5)
    s = s if scores is None else s + scores
    if mask is not None:
        if mask.dim() == 1:
            mask = torch.arange(b.shape[2])[None] < mask[: q.shape[0], None]
        view = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
        s = torch.where(view.bool(), s, mask_filter_value)
    if unidirectional:
        rows, columns = s.shape[-2:]
        seen = torch.arange(columns)[None] <= torch.arange(rows)[:, None] + columns - rows
        s = torch.where(seen, s, mask_filter_value)
    y = torch.matmul(torch.softmax(s, -1), c).transpose(1, 2)
    return (y.reshape(q.shape[0], q.shape[1], -1), b, c)[:outputs]


@runs("com.microsoft::Attention")
def packed_attention(
    x: Tensor, w: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, past: Tensor | None = None,
    scores: Tensor | None = None, *, num_heads: int, unidirectional: int = 0, mask_filter_value: float = -10000.0,
    scale: float = 0.0, qkv_hidden_sizes: list[int] | None = None, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention of x [n, l, k] with the weights of queries, keys and values side by side, [k, 3 * hidden]."""
    y = torch.matmul(x, w) if bias is None else torch.matmul(x, w) + bias
    q, k, v = torch.split(y, qkv_hidden_sizes, -1) if qkv_hidden_sizes else y.chunk(3, -1)
    old = (None, None) if past is None else (past[0], past[1])
    out = multi_head_attention(
        q, k, v, None, mask, scores, *old, num_heads=num_heads, scale=scale, mask_filter_value=mask_filter_value,
        unidirectional=unidirectional, outputs=3,
    )  # fmt: skip
    return (out[0], torch.stack(out[1:]))[:outputs]


@runs("com.microsoft::GroupQueryAttention")
def grouped_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None, last: Tensor,
    total: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, num_heads: int, kv_num_heads: int,
    do_rotary: int = 0, rotary_interleaved: int = 0, scale: float = 0.0, local_window_size: int = -1,
    softcap: float = 0.0, smooth_softmax: int = 0, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Causal attention with shared keys and values; last [n]: the last position of each example; all of one length."""
    if smooth_softmax:
        raise NotImplementedError("smooth_softmax is not imported")
    if k is None or v is None:
        d = q.shape[-1] // (num_heads + 2 * kv_num_heads)
        q, k, v = torch.split(q, [num_heads * d, kv_num_heads * d, kv_num_heads * d], -1)
    a, b, c = heads(q, num_heads), heads(k, kv_num_heads), heads(v, kv_num_heads)
    seen = 0 if past_k is None else past_k.shape[2]
    if do_rotary and cos is not None and sin is not None:
        positions = (seen + torch.arange(q.shape[1]))[None]
        a = rotary(a, positions, cos, sin, rotary_interleaved)
        b = rotary(b, positions, cos, sin, rotary_interleaved)
    if past_k is not None and past_v is not None:
        b, c = torch.cat([past_k, b], 2), torch.cat([past_v, c], 2)
    times = num_heads // kv_num_heads
    keys, values = b.repeat_interleave(times, 1), c.repeat_interleave(times, 1)
    s = torch.matmul(a, keys.transpose(-1, -2)) * (scale or 1 / a.shape[-1] ** 0.5)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    row, column = torch.arange(s.shape[-2])[:, None] + seen, torch.arange(s.shape[-1])[None]
    fits = column <= row
    if local_window_size >= 0:
        fits = fits & (column > row - local_window_size)
    y = torch.matmul(torch.softmax(torch.where(fits, s, -torch.inf), -1), values).transpose(1, 2)
    return (y.reshape(q.shape[0], q.shape[1], -1), b, c)[:outputs]


@runs("com.microsoft::GatherBlockQuantized")
def gather_blocks(
    codes: Tensor, index: Tensor, scales: Tensor, zeros: Tensor | None = None, gather_axis: int = 0,
    quantize_axis: int = 1, block_size: int = 128, bits: int = 4,
) -> Tensor:  # fmt: skip
    """Rows at index of a table of codes of few bits [n, bytes]."""
    rows, groups = codes.reshape(codes.shape[0], -1), scales.reshape(codes.shape[0], -1)
    if gather_axis != 0 or codes.dtype != torch.uint8:
        raise NotImplementedError("only rows of uint8 codes are imported")
    k = rows.shape[1] * 8 // bits
    zero = None if zeros is None else zeros.reshape(codes.shape[0], -1)[index.reshape(-1)]
    picked = block_weight(rows[index.reshape(-1)], groups[index.reshape(-1)], zero, index.numel(), k, bits, block_size)
    return picked.reshape(*index.shape, k)
