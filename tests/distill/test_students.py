"""What changes a student: grids, adapters, masks; each against its definition, alone and together."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from wherry.distill.keep_zeros import KeepZeros
from wherry.distill.lora import Lora
from wherry.distill.qat import QAT
from wherry.errors import BadInput, Unsupported
from wherry.ops import grid
from wherry.ops.learned_grid import LearnedGrid, LearnedRange
from wherry.quant.rtn import RTN
from wherry.scheme import Scheme

SCHEMES = (
    "W8A16,group_size=32", "W4A16_ASYM,group_size=32", "W4A16,group_size=16", "W3A16_ASYM,group_size=32",
    "W2A16_ASYM,group_size=64", "W2A16,group_size=32", "W1.58A16,group_size=32", "W1A16,group_size=64",
    "W4A16,group_size=-1", "W5A16_ASYM,group_size=32", "W6A16,group_size=32",
)  # fmt: skip


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def train(net: nn.Module, steps: int = 12, lr: float = 1e-2) -> list[float]:
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    y = torch.arange(32) % 10
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", SCHEMES)
def test_trained_weights_lie_on_the_grid_and_rtn_finds_it(name: str) -> None:
    scheme, net = Scheme.parse(name), network()
    step = QAT(scheme=scheme, ignore=("0",))
    step.prepare(net)
    before = net[4].weight.detach().clone()
    losses = train(net)
    assert losses[-1] < losses[0]
    held = net[4].parametrizations.weight
    codes = held[0].settle(held.original)
    used = net[4].weight.detach().clone()
    step.finish(net)
    w = net[4].weight.detach()
    assert not parametrize.is_parametrized(net[4])
    assert torch.equal(w, used)
    assert not torch.equal(w, before)
    assert torch.equal(codes.decode(), w)
    again = RTN(scheme=scheme).solve(w)
    assert torch.equal(again.decode(), w)
    assert torch.equal(RTN(scheme=scheme).solve(w.half().float()).decode(), w)  # stored as fp16 in between


def test_a_grid_of_other_hands_is_found_and_a_float_weight_is_not() -> None:
    scheme = Scheme.parse("W4A16,group_size=32")
    torch.manual_seed(0)
    w = torch.randn(16, 64)
    assert grid.recover(w, scheme, grid.portable) is None
    codes = torch.randint(-8, 8, (16, 2, 32)).float()  # ggml's Q4_0: w = d (q - 8), any fp16 d
    d = (torch.rand(16, 2, 1) * 0.01 + 0.01).half().float()
    q = RTN(scheme=scheme, portable=False).solve((codes * d).flatten(1))
    assert torch.allclose(q.decode(), (codes * d).flatten(1), rtol=1e-6, atol=0)
    notes: list[str] = []
    mixed = torch.cat([(codes * d).flatten(1), w])
    RTN(scheme=scheme, portable=False).solve(mixed, notes=notes)
    assert notes == ["32 of 64 groups lay on this grid already and kept it"]


def test_the_gradient_of_a_scale_is_lsqs() -> None:
    """d w_hat / ds = round(w/s) - w/s inside of the range, the end's code outside (Esser et al., equation 3)."""
    scheme = Scheme.parse("W2A16,group_size=-1")
    w = torch.tensor([[0.3, -0.9, 0.8, 5.0, -7.0, 1.2]])
    own = LearnedGrid(w, scheme, None, found=(torch.tensor([[1.0]]), None), held_in_codes=False)
    held = w.clone().requires_grad_()
    own(held).backward(torch.ones_like(w))
    wanted = torch.tensor([0 - 0.3, -1 + 0.9, 1 - 0.8, 1.0, -2.0, 1.0]).sum()
    s = (own.scale0 * own.growth()).detach()
    per_scale = own.a.grad / (2.0 * s.flatten())  # chain rule: s = s0 exp(2 a)
    assert float(per_scale) == pytest.approx(float(wanted), rel=1e-5)
    assert held.grad.tolist() == [[1, 1, 1, 0, 0, 0]]


def test_the_gradient_of_a_zero_is_lsq_plus() -> None:
    """-s where a weight is clipped, 0 inside (Bhalgat et al., equation 6)."""
    scheme = Scheme.parse("W2A16_ASYM,group_size=-1")
    w = torch.tensor([[0.3, -0.9, 9.0, -7.0]])
    own = LearnedGrid(w, scheme, None, found=(torch.tensor([[0.5]]), torch.tensor([[0]], dtype=torch.int8)))
    own(own.right_inverse(w)).backward(torch.ones_like(w))
    assert own.z is not None
    assert float(own.z.grad) == pytest.approx(-0.5 * 2)


def test_binary_is_the_sign_times_a_scale_with_clipped_gradients() -> None:
    scheme = Scheme.parse("W1A16,group_size=-1")
    w = torch.tensor([[0.5, -0.2, 3.0, -0.1]])
    own = LearnedGrid(w, scheme, None, held_in_codes=False)
    held = w.clone().requires_grad_()
    out = own(held)
    s = float(w.abs().mean())  # Rastegari et al.: the best scale is the mean of |w|
    assert torch.allclose(out, torch.tensor([[s, -s, s, -s]]))
    out.backward(torch.ones_like(w))
    assert held.grad.tolist() == [[1, 1, 0, 1]]


def test_a_ternary_start_is_the_best_of_all_scales() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 32)
    own = LearnedGrid(w, Scheme.parse("W1.58A16,group_size=-1"), None, held_in_codes=False)
    for row, s in zip(w, own.scale0.flatten(), strict=True):

        def error(t: float, row: torch.Tensor = row) -> float:
            return float(((row / t).clamp(-1, 1).round() * t - row).square().sum())

        best = min(error(float(t)) for t in torch.linspace(0.2, 3, 400))
        assert error(float(s)) <= best * 1.05


def test_activations_follow_the_exported_rule() -> None:
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    per_token = LearnedRange(Scheme.parse("W8A8").activations)
    s = x.abs().amax(-1, keepdim=True) / 127
    assert torch.allclose(per_token(x), torch.round(x / s) * s, atol=1e-6)
    whole = LearnedRange(Scheme.parse("W8A8_STATIC").activations)
    y = whole(x).detach()
    assert len(y.unique()) <= 256
    assert float((y - x).abs().max()) <= float((x.max() - x.min()) / 255) * 0.51
    assert float(whole(torch.zeros(1)).detach()) == 0


def test_a_network_with_static_activations_trains_and_comes_back_plain() -> None:
    net = network()
    step = QAT(scheme=Scheme.parse("W8A8_STATIC"), portable=False)
    step.prepare(net)
    assert train(net)[-1] < 2.4
    keys = set(network().state_dict())
    step.finish(net)
    assert set(net.state_dict()) == keys
    assert not net[0]._forward_pre_hooks


def test_adapters_begin_at_the_model_and_end_merged() -> None:
    net = network()
    net.eval()
    x = torch.randn(4, 3, 8, 8)
    first = net(x)
    step = Lora(rank=4, targets=("4", "0"))
    step.prepare(net)
    assert torch.equal(net(x), first)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all(name.endswith((".A", ".B")) for name in trained)
    assert len(trained) == 4
    w, other = net[4].parametrizations.weight.original.detach().clone(), net[6].weight.detach().clone()
    train(net)
    net.eval()
    last = net(x)
    step.finish(net)
    assert torch.equal(net(x), last)
    assert torch.equal(net[6].weight, other)
    moved = net[4].weight.detach() - w
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) <= 4
    assert float(moved.norm()) > 0


def test_zeros_stay_through_training_and_through_quantization() -> None:
    net = network()
    with torch.no_grad():
        net[4].weight[torch.rand(64, 512) < 0.5] = 0
    mask = net[4].weight == 0
    masked, both = copy.deepcopy(net), copy.deepcopy(net)
    step = KeepZeros()
    step.prepare(masked)
    train(masked)
    step.finish(masked)
    assert torch.equal(masked[4].weight == 0, mask)
    qat = QAT(scheme=Scheme.parse("W4A16_ASYM,group_size=32"), targets=("4",))
    for one in (step, qat):
        one.prepare(both)
    train(both)
    for one in (step, qat):
        one.finish(both)
    w = both[4].weight.detach()
    assert bool((w[mask] == 0).all())
    assert torch.equal(RTN(scheme=qat.scheme).solve(w).decode(), w)
    with pytest.raises(BadInput, match="prune first"):
        step.prepare(network())


def test_what_cannot_be_trained_is_refused() -> None:
    for name in ("Q4_K", "NF4", "W2A16_BINARY", "NVFP4A16", "FP8A16"):
        with pytest.raises(Unsupported, match="nearest"):
            QAT(scheme=Scheme.parse(name)).prepare(network())
    with pytest.raises(BadInput, match="group_size=48"):
        QAT(scheme=Scheme.parse("W4A16,group_size=48")).prepare(network())
    with pytest.raises(BadInput, match="nowhere"):
        QAT(targets=("nowhere",)).prepare(network())
    with pytest.raises(BadInput, match="rank"):
        Lora(rank=0)
    with pytest.raises(BadInput, match="nowhere"):
        Lora(targets=("nowhere",)).prepare(network())


def test_a_ternary_graph_lies_in_two_bits_and_runs(tmp_path: Path) -> None:
    """Trained with qat, captured, compressed by rtn: the file's answers are the trained module's."""
    import numpy as np
    import onnxruntime

    from wherry import api
    from wherry.capture import capture
    from wherry.checkpoint import Checkpoint

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(64 * 36, 10))  # fmt: skip
    steps = [QAT(scheme=Scheme.parse("W1A16,group_size=-1"), portable=False, targets=("2",)),
             QAT(scheme=Scheme.parse("W1.58A16,group_size=-1"), portable=False, targets=("0", "5"))]  # fmt: skip
    for step in steps:
        step.prepare(net)
    train(net, 4)
    for step in steps:
        step.finish(net)
    x = torch.randn(5, 3, 8, 8)
    capture(net, tmp_path / "m", {"input": x})
    api.compress(str(tmp_path / "m" / "model.onnx"), tmp_path / "o", recipe="rtn:scheme=W1.58A16,group_size=-1")
    session = onnxruntime.InferenceSession(str(tmp_path / "o" / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {"input": x.numpy()})[0]
    wanted = net.eval()(x).detach().numpy()
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    packed = Checkpoint.open(tmp_path / "o")
    for name in packed.graph.layers:
        assert packed.scheme(name).bits == 2
    size = sum(f.stat().st_size for f in (tmp_path / "o").glob("model.onnx*"))
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert size < weights / 4 + 9000  # two bits each, and the graph


def test_a_grid_is_not_rounded_away_by_the_models_dtype(tmp_path: Path) -> None:
    from tests.conftest import write_llama
    from wherry.train import student

    for stored, scheme, wanted in ((torch.bfloat16, "W2A16,group_size=32", torch.float32),
                                   (torch.float16, "W4A16_ASYM,group_size=32", torch.float16),
                                   (torch.float16, "W8A16,group_size=32", torch.float32)):  # fmt: skip
        folder = write_llama(tmp_path / scheme, layers=1)
        made = student.opened(folder)
        made.checkpoint.source.dtype = lambda name, stored=stored: stored
        step = QAT(scheme=Scheme.parse(scheme))
        step.prepare(made.module, made.checkpoint)
        step.finish(made.module, made.checkpoint)
        w = made.module.model.layers[0].mlp.up_proj.weight.detach().clone()
        out = tmp_path / f"{scheme}-out"
        out.mkdir()
        student.write(made, out)
        written = student.opened(out)
        assert written.checkpoint.source.dtype("model.layers.0.mlp.up_proj.weight") is wanted
        assert torch.equal(written.module.model.layers[0].mlp.up_proj.weight, w)
