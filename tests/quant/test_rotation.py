"""Rotation: orthogonal matrices, the same logits from other weights, fewer outliers; refusals."""

from pathlib import Path

import pytest
import torch

from tests.conftest import write_llama
from tests.engine.test_gaits import compress, divergence, logits
from wherry.checkpoint import Checkpoint
from wherry.errors import Unsupported
from wherry.quant.rotation import Rotation, orthogonal


@pytest.mark.parametrize("n", [1, 2, 64, 96, 352, 7])
def test_matrices_are_orthogonal(n: int) -> None:
    Q = orthogonal(n, 3)
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    if n & (n - 1) == 0:
        torch.testing.assert_close(Q.abs(), torch.full_like(Q, n**-0.5))


def outlying(folder: Path, tied: bool) -> Path:
    """Norms of many sizes, so that folding them is seen."""
    from safetensors.torch import load_file, save_file

    write_llama(folder, tied=tied, attention_bias=True, mlp_bias=True)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" in name or name.endswith(".bias"):
            tensors[name] = torch.rand_like(tensor) * 3 if "norm" in name else 0.1 * torch.randn_like(tensor)
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            tensor[7] *= 12  # a channel of the stream that sticks out
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("knobs", [{}, {"r1": False}, {"r2": False}])
def test_the_model_computes_the_same(tied: bool, knobs: dict[str, bool], tmp_path: Path) -> None:
    original = Checkpoint.open(outlying(tmp_path / "model", tied))
    turned = Rotation(**knobs).rewrite(original)
    torch.testing.assert_close(logits(turned), logits(original), rtol=1e-3, atol=2e-3)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert not torch.allclose(turned.weight(name), original.weight(name))


def test_outliers_are_gone_and_rounding_gains(tmp_path: Path) -> None:
    folder = outlying(tmp_path / "model", True)
    original = Checkpoint.open(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    turned = Rotation().rewrite(original)

    def peak(w: torch.Tensor) -> float:
        return float(w.abs().amax() / w.square().mean().sqrt())

    down = "model.layers.0.mlp.down_proj.weight"
    assert peak(turned.weight(down)) < 0.5 * peak(original.weight(down))
    assert turned.shape(name) == original.shape(name)
    scheme = "scheme=W4A16,group_size=-1,embedding=keep"
    plain = compress(folder, f"rtn:{scheme}", tmp_path / "plain")
    made = compress(folder, f"rotation | rtn:{scheme}", tmp_path / "turned")
    assert made.config["tie_word_embeddings"] is False
    assert divergence(made, original) < 0.9 * divergence(plain, original)
    assert {row["name"] for row in made.plan if row.get("turned") == "rotation"} >= {name, "lm_head.weight"}


def test_unknown_architectures_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(Unsupported, match="leave it out"):
        Rotation().rewrite(Checkpoint.open(tiny_bert))
