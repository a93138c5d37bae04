"""HQQ: less p-norm error than plain rounding for weights with outliers, never more."""

import pytest
import torch

from wherry.quant.hqq import HQQ
from wherry.quant.rtn import RTN
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
