"""The integer grid and packing against compressed-tensors' own, portable scales against fp16 itself."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry.ops import grid
from wherry.ops.pack import pack, unpack
from wherry.scheme import PRESETS, Group, Scheme

WEIGHT_ONLY = [
    name for name, s in PRESETS.items() if s.kind == "int" and not s.table and not s.activations and not s.nested
]


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_round_to_nearest_equals_theirs(name: str) -> None:
    torch.manual_seed(0)
    w, scheme = torch.randn(24, 128), PRESETS[name].with_group(32)
    ours = grid.encode(w, scheme, *grid.fit(w, scheme, None)).decode()
    args = QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.symmetric, strategy="group", group_size=32)
    groups = w.reshape(24, 4, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    theirs = fake_quantize(w, scale, zero, args)
    same = ours == theirs  # a half may round either way where x / s differs in the last bit
    assert same.float().mean() > 0.999
    assert (ours - theirs).abs().max() <= scale.max() * 1.001


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(1e-6, 1e3), st.sampled_from([2, 3, 4]))
def test_portable_weights_are_exact_in_fp16(seed: int, size: float, bits: int) -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * size
    scheme = Scheme(bits, grain=Group(32), symmetric=False)
    q = grid.encode(w, scheme, *grid.fit(w, scheme))
    assert q.zero is not None
    half, product = q.scale.half(), q.scale * (q.zero.float() - scheme.qmin)
    assert torch.equal(half.float(), q.scale)
    assert torch.equal(product.half().float(), product)  # the minimum of a GGUF Q4_1 block
    assert torch.equal(q.decode().half().float(), q.decode())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(1e-4, 1e2))
def test_coarse_scales_keep_8_bit_tables_exact_in_fp16(seed: int, size: float) -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * size
    scheme = Scheme(8, grain=Group(32))
    q = grid.encode(w, scheme, *grid.fit(w, scheme, grid.coarse))
    assert torch.equal(q.decode().half().float(), q.decode())
    assert (q.decode() - w).abs().max() <= 1.25 * 2 * w.abs().max() / 255 / 2 * 1.0001


def test_portable_moves_a_scale_by_at_most_2_to_the_minus_7() -> None:
    s = torch.logspace(-4, 2, 10_000)
    assert ((grid.portable(s) - s).abs() / s).max() <= 2**-7 * 1.0001


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_encode_decode_is_idempotent(name: str) -> None:
    w = torch.randn(16, 128)
    scheme = PRESETS[name].with_group(32)
    scale, zero = grid.fit(w, scheme)
    q = grid.encode(w, scheme, scale, zero)
    assert torch.equal(grid.encode(q.decode(), scheme, scale, zero).code, q.code)


def test_more_bits_are_never_worse() -> None:
    w = torch.randn(32, 256)
    errors = []
    for bits in range(2, 9):
        scheme = Scheme(bits, grain=Group(32), symmetric=False)
        errors.append(float((grid.encode(w, scheme, *grid.fit(w, scheme)).decode() - w).norm()))
    assert errors == sorted(errors, reverse=True)


def test_zeros_stay_zero_and_constant_groups_survive() -> None:
    w = torch.zeros(2, 64)
    w[0, 32:] = 3.0
    for name in ("W4A16", "W4A16_ASYM"):
        scheme = PRESETS[name].with_group(32)
        q = grid.encode(w, scheme, *grid.fit(w, scheme)).decode()
        assert torch.equal(q == 0, w == 0)
        assert torch.isfinite(q).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [7, 32, 100, 576])
def test_packing_equals_theirs(bits: int, k: int) -> None:
    code = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (13, k), dtype=torch.int8)
    words = pack_to_int32(code, bits)
    assert torch.equal(pack(code, bits), words)
    assert torch.equal(unpack(words, bits, k), unpack_from_int32(words, bits, torch.Size((13, k))))


@pytest.mark.parametrize("name", ["W4A16", "W3A16_ASYM", "W2A16_ASYM"])
def test_searched_ranges_are_the_best_of_all_tried(name: str) -> None:
    """Brute force over the same shrinks, group by group; plain and weighted; never worse than the whole range."""
    torch.manual_seed(0)
    w, scheme, weight = torch.randn(6, 64) ** 3, PRESETS[name].with_group(32), torch.rand(64) + 0.01
    for importance in (None, weight):
        scale, zero = grid.search(w, scheme, grid.portable, importance)
        h = torch.ones(64) if importance is None else importance
        found = ((grid.encode(w, scheme, scale, zero).decode() - w).square() * h).reshape(6, 2, 32).sum(-1)
        best = torch.full((6, 2), torch.inf)
        for shrink in torch.linspace(1.0, 0.4, 31).tolist():
            cut = w.reshape(6, 2, 32)
            low, high = cut.amin(-1).clamp(max=0) * shrink, cut.amax(-1).clamp(min=0) * shrink
            q = grid.encode(w, scheme, *grid.between(low, high, scheme, grid.portable)).decode()
            best = torch.minimum(best, ((q - w).square() * h).reshape(6, 2, 32).sum(-1))
        torch.testing.assert_close(found, best)
