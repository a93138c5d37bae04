"""Operators of com.microsoft, which have no cases of their own, against ONNX Runtime."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from wherry.formats.onnx.torch_module import module

R = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return R.standard_normal(shape).astype(np.float32)


def u8(*shape: int) -> np.ndarray:
    return R.integers(0, 256, shape).astype(np.uint8)


def s(value: float) -> np.ndarray:
    return np.float32(value) * np.ones((), np.float32)


def z(value: int) -> np.ndarray:
    return np.array(value, np.uint8)


ANGLES = np.outer(np.arange(16), 1 / 100 ** (np.arange(4) / 4))
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)
WIDE_COS, WIDE_SIN = np.repeat(COS, 2, 1), np.repeat(SIN, 2, 1)
LENGTHS = [np.array([4, 4], np.int32), np.array(5, np.int32), WIDE_COS, WIDE_SIN]
KEYS = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
PLACES = np.tile(np.arange(5), (2, 1))
WORDS, STEPS = R.integers(0, 9, (2, 5)).astype(np.int32), R.integers(-99, 99, 5).astype(np.int32)
# name -> (operator, inputs, attributes, how many of the outputs)
CASES: dict[str, tuple[str, list, dict[str, Any], int]] = {
    "gelu": ("Gelu", [f(2, 5)], {}, 1),
    "fast gelu": ("FastGelu", [f(2, 5), f(5)], {}, 1),
    "bias gelu": ("BiasGelu", [f(2, 5), f(5)], {}, 1),
    "quick gelu": ("QuickGelu", [f(2, 5)], {"alpha": 1.702}, 1),
    "fused matmul": ("FusedMatMul", [f(2, 3, 4), f(2, 5, 4)], {"alpha": 0.5, "transB": 1}, 1),
    "fused gemm": ("FusedGemm", [f(2, 3), f(3, 4), f(4)], {"activation": "Relu"}, 1),
    "fused conv": ("FusedConv", [f(1, 4, 6, 6), f(4, 4, 3, 3), f(4)], {"activation": "Relu", "pads": [1] * 4}, 1),
    "skip layer norm": ("SkipLayerNormalization", [f(2, 5, 8), f(2, 5, 8), f(8), f(8), f(8)], {"epsilon": 1e-5}, 1),
    "skip rms norm": ("SkipSimplifiedLayerNormalization", [f(2, 5, 8), f(2, 5, 8), f(8)], {"epsilon": 1e-5}, 1),
    "embed": (
        "EmbedLayerNormalization",
        [WORDS, np.zeros((2, 5), np.int32), f(9, 8), f(16, 8), f(2, 8), f(8), f(8), KEYS],
        {"epsilon": 1e-5}, 2,
    ),
    "rotary": ("RotaryEmbedding", [f(2, 5, 16), PLACES, COS, SIN], {}, 1),
    "rotary interleaved": ("RotaryEmbedding", [f(2, 5, 16), PLACES, COS, SIN], {"interleaved": 1}, 1),
    "heads": ("MultiHeadAttention", [f(2, 5, 16), f(2, 5, 16), f(2, 5, 16)], {"num_heads": 2}, 1),
    "heads, bias and mask": (
        "MultiHeadAttention", [f(2, 5, 16), f(2, 5, 16), f(2, 5, 16), f(48), KEYS], {"num_heads": 2}, 1
    ),
    "packed": ("Attention", [f(2, 5, 16), f(16, 48), f(48), KEYS], {"num_heads": 2}, 1),
    "packed causal": ("Attention", [f(2, 5, 16), f(16, 48), f(48)], {"num_heads": 2, "unidirectional": 1}, 1),
    "grouped": (
        "GroupQueryAttention",
        [f(2, 5, 64), f(2, 5, 32), f(2, 5, 32), f(2, 2, 0, 16), f(2, 2, 0, 16), *LENGTHS],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}, 3,
    ),
    "grouped with past": (
        "GroupQueryAttention",
        [f(2, 1, 64), f(2, 1, 32), f(2, 1, 32), f(2, 2, 4, 16), f(2, 2, 4, 16), *LENGTHS],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}, 3,
    ),
    "matmul bits 4": (
        "MatMulNBits", [f(2, 3, 64), u8(6, 2, 16), f(12) / 9], {"K": 64, "N": 6, "bits": 4, "block_size": 32}, 1
    ),
    "matmul bits 8, zeros": (
        "MatMulNBits", [f(2, 3, 64), u8(6, 2, 32), f(12) / 99, u8(12)],
        {"K": 64, "N": 6, "bits": 8, "block_size": 32}, 1,
    ),
    "matmul bits 4, zeros": (
        "MatMulNBits", [f(2, 3, 48), u8(6, 3, 8), f(18) / 9, u8(12)], {"K": 48, "N": 6, "bits": 4, "block_size": 16}, 1
    ),
    "gather bits 4": (
        "GatherBlockQuantized", [u8(9, 16), R.integers(0, 9, (2, 3)), f(9, 2)], {"bits": 4, "block_size": 16}, 1
    ),
    "q add": ("QLinearAdd", [u8(2, 5), s(0.1), z(9), u8(2, 5), s(0.2), z(99), s(0.3), z(80)], {}, 1),
    "q mul": ("QLinearMul", [u8(2, 5), s(0.1), z(9), u8(2, 5), s(0.2), z(99), s(3), z(80)], {}, 1),
    "q sigmoid": ("QLinearSigmoid", [u8(2, 5), s(0.05), z(120), s(1 / 256), z(0)], {}, 1),
    "q mean": ("QLinearGlobalAveragePool", [u8(2, 4, 3, 3), s(0.1), z(9), s(0.1), z(20)], {"channels_last": 0}, 1),
    "q concat": ("QLinearConcat", [s(0.3), z(50), u8(2, 3), s(0.1), z(9), u8(2, 4), s(0.2), z(99)], {"axis": 1}, 1),
    "q gemm": ("QGemm", [u8(2, 8), s(0.1), z(9), u8(8, 5), s(0.02), z(128), STEPS, s(0.5), z(90)], {}, 1),
    "dynamic matmul": ("DynamicQuantizeMatMul", [f(2, 8), u8(8, 5), s(0.02), z(128), f(5)], {}, 1),
    "integers to float": ("MatMulIntegerToFloat", [u8(2, 8), u8(8, 5), s(0.1), s(0.02), z(9), z(128), f(5)], {}, 1),
}  # fmt: skip


@pytest.mark.parametrize("constant", [False, True], ids=["inputs", "constants"])
@pytest.mark.parametrize("name", CASES)
def test_equals_onnxruntime(name: str, constant: bool) -> None:
    """With all inputs given at run time, and with all but the first in the file (layers, folded codes)."""
    kind, inputs, facts, count = CASES[name]
    names, outs = [f"i{i}" for i in range(len(inputs))], [f"o{i}" for i in range(count)]
    kept = names if not constant else names[:1] if name not in ("gather bits 4", "q concat") else names[1:2]
    fixed = [i for i in names if i not in kept]
    graph = helper.make_graph(
        [helper.make_node(kind, names, outs, domain="com.microsoft", **facts)], "one",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
         for n, x in zip(names, inputs, strict=True) if n in kept],
        [helper.make_empty_tensor_value_info(o) for o in outs],
        [numpy_helper.from_array(np.asarray(x), n) for n, x in zip(names, inputs, strict=True) if n in fixed],
    )  # fmt: skip
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    feeds = {n: np.asarray(x) for n, x in zip(names, inputs, strict=True) if n in kept}
    wanted = onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)
    with torch.no_grad():
        got = module(onnx.ModelProto.FromString(proto.SerializeToString()))(*map(torch.from_numpy, feeds.values()))
    for one, other in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
        if one.dtype == torch.uint8:  # codes: ONNX Runtime's own kernels take a table or another order
            assert np.abs(one.numpy().astype(int) - other.astype(int)).max() <= 1
        else:
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=2e-5 * max(1, np.abs(other).max()))
