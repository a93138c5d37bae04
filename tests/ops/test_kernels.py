"""The solve kernels on a device: nothing is read back, nothing is made on the host, inside of the loop over columns.

No such device is needed: torch refuses to mix tensors of the device "meta" with others and to read them; a dispatch
mode counts what is launched on real ones.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wherry.ops import grid
from wherry.ops.latent import Latent
from wherry.ops.solve import columns, inverse_factor, ordered_factor, refit_codes
from wherry.recipe import build
from wherry.scheme import QTensor, Scheme

SCHEMES = ["W4A16_ASYM", "W3A16", "NF4", "MXFP4A16", "FP8A16", "W2A16_BINARY", "W1.58A16", "Q4_K", "W8A16"]
DEVICE = "meta"
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")  # what waits for a device
MADE = ("lift_fresh", "lift", "arange", "full")  # what makes a tensor of Python numbers


class Counting(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def problem(scheme: str, k: int, n: int = 16) -> tuple[Scheme, torch.Tensor, torch.Tensor, Any]:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(n, k, generator=g), torch.randn(2 * k, k, generator=g)
    step = build("gptq", {"scheme": scheme})
    return step.scheme, w, x.T @ x / len(x), step.rounding


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("drift", [False, True])
def test_the_column_loop_waits_for_nothing(scheme: str, drift: bool) -> None:
    """The number of reads does not grow with the columns, nor that of tensors made of numbers; the launches do."""
    found = []
    for k in (256, 512):
        s, w, H, rounding = problem(scheme, k)
        scale, zero = grid.search(w, s, rounding, H.diagonal())
        order = torch.argsort(H.diagonal(), descending=True)
        U, _ = inverse_factor(H[order][:, order], 0.01)
        P = torch.randn(k, k).triu(1) * 0.01 if drift else None
        with Counting() as mode:
            columns(w, U, scale, zero, s, order, P=P)
        found.append(mode.count)
    assert not any(count[name] for count in found for name in READS)
    assert all(found[0][name] == found[1][name] for name in MADE), found
    assert found[1]["addr_"] > found[0]["addr_"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kernel_stays_on_the_device(scheme: str) -> None:
    """Mixing a tensor of the host in, or reading one, raises."""
    k = 512
    s = Scheme.parse(scheme)
    rounding = build("gptq", {"scheme": scheme}).rounding
    w, H = torch.randn(16, k, device=DEVICE), torch.randn(k, k, device=DEVICE)
    U, order = torch.randn(k, k, device=DEVICE), torch.argsort(H.diagonal())
    scale, zero = grid.search(w, s, rounding, H.diagonal())
    fitted, _ = grid.fit(w, s, rounding)
    for P in (None, torch.randn(k, k, device=DEVICE)):
        code = columns(w, U, scale, zero, s, order, P=P)
        again = refit_codes(w, code, s, H, scale, zero)
        q = QTensor(s, code.to(torch.int8), again if rounding is None else rounding(again), zero)
        assert {t.device.type for t in (code, again, fitted, q.scale, q.decode())} == {DEVICE}
    encoded = grid.encode(w, s, scale, zero)
    assert encoded.code.device.type == DEVICE
    if s.planes == 1:
        latent = Latent(encoded, w, rounding)
        assert {latent.weight().device.type, latent.settle().scale.device.type} == {DEVICE}


@pytest.mark.parametrize("method", ["hqq", "awq", "rounding"])
def test_methods_without_a_loop_over_columns_do_too(method: str) -> None:
    step = build(method, {"scheme": "W4A16_ASYM"})
    w, x = torch.randn(16, 256, device=DEVICE), torch.randn(64, 256, device=DEVICE)
    q = step.solve(w, step.observe(None, x)) if method == "awq" else step.solve(w)
    assert {q.code.device.type, q.scale.device.type} == {DEVICE}


def test_the_modes_see_what_they_forbid() -> None:
    """The checks themselves: a read and a tensor of the host are found."""
    with Counting() as mode:
        torch.ones(3).sum().item()
        torch.tensor([1.0])
    assert mode.count["_local_scalar_dense"] == 1
    assert mode.count["lift_fresh"] == 1
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_layers_that_share_an_input_share_its_factor() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g)
    total = x.T @ x
    first = ordered_factor(total, 200, 0.01)
    assert ordered_factor(total, 200, 0.01) is first
    assert ordered_factor(total.clone(), 200, 0.01) is not first
    other = ordered_factor(total, 200, 0.1)
    assert not torch.equal(other[1], first[1])
    H = (total / 200).double()
    H += 0.01 * H.diagonal().mean() * torch.eye(64)
    again = ordered_factor(total, 200, 0.01, falling=False)
    torch.testing.assert_close((again[1].T @ again[1]).double(), torch.linalg.inv(H), rtol=1e-4, atol=1e-4)
