"""AWQ: its scales save the inputs that matter; brute force over the exponent; ones when no input matters more."""

import torch

from wherry.ops import grid
from wherry.quant.awq import AWQ
from wherry.scheme import Scheme

S = Scheme.parse("W3A16_ASYM,group_size=32")


def error(w: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> float:
    q = grid.encode(w * s, S, *grid.fit(w * s, S, grid.portable)).decode() / s
    return float(((q - w) @ x.T).norm())


def test_salient_inputs_gain() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(32, 128), torch.randn(500, 128)
    x[:, ::16] *= 20
    method = AWQ(scheme=S)
    s = method.smooth([w[:16], w[16:]], method.observe(None, x))
    assert error(w, x, s) < 0.6 * error(w, x, torch.ones(128))
    assert float(s[::16].min()) > float(s[1::16].max())
    assert abs(float(s.max() * s.min()) - 1) < 1e-4


def test_it_takes_the_best_of_its_grid() -> None:
    torch.manual_seed(1)
    w, x = torch.randn(16, 64), torch.randn(300, 64) * torch.rand(64) * 5
    coarse, fine = AWQ(scheme=S, grid=1), AWQ(scheme=S, grid=20)
    stat = fine.observe(None, x)
    errors = [error(w, x, method.smooth([w], stat)) for method in (coarse, fine)]
    assert errors[1] <= errors[0] * (1 + 1e-5)
    assert errors[1] <= error(w, x, torch.ones(64)) * (1 + 1e-5)
