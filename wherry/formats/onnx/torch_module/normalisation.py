"""Normalisations: with constant scales nn.BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, else functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Constant, Node, dtype_of

BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def along(v: Tensor, x: Tensor) -> Tensor:
    """A vector [c] shaped for axis 1 of x."""
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


@runs("BatchNormalization")
def batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float = 1e-5, momentum: float = 0.9,
    training_mode: int = 0, spatial: int = 1, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """X less its mean over its deviation, times scale plus bias, by channel; in training also the new mean and var."""
    used_mean, used_var = mean, var
    if training_mode:
        axes = [0, *range(2, x.dim())]
        used_mean, used_var = x.mean(axes), x.var(axes, unbiased=False)
    y = (x - along(used_mean, x)) / torch.sqrt(along(used_var, x) + epsilon) * along(scale, x) + along(bias, x)
    new = (mean * momentum + used_mean * (1 - momentum), var * momentum + used_var * (1 - momentum))
    return (y.to(x.dtype), *new)[:outputs]


def constants(b: Builder, node: Node, first: int = 1) -> list[Constant] | None:
    """Inputs from `first` on, when the first is computed and all of these are constant floats."""
    values = b.inputs(node)
    rest = [v for v in values[first:] if v is not None]
    fine = all(isinstance(v, Constant) and v.tensor.is_floating_point() for v in rest)
    return rest if isinstance(values[0], fx.Node) and fine else None


@builds("BatchNormalization")
def _batch_norm(b: Builder, node: Node) -> Any:
    given, dimensions = constants(b, node), b.shape(node.inputs[0])
    rank = len(dimensions) if dimensions else 0
    if given is None or node.facts.get("training_mode") or len(node.outputs) > 1 or rank not in BATCH:
        return NotImplemented
    scale, bias, mean, var = given
    layer = BATCH[rank](len(scale.tensor), node.facts.get("epsilon", 1e-5), 1 - node.facts.get("momentum", 0.9))
    layer.weight, layer.bias = b.parameter(scale), b.parameter(bias)
    layer.running_mean, layer.running_var = mean.tensor.clone(), var.tensor.clone()
    return [b.layer(layer, b.place(node, scale, bias), b.get(node.inputs[0]))]


@runs("LayerNormalization")
def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1,
    outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """X less its mean over its deviation along the axes from `axis` on, times scale plus bias; mean, 1 / deviation."""
    axes = list(range(axis + x.dim() if axis < 0 else axis, x.dim()))
    wide = x.to(dtype_of(stash_type))
    mean = wide.mean(axes, keepdim=True)
    inverse = torch.rsqrt(((wide - mean) ** 2).mean(axes, keepdim=True) + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias, mean, inverse)[:outputs]


@builds("LayerNormalization")
def _layer_norm(b: Builder, node: Node) -> Any:
    given, dimensions = constants(b, node), b.shape(node.inputs[0])
    if given is None or dimensions is None or len([o for o in node.outputs if o]) > 1:
        return NotImplemented
    axis, shape = node.facts.get("axis", -1), list(given[0].tensor.shape)
    axis = axis + len(dimensions) if axis < 0 else axis
    if len(shape) != len(dimensions) - axis or any(list(g.tensor.shape) != shape for g in given):
        return NotImplemented
    if any(isinstance(d, int) and d != s for d, s in zip(dimensions[axis:], shape, strict=True)):
        return NotImplemented
    with torch.device("meta"):
        layer = nn.LayerNorm(shape, node.facts.get("epsilon", 1e-5), bias=len(given) > 1)
    layer.weight = b.parameter(given[0])
    if len(given) > 1:
        layer.bias = b.parameter(given[1])
    return [b.layer(layer, b.place(node, *given), b.get(node.inputs[0]))]


@runs("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(x: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """X over the root of its mean square along the axes from `axis` on, times scale."""
    axes = list(range(axis + x.dim() if axis < 0 else axis, x.dim()))
    wide = x.to(dtype_of(stash_type))
    return (wide * torch.rsqrt((wide**2).mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


@builds("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(b: Builder, node: Node) -> Any:
    given, dimensions = constants(b, node), b.shape(node.inputs[0])
    if given is None or dimensions is None or len([o for o in node.outputs if o]) > 1:
        return NotImplemented
    axis, shape = node.facts.get("axis", -1), list(given[0].tensor.shape)
    if shape != dimensions[axis:] or given[0].tensor.dtype != torch.float32:
        return NotImplemented
    with torch.device("meta"):
        layer = nn.RMSNorm(shape, node.facts.get("epsilon", 1e-5))
    layer.weight = b.parameter(given[0])
    return b.layer(layer, b.place(node, *given), b.get(node.inputs[0]))


@runs("InstanceNormalization")
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """X less its mean over its deviation, by example and channel, times scale plus bias."""
    axes = list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) * torch.rsqrt(var + epsilon) * along(scale, x) + along(bias, x)


@builds("InstanceNormalization")
def _instance_norm(b: Builder, node: Node) -> Any:
    given, dimensions = constants(b, node), b.shape(node.inputs[0])
    if given is None or dimensions is None or len(dimensions) not in INSTANCE:
        return NotImplemented
    scale, bias = given
    layer = INSTANCE[len(dimensions)](len(scale.tensor), node.facts.get("epsilon", 1e-5), affine=True)
    layer.weight, layer.bias = b.parameter(scale), b.parameter(bias)
    return b.layer(layer, b.place(node, scale, bias), b.get(node.inputs[0]))


@runs("GroupNormalization")
def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalised by groups of channels; scale and bias by channel (opset 21), or by group (opset 18)."""
    if len(scale) != x.shape[1]:
        scale = scale.repeat_interleave(x.shape[1] // num_groups)
        bias = bias.repeat_interleave(x.shape[1] // num_groups)
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@builds("GroupNormalization")
def _group_norm(b: Builder, node: Node) -> Any:
    given, dimensions = constants(b, node), b.shape(node.inputs[0])
    if given is None or dimensions is None or len(dimensions) < 2 or dimensions[1] != len(given[0].tensor):
        return NotImplemented
    with torch.device("meta"):
        layer = nn.GroupNorm(node.facts["num_groups"], len(given[0].tensor), node.facts.get("epsilon", 1e-5))
    layer.weight, layer.bias = b.parameter(given[0]), b.parameter(given[1])
    return b.layer(layer, b.place(node, *given), b.get(node.inputs[0]))


@runs("LRN")
def local_response(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """X over a power of the mean square of its neighbour channels."""
    squares = F.pad((x * x).movedim(1, -1), ((size - 1) // 2, size - 1 - (size - 1) // 2))
    total = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (bias + alpha / size * total) ** beta


@runs("MeanVarianceNormalization")
def mean_variance(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """X less its mean over its deviation."""
    axes = [0, 2, 3] if axes is None else axes
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / (torch.sqrt((x * x).mean(axes, keepdim=True) - mean * mean) + 1e-9)
