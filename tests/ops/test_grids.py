"""Grids that are no plain integers: against torch's floats, compressed-tensors' decompressors, gguf's dequantizers."""

import ctypes
import sys

import numpy as np
import pytest
import torch
import xllamacpp  # noqa: F401
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from wherry.errors import BadInput, Unsupported
from wherry.formats.gguf.blocks import pack as block_pack
from wherry.levels import levels
from wherry.ops import grid, kquant, layout
from wherry.recipe import build
from wherry.scheme import PRESETS, QTensor, Scheme

K = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
OTHER = ["W1A16", "W2A16_BINARY", "W3A16_BINARY", "W1.58A16", "FP8A16", "FP8_E5M2A16", "FP4A16", "NF4", "NVFP4A16"]
ALL = [*K, *OTHER, "MXFP4A16", "W5A16", "W6A16_ASYM"]


def rtn(name: str, w: torch.Tensor) -> QTensor:
    return build("rtn", {"scheme": name}).solve(w)


def weight(n: int = 24, k: int = 512, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.StudentT(5.0).sample((n, k)) * 0.03


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_levels_are_all_finite_values_of_the_dtype(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = every[torch.isfinite(every)].unique()
    assert finite.tolist() == list(levels(name))


@pytest.mark.parametrize("name", ALL)
def test_decoding_then_encoding_changes_nothing(name: str) -> None:
    q = rtn(name, weight())
    again = grid.encode(q.decode(), q.scheme, q.scale, q.zero)
    torch.testing.assert_close(again.decode(), q.decode(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_layout_keeps_every_bit(name: str) -> None:
    q = rtn(name, weight())
    back = layout.whole(layout.parts(q), q.scheme)
    assert torch.equal(back.decode(), q.decode())
    assert torch.equal(layout.whole(layout.parts(back), q.scheme).decode(), q.decode())
    held = sum(t.numel() * t.element_size() for key, t in layout.parts(q).items() if key != "weight_shape")
    assert held <= q.scheme.bytes((24, 512), 4 if q.scheme.bits > 4 else 2) * 1.01 + 8


@pytest.mark.parametrize("name", ALL)
def test_every_solver_fills_every_grid(name: str) -> None:
    """GPTQ is better than rounding on correlated inputs, searched ranges are not worse; all stay on the grid."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(800, 64, generator=g) @ torch.randn(64, 256, generator=g) + 0.1 * torch.randn(800, 256, generator=g)
    w = weight(32, 256)
    plain = rtn(name, w)
    for method in ("gptq", "gptaq"):
        step = build(method, {"scheme": name})
        q = step.solve(w, step.observe(None, x, *([x] if method == "gptaq" else [])))
        assert float(((q.decode() - w) @ x.T).norm()) < float(((plain.decode() - w) @ x.T).norm())
        assert torch.equal(layout.whole(layout.parts(q), q.scheme).decode(), q.decode())
    searched = grid.encode(w, plain.scheme, *grid.search(w, plain.scheme, step.rounding))
    assert float((searched.decode() - w).norm()) <= float((plain.decode() - w).norm()) * 1.02


def test_more_planes_are_better_and_least_squares_beats_greedy() -> None:
    w = weight(16, 256)
    names = ("W1A16", "W2A16_BINARY", "W3A16_BINARY")
    errors = [float((rtn(name, w).decode() - w).norm() / w.norm()) for name in names]
    assert errors == sorted(errors, reverse=True)
    greedy, rest = torch.zeros_like(w).reshape(16, 2, 128), w.reshape(16, 2, 128)
    for _ in range(2):
        sign = torch.where(rest >= 0, 1.0, -1.0)
        greedy = greedy + rest.abs().mean(-1, keepdim=True) * sign
        rest = w.reshape(16, 2, 128) - greedy
    assert errors[1] < float(rest.norm() / w.norm())


def test_one_plane_is_xnor_net() -> None:
    w = weight(8, 128)
    want = w.abs().mean(-1, keepdim=True) * torch.where(w >= 0, 1.0, -1.0)
    torch.testing.assert_close(rtn("W1A16", w).decode(), want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32", "fp8", "e8m0"])
@pytest.mark.parametrize("name", ["W4A16_ASYM", "W8A16", "NF4", "W2A16_BINARY"])
def test_scales_are_of_the_kind_that_was_asked_for(name: str, kind: str) -> None:
    """Each is a number of its type by torch's own dtypes, lies on disk in its bytes, and every solver keeps it so."""
    scheme = Scheme.parse(f"{name},group_size=32,scale={kind}")
    assert Scheme.parse(str(scheme)) == scheme
    w = weight(16, 128)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=g) @ torch.randn(32, 128, generator=g)
    for method in ("rtn", "gptq"):
        step = build(method, {"scheme": name, "group_size": 32, "scale": kind})
        assert step.scheme == scheme
        q = step.solve(w, step.observe(None, x)) if method == "gptq" else step.solve(w)
        if kind == "e8m0":
            assert (torch.frexp(q.scale)[0] == 0.5).all()
        elif kind == "fp8":
            over = torch.exp2(torch.ceil(torch.log2(q.scale.amax() / 448)))
            assert torch.equal((q.scale / over).to(torch.float8_e4m3fn).float() * over, q.scale)
        else:
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[kind]
            assert torch.equal(q.scale.to(dtype).float(), q.scale)
        parts = layout.parts(q)
        assert torch.equal(layout.whole(parts, scheme).decode(), q.decode())
        size = {"fp16": 4 if scheme.bits == 8 else 2, "bf16": 2, "fp32": 4}.get(kind, 1)
        assert parts["weight_scale"].element_size() == size
        if scheme.kind == "int":
            block_pack("w", q)  # fp16 holds them all
    with pytest.raises(BadInput, match="by definition"):
        Scheme.parse("NVFP4A16,scale=bf16")
    with pytest.raises(BadInput, match="did you mean 'bf16'"):
        Scheme.parse("W4A16,scale=bf1")


@pytest.mark.parametrize("name", ["W4A16_ASYM", "W3A16", "W8A16"])
@pytest.mark.parametrize("kind", ["fp16", "fp8", "e8m0"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_groups_far_smaller_than_their_neighbours_go_into_every_format(name: str, kind: str, size: float) -> None:
    """One group a ten-millionth of the others: what decodes in GGUF, by its own package, is what was stored."""
    w = weight(16, 128) * size
    w[3, 32:64] *= 1e-7
    q = build("rtn", {"scheme": name, "group_size": 32, "scale": kind}).solve(w)
    assert torch.equal(layout.whole(layout.parts(q), q.scheme).decode(), q.decode())
    form, blocks = block_pack("w", q)
    assert np.array_equal(dequantize(blocks, GGMLQuantizationType[form]), q.decode().numpy())


@pytest.mark.parametrize("name", K)
def test_k_quants_decode_as_the_gguf_package_does(name: str) -> None:
    for seed, size in ((0, 1.0), (1, 1e-3), (2, 30.0)):
        w = weight(seed=seed) * size
        w[0, :256], w[1, 32:64], w[2] = 0, 0, w[2].abs()
        q = rtn(name, w)
        blocks = kquant.pack(q)
        assert blocks.shape[1] == 2 * kquant.BYTES[name]
        theirs = dequantize(blocks.numpy(), GGMLQuantizationType[name])
        assert np.array_equal(theirs, q.decode().numpy())
        assert block_pack("w", q)[0] == name


@pytest.mark.parametrize("name", K)
def test_any_file_of_k_quants_is_read_bit_by_bit(name: str) -> None:
    """Random bytes, also those that our packer never writes (negative scales)."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (4, 3 * kquant.BYTES[name]), dtype=np.uint8)
    parts = blocks.reshape(12, kquant.BYTES[name])
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]:
        parts[:, at : at + 2] = (rng.random(12).astype(np.float16) * 0.1).astype(np.float16)[:, None].view(np.uint8)
    theirs = dequantize(blocks, GGMLQuantizationType[name])
    ours = kquant.unpack(torch.from_numpy(blocks), PRESETS[name]).decode()
    np.testing.assert_array_equal(theirs, ours.numpy())


def test_scales_that_are_no_k_quant_are_refused() -> None:
    q = rtn("Q4_K", weight())
    with pytest.raises(Unsupported, match="super-block"):
        kquant.pack(QTensor(q.scheme, q.code, q.scale * torch.rand_like(q.scale), q.zero))


ROWS = {
    "Q4_0": "W4A16", "Q4_1": "W4A16_ASYM", "Q8_0": "W8A16", "MXFP4": "MXFP4A16", **{kind: kind for kind in K},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_llama_cpp_decodes_the_same_bits(kind: str) -> None:
    """By the C functions of llama.cpp itself (dequantize_row_*), as the wheel exports them."""
    name = "mxfp4" if kind == "MXFP4" else kind.lower()[:2] + kind[2:]
    function = getattr(ctypes.CDLL(sys.modules["xllamacpp.xllamacpp"].__file__), f"dequantize_row_{name}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for seed in (0, 1):
        w = weight(seed=seed)
        step = build("rtn", {"scheme": ROWS[kind]} | ({} if kind in K or kind == "MXFP4" else {"group_size": 32}))
        q = step.solve(w)
        found, blocks = block_pack("w", q)
        assert found == kind
        blocks, out = np.ascontiguousarray(blocks), np.empty(w.shape, np.float32)
        function(blocks.ctypes.data, out.ctypes.data, out.size)
        np.testing.assert_array_equal(out, q.decode().numpy())


SAID = [name for name, scheme in PRESETS.items() if layout.form(scheme) != "wherry" and scheme.activations is None]


@pytest.mark.parametrize("name", SAID)
def test_every_scheme_that_they_can_say_decodes_as_theirs(name: str) -> None:
    """compressed-tensors' own decompressors, on integers bit for bit; it computes floats' scales in bfloat16."""
    q = rtn(name, weight())
    state = layout.parts(q)
    if q.scheme.kind == "int":
        state["weight_scale"] = state["weight_scale"].float()
    theirs = QuantizationScheme(targets=["Linear"], **layout.words(q.scheme))
    plain = BaseCompressor.get_value_from_registry(layout.form(q.scheme)).decompress(state, theirs)
    near = 0 if q.scheme.kind == "int" else 2**-8
    torch.testing.assert_close(plain["weight"].float(), q.decode(), rtol=near, atol=0)


@pytest.mark.parametrize("name", ["FP8A16", "NVFP4A16", "MXFP4A16"])
def test_float_grids_decode_as_compressed_tensors_does(name: str) -> None:
    q = rtn(name, weight())
    form = layout.form(q.scheme)
    theirs = QuantizationScheme(targets=["Linear"], **layout.words(q.scheme))
    plain = BaseCompressor.get_value_from_registry(form).decompress(layout.parts(q), theirs)
    torch.testing.assert_close(plain["weight"].float(), q.decode(), rtol=2**-8, atol=0)  # theirs computes in bfloat16


def test_mxfp4_decodes_as_the_gguf_package_does() -> None:
    q = rtn("MXFP4A16", weight())
    kind, blocks = block_pack("w", q)
    assert kind == "MXFP4"
    assert np.array_equal(dequantize(blocks, GGMLQuantizationType.MXFP4), q.decode().numpy())


@pytest.mark.parametrize(("name", "k"), [("Q4_K", 64), ("NVFP4A16", 24)])
def test_rows_that_do_not_fit_name_what_does(name: str, k: int) -> None:
    with pytest.raises(BadInput, match="fits|group_size="):
        rtn(name, torch.randn(4, k))


@pytest.mark.parametrize("kind", ["block", "tensor"])
@pytest.mark.parametrize(
    ("bits", "number", "form"),
    [(4, "int", "pack-quantized"), (8, "int", "pack-quantized"), (8, "int", "int-quantized"),
     (8, "float", "float-quantized")],
)  # fmt: skip
@pytest.mark.parametrize("rows", [64, 40])
def test_blocks_and_whole_tensors_of_others_are_read_as_they_read_them(
    kind: str, bits: int, number: str, form: str, rows: int
) -> None:
    """Files of compressed-tensors with one scale for 16 x 32 weights, or for all: decoded as by its own package."""
    grain = {"strategy": "tensor"} if kind == "tensor" else {"strategy": "block", "block_structure": [16, 32]}
    group = {"weights": {"num_bits": bits, "type": number, "symmetric": True, **grain}, "targets": ["Linear"]}
    theirs, scheme = QuantizationScheme(**group), layout.from_words(group)
    w = weight(rows, 128)
    most = 448.0 if number == "float" else 2 ** (bits - 1) - 1
    held = -(-rows // 16)
    scale = torch.stack([part.abs().amax() for rows_ in w.split(16) for part in rows_.split(32, -1)]).reshape(held, 4)
    scale = (scale if kind == "block" else w.abs().amax().reshape(1)) / most
    compressor = BaseCompressor.get_value_from_registry(form)
    given = {"weight": w, "weight_scale": scale, "weight_zero_point": torch.zeros(scale.shape, dtype=torch.int8)}
    state = compressor.compress(given, theirs)
    plain = compressor.decompress(dict(state), theirs)["weight"].float()
    ours = layout.whole(state, scheme).decode()
    assert bits == 4 or float((ours - w).norm() / w.norm()) < 0.05
    torch.testing.assert_close(ours, plain, rtol=0 if number == "int" else 2**-7, atol=0)
