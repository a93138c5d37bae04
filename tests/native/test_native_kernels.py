"""Every kernel on every instruction set that this processor has, against numpy on the very same integers."""

import numpy as np
import pytest

native = pytest.importorskip("wherry_native", reason="the native engine is not built here: pip install ./native")
gguf = pytest.importorskip("gguf")

ISAS = [name for name, runs in native.isas().items() if runs]
BLOCKS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0")
SIZE = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}
SHAPES = [(16, 256), (37, 512), (96, 768), (1, 256)]


def random_blocks(kind: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Bytes of n rows: every code there is, and scales that are finite halves."""
    random = np.random.default_rng(seed)
    inputs, size = SIZE.get(kind) or gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind in SIZE:
        values = random.standard_normal((n, k)).astype(np.float32)
        if kind == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)
    blocks = random.integers(0, 256, (n, k // inputs, size), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ2_0": (64,)}  # of the halves in a block
    for at in places.get(kind, (0, 2) if kind in ("Q4_K", "Q5_K", "Q4_1", "Q5_1") else (0,)):
        half = (random.standard_normal((n, k // inputs)) / 16).astype(np.float16)
        blocks[:, :, at : at + 2] = half.view(np.uint8).reshape(n, k // inputs, 2)
    return blocks.reshape(n, -1)


def decoded(kind: str, data: np.ndarray) -> np.ndarray:
    """The weights by the `gguf` package's own decoder."""
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float32)


def number(kind: str) -> int:
    return int(gguf.GGMLQuantizationType[kind])


def inputs(tokens: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, k)).astype(np.float32)


def check(weight: "native.Alone", w: np.ndarray, x: np.ndarray, isa: str, dense: bool, exact: bool = False) -> float:
    """Largest difference to the product in float64, as a share of what rounding may give."""
    y, q, scale = weight.product(x, isa, dense)
    k = w.shape[1]
    taken = x if exact else (q.reshape(len(x), -1, 32) * scale[:, :, None]).reshape(len(x), -1)[:, :k]
    right = taken.astype(np.float64) @ w.T.astype(np.float64)
    bound = np.abs(taken).astype(np.float64) @ np.abs(w).T.astype(np.float64) + 1e-20
    assert np.isfinite(y).all()
    return float((np.abs(y - right) / bound).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_products_of_blocks(kind: str, isa: str) -> None:
    for n, k in SHAPES:
        data = random_blocks(kind, n, k, seed=n)
        weight, w = native.Alone((n, k), data, number(kind)), decoded(kind, data).reshape(n, k)
        for tokens, dense in ((1, False), (2, False), (5, False), (15, False), (3, True), (13, True), (24, True)):
            assert check(weight, w, inputs(tokens, k), isa, dense, kind in SIZE) < 3e-6, (n, k, tokens, dense)
        weight.close()


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_come_back_as_the_files_decoder_has_them(kind: str) -> None:
    data = random_blocks(kind, 37, 512)
    weight, w = native.Alone((37, 512), data, number(kind)), decoded(kind, data).reshape(37, 512)
    for i in (0, 15, 16, 36):
        assert np.allclose(weight.row(i), w[i], rtol=1e-6, atol=1e-7)
    weight.close()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("zero", [None, 0, 1], ids=["minimum", "from-zero", "symmetric"])
def test_products_of_codes(bits: int, zero: int | None, isa: str) -> None:
    random = np.random.default_rng(bits)
    zero = zero and 1 << (bits - 1)
    sizes = ((33, 256, 16), (33, 256, 32), (48, 384, 64), (17, 512, 128), (40, 200, 200), (5, 96, 96), (3, 31, 31))
    for n, k, group in sizes:
        code = random.integers(0, 1 << bits, (n, k), dtype=np.uint8)
        scale = random.uniform(0.5, 1, (n, -(-k // group))).astype(np.float32)
        minimum = -scale * 2.75 if zero is None else None
        weight = native.Alone((n, k), code, -1, bits, group, zero, scale, minimum)
        wide = np.repeat(scale, group, 1)[:, :k]
        w = wide * (code.astype(np.float32) - (2.75 if zero is None else zero))
        for tokens, dense in ((1, False), (7, False), (20, True)):
            assert check(weight, w, inputs(tokens, k), isa, dense) < 3e-6, (n, k, group, tokens)
        assert np.allclose(weight.row(n - 1), w[n - 1], rtol=1e-6, atol=1e-6)
        weight.close()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_sum_saturates(bits: int, isa: str) -> None:
    """The largest codes times the largest activations, all of one sign and mixed."""
    k, n = 4096, 16
    for code in (0, (1 << bits) - 1, 1 << (bits - 1)):
        codes = np.full((n, k), code, np.uint8)
        for zero in (0, 1 << (bits - 1)):
            weight = native.Alone((n, k), codes, -1, bits, 32, zero, np.ones((n, k // 32), np.float32))
            signs = np.where(np.random.default_rng(0).random((4, k)) < 0.5, -1.0, 1.0)
            signs[0], signs[1], signs[2, ::2] = 1, -1, 1
            for dense in (False, True):
                y, q, scale = weight.product(signs * 1e3, isa, dense)
                assert np.abs(q).min() == 127
                right = (q.astype(np.int64) * (code - zero)).reshape(4, -1, 32).sum(-1) * scale.astype(np.float64)
                assert np.allclose(y, right.sum(-1)[:, None], rtol=1e-5, atol=0.05 * (code + zero))
            weight.close()


@pytest.mark.parametrize("isa", ISAS)
def test_activations_are_rounded_to_nearest(isa: str) -> None:
    weight = native.Alone((16, 64), np.zeros((16, 64), np.uint8), -1, 8, 32, 128, np.ones((16, 2), np.float32))
    x = np.concatenate([inputs(6, 64), *(np.full((1, 64), v) for v in (0, -3.5, 1e-38, 1e38))])
    _, q, scale = weight.product(x, isa)
    blocks = x.astype(np.float32).reshape(len(x), 2, 32)
    most = np.abs(blocks).max(-1)
    assert np.allclose(scale, np.where(most > 1e-30, most / 127, 0), rtol=1e-6)
    error = np.abs(q.reshape(blocks.shape) * scale[:, :, None] - blocks)
    assert (error <= scale[:, :, None] * 0.5001 + 2e-38).all()
    bad = inputs(1, 64)
    bad[0, 40] = np.nan
    assert np.isnan(weight.product(bad, isa)[0]).all()
    weight.close()


@pytest.mark.parametrize("isa", ISAS)
def test_one_and_many_activations_give_the_same_bits(isa: str) -> None:
    """What a token's row is does not depend on what is computed with it."""
    for kind in ("Q4_0", "Q4_K", "Q6_K", "F16"):
        weight, x = native.Alone((64, 512), random_blocks(kind, 64, 512), number(kind)), inputs(24, 512)
        together = [weight.product(x, isa, dense)[0] for dense in (False, True)]
        alone = np.concatenate([weight.product(x[i : i + 1], isa)[0] for i in range(len(x))])
        assert np.array_equal(together[0], alone)
        assert np.array_equal(together[1], alone)
        weight.close()


def test_memory_is_that_of_the_file() -> None:
    for kind in BLOCKS:
        data = random_blocks(kind, 320, 1024)
        weight = native.Alone((320, 1024), data, number(kind))
        print(f"{kind}: {weight.bytes() / data.nbytes:.3f} of the file's bytes")
        assert weight.bytes() <= 1.2 * data.nbytes
        weight.close()


def test_what_is_not_read_is_refused() -> None:
    for kind, k, reason in ((99, 256, "not read"), (number("Q4_K"), 288, "fill"), (number("Q4_0"), 40, "fill")):
        with pytest.raises(native.NativeError, match=reason):
            native.Alone((16, k), np.zeros((16, k), np.uint8), kind)
    for bits, group in ((7, 32), (4, 48), (9, 32), (4, 0)):
        with pytest.raises(native.NativeError):
            native.Alone((16, 256), np.zeros((16, 256), np.uint8), -1, bits, group, 0, np.ones((16, 16), np.float32))
    with pytest.raises(native.NativeError, match="no kernels"):
        native.isa_number("avx9")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q6_K", "Q8_0"])
def test_activations_of_16_bits(kind: str, isa: str) -> None:
    """Rounded twice, the product is that of the floats to about 2^-15, bias and all; once, it is not."""
    n, k, tokens = 48, 512, 13
    data = random_blocks(kind, n, k, seed=1)
    weight, w, x = native.Alone((n, k), data, number(kind)), decoded(kind, data), inputs(tokens, k)
    right = x.astype(np.float64) @ w.T.astype(np.float64)
    size = np.sqrt((x.astype(np.float64) ** 2) @ (w.T.astype(np.float64) ** 2))  # of a sum of k terms of random sign
    for dense in (False, True):
        once, twice = (np.abs(weight.product(x, isa, dense, levels)[0] - right) / size for levels in (1, 2))
        assert twice.max() < 1.5e-4
        assert np.median(once) > 1e-3
        alone = np.concatenate([weight.product(x[i : i + 1], isa, levels=2)[0] for i in range(tokens)])
        assert np.array_equal(weight.product(x, isa, dense, 2)[0], alone)
    weight.close()
