"""Integers and scales: QuantizeLinear, DequantizeLinear, and operators on the codes.

Constant codes with their scales become float weights when the module is made (so that they are layers); activations are
rounded and widened in the graph, with the same numbers as the runtime's.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.convolution import convolution
from wherry.formats.onnx.torch_module.elementwise import convert
from wherry.formats.onnx.torch_module.matrix import bias_behind, linear
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import NARROW, Constant, Node, dtype_of


def spread(scale: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales (or zeros) shaped for x: one, one by place of an axis, or one for each block of an axis."""
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.size(axis))
    if scale.dim() == 0 or scale.numel() == 1:
        return scale.reshape(())
    axis = axis + x.dim() if axis < 0 else axis
    return scale.reshape([-1 if i == axis else 1 for i in range(x.dim())])


def limits(dtype: torch.dtype, kind: int = 0) -> tuple[int, int]:
    """The smallest and largest code."""
    if kind in NARROW:
        return NARROW[kind]
    info = torch.iinfo(dtype)
    return info.min, info.max


@runs("QuantizeLinear", "com.microsoft::QuantizeLinear")
def quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1, block_size: int = 0, output_dtype: int = 0,
    precision: int = 0, saturate: int = 1, kind: int = 0,
) -> Tensor:  # fmt: skip
    """round(x / scale) + zero, kept in the range of the codes; halves go to the even side."""
    kind = output_dtype or kind
    dtype = zero.dtype if zero is not None else dtype_of(kind) if kind else torch.uint8
    y = x.to(scale.dtype if x.is_floating_point() else torch.float32) / spread(scale, x, axis, block_size)
    if dtype.is_floating_point:
        return convert(y if zero is None else y + spread(zero, x, axis, block_size).to(y.dtype), dtype, saturate)
    low, high = limits(dtype, kind)
    y = torch.round(y)
    if zero is not None:
        y = y + spread(zero, x, axis, block_size).to(y.dtype)
    return torch.clamp(y, low, high).to(torch.int32).to(dtype)


@runs("DequantizeLinear", "com.microsoft::DequantizeLinear")
def dequantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(x - zero) * scale."""
    wide = x.to(torch.float32) if x.is_floating_point() else x.to(torch.int32)
    if zero is not None:
        wide = wide - spread(zero, x, axis, block_size).to(wide.dtype)
    y = wide.to(torch.float32) * spread(scale, x, axis, block_size).to(torch.float32)
    return y.to(dtype_of(output_dtype) if output_dtype else scale.dtype)


@builds("QuantizeLinear", "com.microsoft::QuantizeLinear")
def _quantize(b: Builder, node: Node) -> Any:
    if len(node.inputs) > 2 and node.inputs[2]:
        node.facts["kind"] = b.kind(node.inputs[2]) or 0  # 4-bit zeros are held in bytes
    return NotImplemented


@runs("DynamicQuantizeLinear")
def quantize_dynamic(x: Tensor) -> tuple[Tensor, ...]:
    """Codes uint8 of x with the scale and zero that its own range asks for."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    safe = torch.where(scale == 0, 1, scale)
    zero = torch.clamp(torch.round(0 - low / safe), 0, 255)
    codes = torch.clamp(torch.round(x / safe) + zero, 0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def centred(x: Tensor, zero: Tensor | None, rows: bool = False) -> Tensor:
    """Codes less their zero, as float64: sums of products of bytes are exact in it."""
    wide = x.to(torch.float64)
    if zero is None:
        return wide
    zero = zero.to(torch.float64)
    return wide - (zero.unsqueeze(-1) if rows and zero.dim() and zero.numel() > 1 else zero)


@runs("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """(a - a_zero) @ (b - b_zero) in int32."""
    return torch.matmul(centred(a, a_zero, True), centred(b, b_zero)).to(torch.int32)


@runs("ConvInteger")
def conv_integer(
    x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None, auto_pad: str = "NOTSET",
    dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
    pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """A convolution of codes less their zeros, in int32."""
    zero = w_zero.reshape(-1, *[1] * (w.dim() - 1)) if w_zero is not None and w_zero.numel() > 1 else w_zero
    y = convolution(centred(x, x_zero), centred(w, zero), None, auto_pad, dilations, group, kernel_shape, pads, strides)
    return y.to(torch.int32)


@runs("QLinearMatMul")
def qlinear_matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:  # fmt: skip
    """The product of two code matrices, as codes."""
    total = torch.matmul(centred(a, a_zero, True), centred(b, b_zero))
    a_scale = a_scale.unsqueeze(-1) if a_scale.dim() and a_scale.numel() > 1 else a_scale
    y = total * (a_scale.double() * b_scale.double() / y_scale.double())
    low, high = limits(y_zero.dtype)
    return torch.clamp(torch.round(y) + y_zero, low, high).to(y_zero.dtype)


@runs("QLinearConv")
def qlinear_conv(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, y_scale: Tensor,
    y_zero: Tensor, bias: Tensor | None = None, auto_pad: str = "NOTSET", dilations: list[int] | None = None,
    group: int = 1, kernel_shape: list[int] | None = None, pads: list[int] | None = None,
    strides: list[int] | None = None, channels_last: int = 0,
) -> Tensor:  # fmt: skip
    """A convolution of codes, as codes; bias int32 in steps of x_scale * w_scale."""
    each = (-1, *[1] * (w.dim() - 1))
    y = convolution(
        centred(x, x_zero), centred(w, w_zero.reshape(each) if w_zero.numel() > 1 else w_zero),
        None if bias is None else bias.double(), auto_pad, dilations, group, kernel_shape, pads, strides,
    )  # fmt: skip
    step = (x_scale.double() * w_scale.double() / y_scale.double()).reshape(each[:-1] if w_scale.numel() > 1 else ())
    low, high = limits(y_zero.dtype)
    return torch.clamp(torch.round(y * step) + y_zero, low, high).to(y_zero.dtype)


def requantized(y: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of float y."""
    return quantize(y.float(), scale, zero)


@runs("com.microsoft::QLinearAdd")
def qlinear_add(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:  # fmt: skip
    """The sum of two code tensors, as codes."""
    return requantized(dequantize(a, a_scale, a_zero) + dequantize(b, b_scale, b_zero), y_scale, y_zero)


@runs("com.microsoft::QLinearMul")
def qlinear_mul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:  # fmt: skip
    """The product of two code tensors, as codes."""
    return requantized(dequantize(a, a_scale, a_zero) * dequantize(b, b_scale, b_zero), y_scale, y_zero)


@runs("com.microsoft::QLinearSigmoid")
def qlinear_sigmoid(x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor) -> Tensor:
    """The sigmoid of codes, as codes."""
    return requantized(torch.sigmoid(dequantize(x, x_scale, x_zero)), y_scale, y_zero)


@runs("com.microsoft::QLinearGlobalAveragePool")
def qlinear_global_average(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, channels_last: int = 0
) -> Tensor:
    """The mean of each channel of codes, as codes."""
    axes = list(range(1, x.dim() - 1)) if channels_last else list(range(2, x.dim()))
    return requantized(dequantize(x, x_scale, x_zero).mean(axes, keepdim=True), y_scale, y_zero)


@runs("com.microsoft::QLinearConcat")
def qlinear_concat(y_scale: Tensor, y_zero: Tensor, *parts: Tensor, axis: int) -> Tensor:
    """Code tensors with (codes, scale, zero) each, one behind the other, as codes."""
    floats = [dequantize(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]
    return requantized(torch.cat(floats, axis), y_scale, y_zero)


@runs("com.microsoft::QGemm")
def qgemm(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, c: Tensor | None = None,
    y_scale: Tensor | None = None, y_zero: Tensor | None = None, alpha: float = 1.0, transA: int = 0, transB: int = 0,
) -> Tensor:  # fmt: skip
    """A Gemm of codes, as codes, or as floats without y_scale."""
    left, right = centred(a, a_zero), centred(b, b_zero if not transB or b_zero.numel() == 1 else b_zero[:, None])
    total = torch.matmul(left.t() if transA else left, right.t() if transB else right)
    total = total if c is None else total + c.double()
    y = (total * (alpha * a_scale.double() * b_scale.double())).float()
    return y if y_scale is None or y_zero is None else requantized(y, y_scale, y_zero)


@runs("com.microsoft::MatMulIntegerToFloat")
def matmul_integer_to_float(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product of two code matrices, as floats."""
    y = (torch.matmul(centred(a, a_zero), centred(b, b_zero)) * (a_scale.double() * b_scale.double())).float()
    return y if bias is None else y + bias


@runs("com.microsoft::DynamicQuantizeMatMul")
def dynamic_quantize_matmul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Floats times codes: the floats are rounded to uint8 by their own range first."""
    codes, scale, zero = quantize_dynamic(a)
    return matmul_integer_to_float(codes, b, scale, b_scale, zero, b_zero, bias)


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """Bytes [..., m] to the unsigned numbers of `bits` bits in them [..., m * 8 / bits], lowest bits first."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    wide = (codes.to(torch.uint8).unsqueeze(-1).to(torch.int32) >> places.to(torch.int32)) & ((1 << bits) - 1)
    return wide.reshape(*codes.shape[:-1], prod(codes.shape[-1:]) * (8 // bits))


def block_weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, block_size: int
) -> Tensor:
    """The float weight [n, k] of a MatMulNBits."""
    blocks = -(-k // block_size)
    w = unpacked(codes.reshape(n, blocks, -1), bits)
    middle: Any = 1 << (bits - 1)
    if zeros is not None and zeros.is_floating_point():
        middle = zeros.reshape(n, blocks, 1)
    elif zeros is not None:
        middle = unpacked(zeros.reshape(n, -1), bits)[:, :blocks, None]
    w = (w.to(scales.dtype) - middle) * scales.reshape(n, blocks, 1)
    return w.reshape(n, -1)[:, :k]


@runs("com.microsoft::MatMulNBits")
def matmul_bits(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, g_idx: Tensor | None = None,
    bias: Tensor | None = None, K: int = 0, N: int = 0, bits: int = 4, block_size: int = 32, accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:  # fmt: skip
    """X [..., k] times a weight [n, k] of codes of few bits, transposed."""
    if g_idx is not None:
        raise NotImplementedError("g_idx (an order of the inputs) is not imported")
    y = torch.matmul(x, block_weight(codes, scales, zeros, N, K, bits, block_size).t())
    return y if bias is None else y + bias


@builds("com.microsoft::MatMulNBits")
def _matmul_bits(b: Builder, node: Node) -> Any:

    x, codes, scales, zeros, order, bias = [*b.inputs(node), None, None, None][:6]
    if not isinstance(x, fx.Node) or order is not None or not isinstance(codes, Constant):
        return NotImplemented
    if not isinstance(scales, Constant) or any(not isinstance(v, Constant | None) for v in (zeros, bias)):
        return NotImplemented
    facts = node.facts
    data = block_weight(
        codes.tensor, scales.tensor, zeros.tensor if zeros else None, facts["N"], facts["K"], facts.get("bits", 4),
        facts["block_size"],
    )  # fmt: skip
    bias = bias or bias_behind(b, node, facts["N"])
    return linear(b, node, x, Constant(data.contiguous(), codes.name, derived=True), bias, "")
