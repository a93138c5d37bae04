"""One scale for a block, or for a whole weight: fits by brute force, files by compressed-tensors' own code, formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from tests.conftest import write_llama
from tests.quant.test_laws import inputs, solve
from wherry import api, data, deliver
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput
from wherry.evaluate import weights
from wherry.ops import grid, layout, tiles
from wherry.ops.latent import Latent, learn
from wherry.ops.learned_grid import LearnedGrid
from wherry.ops.solve import refit_codes
from wherry.prove import prove_folder
from wherry.recipe import Recipe
from wherry.scheme import QTensor, Scheme

TILED = ["W8A16,strategy=tensor", "W4A16_ASYM,strategy=tensor", "W4A16,block_structure=16x32",
         "W3A16_ASYM,block_structure=16x32", "FP8A16,block_structure=16x32", "NF4,block_structure=32x64",
         "W1.58A16,strategy=tensor", "W4A16,block_structure=16x32,scale=fp8"]  # fmt: skip


def weight(n: int = 40, k: int = 128, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * torch.rand(n, 1, generator=g)


def tile_of(scheme: Scheme, n: int, k: int) -> list[tuple[slice, slice]]:
    """Where each tile lies, by a plain loop."""
    high, wide = (n, k) if "tensor" in str(scheme) else (scheme.grain.rows, scheme.grain.columns)
    return [(slice(i, min(i + high, n)), slice(j, j + wide)) for i in range(0, n, high) for j in range(0, k, wide)]


@pytest.mark.parametrize("text", TILED)
def test_each_tile_is_fitted_as_one_row_of_its_weights(text: str) -> None:
    """A loop over tiles, each a weight of one row with one scale: the same scales, zeros and codes."""
    scheme, w, h = Scheme.parse(text), weight(), torch.rand(128) + 0.1
    if scheme.scale == "float8_e4m3fn":
        pytest.skip("its scales are rounded together")
    one = Scheme.parse(text.split(",")[0] + ",group_size=-1")
    rounding = grid.stored(scheme, grid.portable)
    for fit in (lambda x, s, _: grid.fit(x, s, rounding), lambda x, s, i: grid.search(x, s, rounding, i)):
        scale, zero = fit(w, scheme, h)
        code = grid.encode(w, scheme, scale, zero).code
        groups = scale.shape[1]
        for rows, columns in tile_of(scheme, *w.shape):
            x = w[rows, columns]
            own, own_zero = fit(x.reshape(1, -1), one, h[columns].expand(len(x), -1).reshape(1, -1))
            g = columns.start * groups // w.shape[1]
            assert (scale[rows, g] == own).all()
            assert zero is None or (zero[rows, g] == own_zero).all()
            want = grid.encode(x.reshape(1, -1), one, own, own_zero).code.reshape(x.shape)
            assert torch.equal(code[rows, columns], want)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "gptaq", "awq"])
@pytest.mark.parametrize("text", TILED)
def test_every_method_keeps_one_scale_per_tile_and_its_file_is_read_by_others(method: str, text: str) -> None:
    w, x = weight(40, 128), inputs(400, 128)
    q = solve(method, w, x, scheme=text)
    for rows, columns in tile_of(q.scheme, 40, 128):
        g = columns.start * q.scale.shape[1] // 128
        assert len(q.scale[rows, g].unique()) == 1
        assert q.zero is None or len(q.zero[rows, g].unique()) == 1
    parts = layout.parts(q)
    assert torch.equal(layout.whole(parts, q.scheme).decode(), q.decode())
    held = sum(part.numel() * part.element_size() for part in parts.values())
    assert held == layout.bytes_of(q.scheme, (40, 128), parts["weight_scale"].element_size())
    if layout.form(q.scheme) == "wherry" or q.scheme.table == "ternary":
        return
    theirs = QuantizationScheme(targets=["Linear"], **layout.words(q.scheme))
    parts["weight_scale"] = parts["weight_scale"].float()
    plain = BaseCompressor.get_value_from_registry(layout.form(q.scheme)).decompress(parts, theirs)["weight"]
    torch.testing.assert_close(plain.float(), q.decode(), rtol=0 if q.scheme.kind == "int" else 2**-7, atol=0)


def test_the_scale_of_a_whole_weight_is_least_squares_in_the_inputs_metric() -> None:
    """Scale = <W, Q>_H / <Q, Q>_H, pulled by 1% to the old one; of blocks: no move of one scale lessens the error."""
    w, x = weight(), inputs(400, 128)
    H = x.T @ x / len(x) + 0.1 * torch.eye(128)
    scheme = Scheme.parse("W3A16,strategy=tensor")
    q = grid.encode(w, scheme, *grid.fit(w, scheme, None))
    new = refit_codes(w, q.code.float(), scheme, H, q.scale, None)
    Q = q.code.double()
    b, a = ((w.double() @ H.double()) * Q).sum(), ((Q @ H.double()) * Q).sum()
    want = (b + 0.01 * a * q.scale[0, 0]) / (a + 0.01 * a)
    torch.testing.assert_close(new, torch.full_like(new, float(want)), rtol=1e-5, atol=0)
    scheme = Scheme.parse("W3A16,block_structure=16x32")
    q = grid.encode(w, scheme, *grid.fit(w, scheme, None))
    new = refit_codes(w, q.code.float(), scheme, H, q.scale, None)

    def loss(scale: torch.Tensor) -> float:
        E = (QTensor(scheme, q.code, scale).decode() - w).double()
        pull = 0.0
        for i in range(0, 40, 16):
            part, moved = q.code[i : i + 16].double(), (scale - q.scale)[i].double()
            own = [((part[:, j : j + 32] @ H[j : j + 32, j : j + 32].double()) * part[:, j : j + 32]).sum()
                   for j in range(0, 128, 32)]  # fmt: skip
            pull += float(0.01 * torch.stack(own).mean() * moved.square().sum())
        return float(((E @ H.double()) * E).sum()) + pull

    least = loss(new)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 40)):
        for g in range(4):
            for step in (0.99, 1.01):
                moved = new.clone()
                moved[rows, g] *= step
                assert loss(moved) >= least


@pytest.mark.parametrize("text", ["W3A16,strategy=tensor", "W3A16_ASYM,block_structure=16x32"])
def test_learned_scales_stay_one_per_tile(text: str) -> None:
    w, x, scheme = weight(), inputs(400, 128), Scheme.parse(text)
    rounding = grid.stored(scheme, grid.portable)
    latent = Latent(grid.encode(w, scheme, *grid.fit(w, scheme, rounding)), w, rounding)
    first, last = learn(lambda i: ((latent.weight() - w) @ x.T).square().mean(), [latent], [], 1, 60, 2e-2, 1e-2, 0.0)
    q = latent.settle()
    assert last < first
    assert torch.equal(tiles.spread(tiles.once(q.scale, scheme), 40, scheme), q.scale)
    assert len(q.scale.unique()) <= (1 if "tensor" in text else 12)


@pytest.mark.parametrize("recipe", ["gptq:scheme=W4A16,strategy=tensor", "rounding:scheme=W8A16,block_structure=32x64,"
                                    "iters=3", "mixed:schemes=W4A16;W8A16,bits=6 | rtn:scheme=W4A16,"
                                    "block_structure=16x32", "lowrank:rank=4 | rtn:scheme=W4A16,strategy=tensor"])
def test_formats_without_tiles_hold_the_same_weights(recipe: str, tmp_path: Path) -> None:
    """The scale is repeated in rows, the plan says so, and each format's own reader gives the plan's weights."""
    if recipe.startswith("lowrank"):
        recipe = " | ".join(reversed(recipe.split(" | ")))
    checkpoint = Checkpoint.open(write_llama(tmp_path / "model", layers=1))
    plan = Recipe.parse(recipe).plan(checkpoint, ("gguf", "onnx"))
    assert any("each scale is repeated in its rows" in note for row in plan.rows for note in row.notes)
    batches = deliver.calibration(checkpoint, data.read(data.shipped("calibration")), 4, 32, 0)
    out = tmp_path / "out"
    deliver.deliver(plan, out, ("gguf", "onnx"), batches, {}, lambda result: None, api.quiet)
    report = prove_folder(out, checkpoint, None, False, (0.5, 1.5), api.quiet)
    assert report.rows[-1].value == "PASS", [row for row in report.rows if row.value is False]
    made, down = Checkpoint.open(out), "model.layers.0.mlp.down_proj.weight"
    q = made.tensor(down)
    assert isinstance(q, QTensor)
    assert q.scheme.tiled
    assert len(q.scale.unique()) < q.scale.numel() / 8
    again = tmp_path / "again"  # exported later, from what lies on the disk
    api.export(out, again, "gguf")
    assert json.loads((again / "wherry.json").read_text())["format"] == "gguf"


def test_damage_to_one_tile_is_seen() -> None:
    w = weight(256, 256).numpy()
    scheme = Scheme.parse("W4A16,block_structure=128x128")
    v = grid.encode(torch.from_numpy(w), scheme, *grid.fit(torch.from_numpy(w), scheme, grid.portable)).decode().numpy()
    assert not weights.compare(w, v, scheme).problem
    assert not weights.off_grid(v, scheme)
    assert "scaled" in weights.compare(w, v * 1.05, scheme).problem
    assert "quantized" in weights.off_grid(v + 1e-3 * np.random.default_rng(0).standard_normal(v.shape), scheme)
    lost = v.copy()
    lost[:128, :128] = 0
    assert weights.lost_scales(lost, scheme, w) == 1


@pytest.mark.parametrize(("text", "match"), [
    ("W8A16,block_structure=128", "write 128x128"), ("W8A16,block_structure=0x8", "write 128x128"),
    ("W8A16,strategy=block", "block_structure"), ("W8A16,strategy=tensor,group_size=32", "give one of them"),
    ("NVFP4A16,strategy=tensor", "by its definition"), ("Q4_K,block_structure=16x16", "by its definition"),
    ("W8A16,blok_structure=8x8", "did you mean 'block_structure'"),
])  # fmt: skip
def test_wrong_tiles_are_said(text: str, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        Scheme.parse(text)
    with pytest.raises(BadInput, match=match.replace("blok", "block")):
        Recipe.parse(f"rtn:scheme={text}")


def test_a_tile_that_does_not_divide_names_one_that_does(tiny_llama: Path) -> None:
    def plan(text: str) -> Any:
        return Recipe.parse(f"rtn:scheme=W8A16,block_structure={text}").plan(Checkpoint.open(tiny_llama))

    with pytest.raises(BadInput, match=r"128x48 does not divide .* block_structure=128x(\d+) does") as e:
        plan("128x48")
    plan(str(e.value).split("block_structure=")[-1].split(" ")[0])


@pytest.mark.parametrize("text", ["W1.58A16,strategy=tensor", "W4A16_ASYM,block_structure=16x32"])
def test_a_trained_grid_has_one_scale_per_tile_at_every_step(text: str) -> None:
    """As BitNet b1.58 trains: gradients move a tile's scale as one, and plain rounding finds the grid again."""
    w, x, scheme = weight(), inputs(200, 128), Scheme.parse(text)
    trained = LearnedGrid(w, scheme, grid.stored(scheme, grid.portable))
    held = torch.nn.Parameter(trained.right_inverse(w))
    optimizer = torch.optim.Adam([held, *trained.parameters()], lr=1e-2)
    first = None
    for _ in range(30):
        loss = ((trained(held) - w) @ x.T).square().mean()
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scale = trained.scale().detach()
        assert torch.equal(tiles.spread(tiles.once(scale, scheme), 40, scheme), scale)
    assert float(loss.detach()) < first
    q = trained.settle(held)
    again = Recipe.parse(f"rtn:scheme={text}").steps[0].solve(q.decode())
    torch.testing.assert_close(again.decode(), q.decode(), rtol=0, atol=0)
