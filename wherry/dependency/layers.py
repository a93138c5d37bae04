"""Rules of layers: convolutions, norms, attention, pooling, tables."""

import numpy as np

from wherry.dependency.flow import Flow
from wherry.dependency.record import Op, Value
from wherry.dependency.rules import rule, same


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(flow: Flow, op: Op) -> None:
    """Outputs are the weight's first dimension, inputs its second; turned round where it is transposed.

    Groups go as a whole: lanes of one group of inputs, with its outputs. In a depthwise convolution that is a channel.
    """
    x, w = op.args[:2]
    out, bias = op.outputs[0], op.args[2]
    transposed, groups = op.given("transposed", "groups")
    flow.tie(x, 0, out, 0)
    inner, outer = (0, 1) if transposed else (1, 0)
    if isinstance(bias, Value):
        flow.tie(bias, 0, out, 1)
    if groups == 1:
        flow.tie(x, 1, w, inner)
        flow.tie(w, outer, out, 1)
        return
    inputs, outputs = x.shape[1], out.shape[1]
    flow.together(x, 1, np.arange(inputs) // (inputs // groups))
    flow.together(out, 1, np.arange(outputs) // (outputs // groups))
    flow.tie(x, 1, out, 1, np.arange(inputs) // (inputs // groups) * (outputs // groups))
    if transposed:  # [inputs, outputs / groups]
        flow.tie(x, 1, w, 0)
    else:  # [outputs, inputs / groups]
        flow.tie(w, 0, out, 1)
    flow.pin(w, 1, f"{op} has {groups} groups of that width")


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm",
      "batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "miopen_batch_norm")  # fmt: skip
def batch_norm(flow: Flow, op: Op) -> None:
    """One scale, bias, mean and variance for each channel."""
    x, out = op.args[0], op.outputs[0]
    same(flow, x, out)
    for value in op.values[1:]:
        if value.rank == 1 and x.rank > 1 and value.shape[0] == x.shape[1]:
            flow.tie(value, 0, out, 1)


@rule("native_group_norm", "group_norm")
def group_norm(flow: Flow, op: Op) -> None:
    """Channels of one group are measured together, so they go together."""
    x, out = op.args[0], op.outputs[0]
    groups = op.given("group" if op.name.startswith("native") else "num_groups")[0]
    same(flow, x, out)
    flow.together(out, 1, np.arange(x.shape[1]) // (x.shape[1] // groups))
    for value in op.args[1:3]:
        if isinstance(value, Value):
            flow.tie(value, 0, out, 1)
    for value in op.outputs[1:]:
        flow.handled |= {flow.key(value, d) for d in range(value.rank)}


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", "fused_rms_norm")
def layer_norm(flow: Flow, op: Op) -> None:
    """Measured over the last dimensions: with fewer lanes these are other numbers."""
    x, out = op.args[0], op.outputs[0]
    same(flow, x, out)
    shape = op.args[1]
    for value in op.args[2:4]:
        if isinstance(value, Value):
            for d in range(value.rank):
                flow.tie(value, d, out, out.rank - value.rank + d)
    for d in range(out.rank - len(shape), out.rank):
        flow.note(out, d, f"{op} measures over it")
    for value in op.outputs[1:]:
        same(flow, x, value)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(flow: Flow, op: Op) -> None:
    """Q [batch, heads, n, d], k and v [batch, groups, m, d]: heads over one group of keys go with it."""
    q, k, v = op.args[:3]
    out = op.outputs[0]
    for d in range(q.rank - 3):
        flow.tie(q, d, out, d)
        flow.tie(k, d, out, d)
        flow.tie(v, d, out, d)
    heads, groups = q.shape[-3], k.shape[-3]
    flow.tie(k, k.rank - 3, v, v.rank - 3)
    flow.tie(q, q.rank - 3, out, out.rank - 3)
    if heads == groups:
        flow.tie(q, q.rank - 3, k, k.rank - 3)
    else:
        each = np.arange(heads) // (heads // groups)
        labels = flow.labels(q, q.rank - 3)
        if flow.labels(k, k.rank - 3) is not None or labels is None or not _within(labels, groups):
            flow.tie(q, q.rank - 3, k, k.rank - 3, each)
    flow.tie(q, q.rank - 2, out, out.rank - 2)
    flow.tie(k, k.rank - 2, v, v.rank - 2)
    flow.tie(v, v.rank - 1, out, out.rank - 1)
    flow.tie(q, q.rank - 1, k, k.rank - 1)
    flow.note(q, q.rank - 1, f"{op} sums products of activations over it")
    for mask in [a for a in [*op.args[3:], *op.kwargs.values()] if isinstance(a, Value)]:
        if mask.rank >= 3 and mask.shape[-3] == heads and heads > 1:
            flow.tie(mask, mask.rank - 3, out, out.rank - 3)


def _within(labels: np.ndarray, groups: int) -> bool:
    """Whether every group holds the same labels: then a head goes from each group, and the keys stay."""
    table = labels.reshape(groups, -1)
    return bool((table == table[:1]).all())


@rule(
    "avg_pool2d", "max_pool2d_with_indices", "max_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
    "adaptive_max_pool2d", "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "avg_pool3d", "adaptive_avg_pool3d",
    "_adaptive_avg_pool3d", "max_pool3d_with_indices", "upsample_nearest2d", "upsample_bilinear2d",
    "upsample_nearest1d",
    "upsample_bicubic2d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "reflection_pad2d",
    "replication_pad2d", "reflection_pad1d", "replication_pad1d", "grid_sampler_2d", "im2col", "upsample_linear1d",
)  # fmt: skip
def spatial(flow: Flow, op: Op) -> None:
    """Works on the last dimensions of each channel alone. im2col spreads a channel over several."""
    x = op.args[0]
    for out in op.outputs:
        flow.tie(x, 0, out, 0)
        if op.name == "im2col":
            flow.tie(out, 1, x, 1, np.arange(out.shape[1]) // (out.shape[1] // x.shape[1]))
        else:
            flow.tie(x, 1, out, 1)


@rule("pixel_shuffle", "pixel_unshuffle")
def shuffle(flow: Flow, op: Op) -> None:
    """Channels in blocks become pixels, or the other way round."""
    x, out = op.args[0], op.outputs[0]
    flow.tie(x, 0, out, 0)
    small, large = (out, x) if op.name == "pixel_shuffle" else (x, out)
    each = large.shape[-3] // small.shape[-3]
    flow.tie(large, large.rank - 3, small, small.rank - 3, np.arange(large.shape[-3]) // each)


@rule("embedding")
def embedding(flow: Flow, op: Op) -> None:
    """Rows of a table by number."""
    table, ids = op.args[:2]
    out = op.outputs[0]
    flow.tie(table, 1, out, out.rank - 1)
    for d in range(ids.rank):
        flow.tie(ids, d, out, d)
