"""HQQ: less p-norm error than plain rounding for weights with outliers, never more."""

from pathlib import Path

import pytest
import torch

from tests.conftest import write_llama
from wherry.checkpoint import Checkpoint
from wherry.errors import Unsupported
from wherry.ops import kquant
from wherry.quant.hqq import HQQ
from wherry.quant.rtn import RTN
from wherry.recipe import Recipe
from wherry.scheme import Scheme


@pytest.mark.parametrize("spelling", ["W4A16_ASYM", "W3A16", "W2A16_ASYM"])
def test_less_error_of_its_own_norm(spelling: str) -> None:
    torch.manual_seed(0)
    w = torch.distributions.StudentT(4.0).sample((64, 256))
    scheme = Scheme.parse(f"{spelling},group_size=64")
    ours, plain = (kind(scheme=scheme).solve(w).decode() for kind in (HQQ, RTN))
    norms = [float((q - w).abs().pow(0.7).sum()) for q in (ours, plain)]
    assert norms[0] < 0.995 * norms[1]
    by_group = [(q - w).abs().clamp(min=1e-12).pow(0.7).unflatten(-1, (4, 64)).sum(-1) for q in (ours, plain)]
    assert (by_group[0] <= by_group[1] * (1 + 1e-4)).all()


def test_a_group_on_its_grid_already_stays() -> None:
    scheme = Scheme.parse("W4A16_ASYM,group_size=32")
    torch.manual_seed(1)
    w = RTN(scheme=scheme).solve(torch.randn(16, 64)).decode()
    torch.testing.assert_close(HQQ(scheme=scheme).solve(w).decode(), w)


LEVELS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "NF4", "NVFP4A16", "MXFP4A16", "W1A16,group_size=64")


@pytest.mark.parametrize("spelling", LEVELS)
def test_tables_and_super_blocks_are_fitted_on_their_own_levels(spelling: str) -> None:
    """Less error of its own norm than plain rounding, over groups whose scales hang together; k-quants still pack."""
    torch.manual_seed(0)
    w = torch.distributions.StudentT(4.0).sample((32, 512)) / 20
    scheme = Scheme.parse(spelling)
    q, plain = HQQ(scheme=scheme).solve(w), RTN(scheme=scheme).solve(w)
    norms = [(v.decode() - w).abs().clamp(min=1e-12).pow(0.7).unflatten(-1, (2, 256)).sum(-1) for v in (q, plain)]
    if spelling in ("NVFP4A16", "MXFP4A16"):
        assert norms[0].sum() <= norms[1].sum() * (1 + 1e-4)
    else:
        assert (norms[0] <= norms[1] * (1 + 1e-4)).all()
        assert norms[0].sum() < 0.998 * norms[1].sum()
    if scheme.nested:
        again = kquant.unpack(kquant.pack(q), scheme)
        torch.testing.assert_close(again.decode(), q.decode(), rtol=0, atol=0)


def test_planes_are_refused_when_planned(tmp_path: Path) -> None:
    model = Checkpoint.open(write_llama(tmp_path / "llama", layers=1))
    with pytest.raises(Unsupported, match="no one step to fit; take W2A16, or leave hqq out"):
        Recipe.parse("hqq:scheme=W2A16_BINARY,group_size=32").plan(model)
