"""SmoothQuant: the formula of the paper, and int8 products of inputs with outliers that come out nearer."""

import torch

from wherry.ops.activation import fake_quantize
from wherry.quant.rtn import RTN
from wherry.quant.smoothquant import SmoothQuant
from wherry.scheme import PRESETS, Scheme


def test_the_papers_formula() -> None:
    torch.manual_seed(0)
    w, x = [torch.randn(8, 32), torch.randn(4, 32)], torch.randn(100, 32)
    method = SmoothQuant(alpha=0.7)
    stat = method.observe(method.observe(None, x[:50]), x[50:])
    s = method.smooth(w, stat)
    torch.testing.assert_close(s, x.abs().amax(0) ** 0.7 / torch.cat(w).abs().amax(0) ** 0.3)


def test_outliers_cost_less() -> None:
    torch.manual_seed(1)
    w, x = torch.randn(64, 128), torch.randn(400, 128)
    x[:, 5] *= 60
    scheme, token = PRESETS["W8A8"], PRESETS["W8A8"].activations
    assert isinstance(token, Scheme)
    method = SmoothQuant()
    s = method.smooth([w], method.observe(None, x))
    want = x @ w.T
    errors = []
    for scales in (torch.ones(128), s):
        q = RTN(scheme=scheme).solve(w * scales).decode()
        errors.append(float((fake_quantize(x / scales, token) @ q.T - want).norm()))
    assert errors[1] < 0.4 * errors[0]


def test_a_dead_input_is_left() -> None:
    method = SmoothQuant()
    s = method.smooth([torch.tensor([[1.0, 0.0, 2.0]])], torch.tensor([0.0, 3.0, 2.0]))
    assert s[0] == 1
    assert s[1] == 1
    assert torch.isfinite(s).all()
