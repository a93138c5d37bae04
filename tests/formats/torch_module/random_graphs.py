"""Random ONNX graphs of a seed: convolutions, norms, residuals, slices, attention, recurrences; any batch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = (13, 16, 17, 18, 20, 21, 23)


class Graph:
    """Draws a graph; the same seed draws the same one for every batch."""

    def __init__(self, seed: int, batch: int | str) -> None:
        self.random = np.random.default_rng(seed)
        self.batch = batch
        self.opset = int(self.random.choice(OPSETS))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    # parts

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def weight(self, *shape: int, scale: float | None = None, shift: float = 0.0) -> str:
        scale = 1 / math.sqrt(max(1, math.prod(shape[1:]))) if scale is None else scale
        return self.constant((self.random.standard_normal(shape) * scale + shift).astype(np.float32), "weight")

    def constant(self, value: Any, what: str = "constant") -> str:
        name = f"part{len(self.weights)}.{what}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "shape")

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **facts: Any) -> Any:
        names = [f"{kind.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, f"{kind}_{len(self.nodes)}", domain=domain, **facts))
        return names[0] if outputs == 1 else names

    def shape(self, x: str, *tail: int) -> str:
        """A shape [batch, *tail] of a reshape: a constant, or read off x when the batch is named."""
        if isinstance(self.batch, int):
            return self.ints(self.batch, *tail)
        first = self.op("Gather", self.op("Shape", x), self.constant(np.array([0], np.int64)), axis=0)
        return self.op("Concat", first, self.ints(*tail), axis=0)

    def reduce(self, kind: str, x: str, axes: list[int], keepdims: int = 1) -> str:
        if self.opset >= 18:
            return self.op(kind, x, self.ints(*axes), keepdims=keepdims)
        return self.op(kind, x, axes=axes, keepdims=keepdims)

    # blocks of pictures x [batch, c, h, w]

    def conv(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        kind = self.pick("plain", "grouped", "depthwise", "wide", "uneven", "auto", "strided")
        group = {"grouped": self.pick(2, 4), "depthwise": c}.get(kind, 1)
        out = c if kind == "depthwise" else 4 * int(self.random.integers(1, 5))
        k = self.pick(1, 3)
        facts: dict[str, Any] = {"group": group, "kernel_shape": [k, k], "pads": [k // 2] * 4}
        if kind == "wide":
            facts |= {"dilations": [2, 2], "pads": [2 * (k // 2)] * 4}
        if kind == "uneven":
            facts |= {"pads": [0, 1, k - 1, k - 2 if k > 1 else 0]}
            h, w = h + (k - 1) - (k - 1), w + 1 + facts["pads"][3] - (k - 1)
        if kind == "auto":
            facts.pop("pads")
            facts |= {"auto_pad": self.pick("SAME_UPPER", "SAME_LOWER"), "strides": [2, 2]}
            h, w = -(-h // 2), -(-w // 2)
        if kind == "strided" and h > 4:
            facts |= {"strides": [2, 2]}
            h, w = (h + 2 * (k // 2) - k) // 2 + 1, (w + 2 * (k // 2) - k) // 2 + 1
        more = [self.weight(out, scale=0.1)] if self.pick(True, False) else []
        return self.op("Conv", x, self.weight(out, c // group, k, k), *more, **facts), out, h, w

    def transposed(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        if h > 10:
            return x, c, h, w
        out, extra = 4, self.pick(0, 1)
        facts = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "output_padding": [extra] * 2}
        y = self.op("ConvTranspose", x, self.weight(c, out, 3, 3), self.weight(out), **facts)
        return y, out, 2 * h - 1 + extra, 2 * w - 1 + extra

    def norm(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        kind = self.pick("batch", "instance", "group", "layer")
        scale, bias = self.weight(c, scale=0.1, shift=1), self.weight(c, scale=0.1)
        if kind == "instance" and h * w > 1:
            return self.op("InstanceNormalization", x, scale, bias, epsilon=1e-3), c, h, w
        if kind == "group" and self.opset >= 21 and h * w > 1:
            return self.op("GroupNormalization", x, scale, bias, num_groups=2, epsilon=1e-3), c, h, w
        if kind == "layer" and self.opset >= 17:
            parts = [self.weight(c, h, w, scale=0.1, shift=1), self.weight(c, h, w, scale=0.1)]
            return self.op("LayerNormalization", x, *parts, axis=1), c, h, w
        variance = self.constant(self.random.uniform(0.5, 2, c).astype(np.float32), "var")
        return self.op("BatchNormalization", x, scale, bias, self.weight(c, scale=0.1), variance), c, h, w

    def activation(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        kind = self.pick("Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Clip", "Elu", "swish", "HardSigmoid", "PRelu")
        if kind == "Clip":
            return self.op("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6))), c, h, w
        if kind == "swish":
            return self.op("Mul", x, self.op("Sigmoid", x)), c, h, w
        more = [self.weight(c, 1, 1, scale=0.1)] if kind == "PRelu" else []
        return self.op(kind if kind != "HardSwish" or self.opset >= 14 else "Tanh", x, *more), c, h, w

    def pool(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        if h < 4 or w < 4:
            return x, c, h, w
        kind, ceil = self.pick("MaxPool", "AveragePool"), self.pick(0, 1)
        more = {"count_include_pad": self.pick(0, 1)} if kind == "AveragePool" else {}
        pad = self.pick(0, 1)
        y = self.op(kind, x, kernel_shape=[3, 3], strides=[2, 2], pads=[pad] * 4, ceil_mode=ceil, **more)

        def size(n: int) -> int:
            room = n + 2 * pad - 3
            steps = -(-room // 2) if ceil else room // 2
            return steps + (0 if ceil and steps * 2 >= n + pad else 1)

        return y, c, size(h), size(w)

    def residual(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        y = self.op("Conv", x, self.weight(c, c, 3, 3), self.weight(c), kernel_shape=[3, 3], pads=[1] * 4)
        return self.op("Add", self.op("Relu", y), x), c, h, w

    def joined(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        a = self.op("Conv", x, self.weight(4, c, 1, 1))
        b = self.op("Conv", x, self.weight(8, c, 3, 3), kernel_shape=[3, 3], pads=[1] * 4)
        return self.op("Concat", a, b, axis=self.pick(1, -3)), 12, h, w

    def cut(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        if c % 8 == 0 and self.pick(True, False):
            more = {"num_outputs": 2} if self.opset >= 18 else {}
            a, b = self.op("Split", x, outputs=2, axis=1, **more)
            return self.op("Mul", a, self.op("Sigmoid", b)), c // 2, h, w
        if h > 4 and w > 4:
            return (
                self.op("Slice", x, self.ints(1, 0), self.ints(2**31, -1), self.ints(2, 3), self.ints(1, 1)),
                c,
                h - 1,
                w - 1,
            )
        a, b = self.op("Split", x, self.ints(1, c - 1), outputs=2, axis=1)
        return self.op("Concat", b, a, axis=1), c, h, w

    def squeeze_excite(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        y = self.op("GlobalAveragePool", x) if self.pick(True, False) else self.reduce("ReduceMean", x, [2, 3])
        y = self.op("Relu", self.op("Conv", y, self.weight(4, c, 1, 1), self.weight(4)))
        return self.op("Mul", x, self.op("Sigmoid", self.op("Conv", y, self.weight(c, 4, 1, 1)))), c, h, w

    def shuffled(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        y = self.op("Reshape", x, self.shape(x, 2, c // 2, h, w))
        y = self.op("Transpose", y, perm=[0, 2, 1, 3, 4])
        return self.op("Reshape", y, self.shape(y, c, h, w)), c, h, w

    def resized(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        if h > 10 or w > 10:
            return x, c, h, w
        mode = self.pick("nearest", "linear", "cubic")
        way = self.pick("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        more = {"nearest_mode": self.pick("floor", "round_prefer_floor", "ceil")} if mode == "nearest" else {}
        y = self.op("Resize", x, "", scales, mode=mode, coordinate_transformation_mode=way, **more)
        return y, c, 2 * h, 2 * w

    def padded(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        mode = self.pick("constant", "reflect", "edge")
        if h < 3 or w < 3:
            mode = "constant"
        return self.op("Pad", x, self.ints(0, 0, 1, 2, 0, 0, 0, 1), mode=mode), c, h + 1, w + 3

    def pixels(self, x: str, c: int, h: int, w: int) -> tuple[str, int, int, int]:
        if h > 10:
            return x, c, h, w
        return self.op("DepthToSpace", x, blocksize=2, mode=self.pick("DCR", "CRD")), c // 4, 2 * h, 2 * w

    # blocks of tokens x [batch, l, d]

    def linear(self, x: str, k: int, n: int) -> str:
        y = self.op("MatMul", x, self.weight(k, n, scale=1 / math.sqrt(k)))
        bias = self.weight(n, scale=0.1)
        return self.op("Add", *self.pick((y, bias), (bias, y)))

    def tokens_norm(self, x: str, d: int) -> str:
        scale, bias = self.weight(d, scale=0.1, shift=1), self.weight(d, scale=0.1)
        if self.opset >= 23 and self.pick(True, False):
            return self.op("RMSNormalization", x, scale, axis=-1, epsilon=1e-5)
        if self.opset >= 17 and self.pick(True, False):
            return self.op("LayerNormalization", x, scale, bias, axis=-1)
        centred = self.op("Sub", x, self.reduce("ReduceMean", x, [-1]))
        square = self.op("Pow", centred, self.constant(np.float32(2)))
        variance = self.op("Add", self.reduce("ReduceMean", square, [-1]), self.constant(np.float32(1e-5)))
        y = self.op("Div", centred, self.op("Sqrt", variance))
        return self.op("Add", self.op("Mul", y, scale), bias)

    def attention(self, x: str, length: int, d: int) -> str:
        heads = 4
        q, k, v = (self.linear(x, d, d) for _ in range(3))
        if self.opset >= 23 and self.pick(True, False):
            y = self.op("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads, is_causal=self.pick(0, 1))
            return self.op("Add", x, self.linear(y, d, d))
        parts = []
        for one, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3])):
            length_or_any = self.pick(length, -1)
            parts.append(
                self.op(
                    "Transpose", self.op("Reshape", one, self.shape(one, length_or_any, heads, d // heads)), perm=perm
                )
            )
        scores = self.op("Div", self.op("MatMul", parts[0], parts[1]), self.constant(np.float32(math.sqrt(d // heads))))
        if self.pick(True, False):
            mask = np.triu(np.full((length, length), -1e9, np.float32), 1)
            scores = self.op("Add", scores, self.constant(mask))
        y = self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=-1), parts[2]), perm=[0, 2, 1, 3])
        y = self.op("Reshape", y, self.shape(y, length, d))
        return self.op("Add", x, self.linear(y, d, d))

    def mlp(self, x: str, length: int, d: int) -> str:
        y = self.linear(self.tokens_norm(x, d), d, 2 * d)
        if self.opset >= 20 and self.pick(True, False):
            y = self.op("Gelu", y, approximate=self.pick("none", "tanh"))
        else:
            half = self.op("Mul", y, self.constant(np.float32(0.5)))
            erf = self.op("Erf", self.op("Div", y, self.constant(np.float32(math.sqrt(2)))))
            y = self.op("Mul", half, self.op("Add", erf, self.constant(np.float32(1))))
        return self.op("Add", x, self.linear(y, 2 * d, d))

    def recurrent(self, x: str, length: int, d: int) -> str:
        kind = self.pick("LSTM", "GRU", "RNN")
        gates, way = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], self.pick("forward", "reverse", "bidirectional")
        ways = 2 if way == "bidirectional" else 1
        hidden = d // ways
        more = {"linear_before_reset": self.pick(0, 1)} if kind == "GRU" else {}
        y = self.op("Transpose", x, perm=[1, 0, 2])
        weights = [self.weight(ways, gates * hidden, k, scale=0.2) for k in (d, hidden)]
        bias = self.weight(ways, 2 * gates * hidden, scale=0.1)
        y = self.op(kind, y, *weights, bias, hidden_size=hidden, direction=way, **more)
        y = self.op("Transpose", y, perm=[2, 0, 1, 3])
        return self.op("Reshape", y, self.shape(y, length, d))

    def folded(self, x: str, length: int, d: int) -> str:
        """Batch and length as one axis, as frozen exports of Linear do."""
        if isinstance(self.batch, int):
            y = self.op("Reshape", x, self.ints(self.batch * length, d))
        else:
            y = self.op("Reshape", x, self.ints(-1, d))
        y = self.op("Gemm", y, self.weight(d, d), self.weight(d), transB=1)
        return self.op("Reshape", y, self.shape(x, length, d))

    # the whole

    def model(self) -> onnx.ModelProto:
        x, c, h, w = "x", 8, 12, 12
        blocks: list[Callable] = [
            self.conv, self.conv, self.transposed, self.norm, self.activation, self.pool, self.residual, self.joined,
            self.cut, self.squeeze_excite, self.shuffled, self.resized, self.padded, self.pixels,
        ]  # fmt: skip
        for _ in range(int(self.random.integers(3, 8))):
            x, c, h, w = self.pick(*blocks)(x, c, h, w)
            if c % 4:
                x, c = self.op("Conv", x, self.weight(8, c, 1, 1)), 8
        if h * w > 64:
            k = [max(1, h // 4), max(1, w // 4)]
            x = self.op("MaxPool", x, kernel_shape=k, strides=k)
            h, w = h // k[0], w // k[1]
        x, c = self.op("Conv", x, self.weight(16, c, 1, 1)), 16
        length = h * w
        x = self.op("Transpose", self.op("Reshape", x, self.shape(x, 16, length)), perm=[0, 2, 1])
        for _ in range(int(self.random.integers(1, 4))):
            x = self.pick(self.attention, self.mlp, self.recurrent, self.folded)(x, length, 16)
        end = self.pick("mean", "first", "flat")
        if end == "mean":
            y, width = self.reduce("ReduceMean", x, [1], 0), 16
        elif end == "first":
            y, width = self.op("Gather", x, self.constant(np.array(0, np.int64)), axis=1), 16
        else:
            y, width = self.op("Flatten", x, axis=1), length * 16
        y = self.op("Gemm", y, self.weight(5, width), self.weight(5), transB=1)
        return self.proto(y, [self.batch, 5])

    def proto(self, output: str, shape: list) -> onnx.ModelProto:
        ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, 8, 12, 12])]
        out = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "random", ends, out, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
