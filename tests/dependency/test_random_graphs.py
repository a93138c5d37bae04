"""The dependency graph's exact test: a module with lanes cut out equals the same module with their weights at zero."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wherry import dependency
from wherry.capture import capture
from wherry.dependency.cost import Cost
from wherry.dependency.cut import cut, mask_out
from wherry.errors import BadInput, Unsupported
from wherry.formats.onnx.torch_module import module as imported


class Net(nn.Module):
    """A seeded net: convolutions (plain, grouped, depthwise), residuals, concatenations, gates, then attention."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.kinds = [rng.choice(["conv", "residual", "grouped", "depthwise", "concat", "gate", "squeeze", "norm"])
                      for _ in range(6)]  # fmt: skip
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        width, self.parts = 16, nn.ModuleList()
        for kind in self.kinds:
            part = nn.ModuleDict()
            if kind == "conv":
                after = rng.choice([8, 16, 24])
                part["a"], part["n"] = nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
                width = after
            elif kind == "residual":
                part["a"], part["b"] = nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 3, padding=1)
            elif kind == "grouped":
                part["a"] = nn.Conv2d(width, 2 * width, 3, padding=1, groups=4)
                width *= 2
            elif kind == "depthwise":
                part["a"], part["b"] = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1)
            elif kind == "concat":
                part["a"], part["b"] = nn.Conv2d(width, 8, 1), nn.Conv2d(width, 4, 3, padding=1)
                width += 12
            elif kind == "gate":
                part["a"], part["b"] = nn.Conv2d(width, 2 * 10, 1), nn.Conv2d(10, width, 1)
            elif kind == "squeeze":
                part["a"], part["b"] = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 1)
            else:
                part["a"], part["n"] = nn.Conv2d(width, 16, 1), nn.GroupNorm(8, 16)
                width = 16
            self.parts.append(part)
        self.heads, self.keys, self.width = 4, rng.choice([1, 2, 4]), 4
        self.enter = nn.Linear(width, 24)
        self.q, self.o = nn.Linear(24, 16), nn.Linear(16, 24)
        self.k, self.v = nn.Linear(24, 4 * self.keys), nn.Linear(24, 4 * self.keys)
        self.up, self.gate, self.down = nn.Linear(24, 20), nn.Linear(24, 20), nn.Linear(20, 24)
        self.flat = nn.Linear(width * 16, 5)
        self.out = nn.Linear(24, 7)
        self.tied = nn.Linear(24, 7)
        self.tied.weight = self.out.weight
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = F.relu(self.stem(x))
        for kind, part in zip(self.kinds, self.parts, strict=True):
            if kind == "conv":
                x = F.silu(part["n"](part["a"](x)))
            elif kind == "residual":
                x = x + part["b"](F.gelu(part["a"](x)))
            elif kind == "grouped":
                x = torch.relu(part["a"](x))
            elif kind == "depthwise":
                x = x + part["b"](part["a"](x))
            elif kind == "concat":
                x = torch.cat([part["a"](x), x, part["b"](x)], 1)
            elif kind == "gate":
                a, b = part["a"](x).chunk(2, 1)
                x = x + part["b"](a * b.sigmoid())
            elif kind == "squeeze":
                x = x * part["b"](F.relu(part["a"](x.mean((2, 3), keepdim=True)))).sigmoid()
            else:
                x = part["n"](part["a"](x))
        x = F.avg_pool2d(x, 2)
        n, c = x.shape[:2]
        flat = self.flat(x.flatten(1))
        t = self.enter(x.reshape(n, c, 16).transpose(1, 2))
        q = self.q(t).view(n, 16, self.heads, 4).transpose(1, 2)
        k, v = (f(t).view(n, 16, self.keys, 4).transpose(1, 2) for f in (self.k, self.v))
        each = self.heads // self.keys
        k, v = (z[:, :, None].expand(n, self.keys, each, 16, 4).reshape(n, self.heads, 16, 4) for z in (k, v))
        a = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        t = t + self.o(a.transpose(1, 2).flatten(2))
        t = t + self.down(F.silu(self.gate(t)) * self.up(t))
        return flat, self.out(t.mean(1)), self.tied(torch.tanh(t)).sum(1)


def parts_of(
    module: nn.Module, x: torch.Tensor, seed: int, share: float = 0.6
) -> tuple[nn.Module, nn.Module, int, float]:
    """(masked, cut, number of groups gone, share of parameters left) for a random set of exact groups."""
    rng = random.Random(seed)
    graph = dependency.graph(module, {"x": x})
    gone: list[dependency.Group] = []
    for family in graph.families():
        exact = [group for group in family if not group.inexact]
        gone += rng.sample(exact, rng.randint(0, min(len(exact), max(1, int(share * len(family))))))
    while name := graph.empty(gone):
        gone = [group for group in gone if all(n != name for n, _ in group.lanes)]
    masked = mask_out(copy.deepcopy(module), graph, gone)
    small = cut(copy.deepcopy(module), graph, gone)
    before = sum(p.numel() for p in module.parameters())
    assert sum(p.numel() for p in small.parameters()) == Cost(graph).of(gone)["parameters"]
    return masked, small, len(gone), sum(p.numel() for p in small.parameters()) / before


def equal(masked: nn.Module, small: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        for a, b in zip(masked(x), small(x), strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("seed", range(6))
def test_random_masks_on_random_graphs(seed: int) -> None:
    torch.manual_seed(seed)
    net = torch.fx.symbolic_trace(Net(seed)).eval() if seed % 2 else Net(seed).eval()
    x = torch.randn(2, 3, 8, 8)
    traced = net if isinstance(net, torch.fx.GraphModule) else torch.fx.symbolic_trace(net).eval()
    gone = 0
    for draw in range(2):
        masked, small, count, left = parts_of(traced, x, 100 * seed + draw)
        gone += count
        assert left < 1 or not count
        equal(masked, small, x)
    assert gone


@pytest.mark.parametrize("seed", range(2))
def test_random_masks_on_a_module_imported_from_onnx(seed: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    net, x = Net(seed).eval(), torch.randn(2, 3, 8, 8)
    capture(net, tmp_path / "graph", {"x": x})
    module = imported(tmp_path / "graph" / "model.onnx")
    masked, small, count, _ = parts_of(module, x, seed)
    assert count
    equal(masked, small, x)
    capture(small, tmp_path / "small", {"x": x})  # compares with ONNX Runtime, at two batch sizes


def test_what_goes_together_in_a_small_net() -> None:
    """By hand: conv - norm - depthwise - add - conv. And grouped queries: two query heads over one head of keys."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.d = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.b = nn.Conv2d(4, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.n(self.a(x))
            return self.b(y + self.d(y))

    graph = dependency.graph(Small(), {"x": torch.randn(2, 3, 5, 5)})
    (family,) = graph.families()
    assert len(family) == 4
    wanted = {("a.weight", 0), ("a.bias", 0), ("n.weight", 0), ("n.bias", 0), ("n.running_mean", 0),
              ("n.running_var", 0), ("d.weight", 0), ("d.bias", 0), ("b.weight", 1)}  # fmt: skip
    assert family[2].places == wanted
    assert all(index.tolist() == [2] for index in family[2].lanes.values())


def test_a_shared_weight_goes_with_all_who_read_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            return (x + torch.relu(self.mix(x))) @ self.table.weight.T

    net = Tied().eval()
    graph = dependency.graph(net, {"ids": torch.arange(4)[None]})
    (family,) = graph.families()
    assert family[1].places == {("table.weight", 1), ("mix.weight", 0), ("mix.weight", 1), ("mix.bias", 0)}
    gone = family[:2]
    masked, small = mask_out(copy.deepcopy(net), graph, gone), cut(copy.deepcopy(net), graph, gone)
    torch.testing.assert_close(small(torch.arange(4)[None]), masked(torch.arange(4)[None]))


def test_an_unknown_operator_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.matrix_exp(self.a(x).reshape(-1, 2, 2)).flatten(1)

    with pytest.raises(Unsupported, match="linalg_matrix_exp"):
        dependency.graph(Odd(), {"x": torch.randn(2, 4)})


def test_lanes_that_must_stay_say_why() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 3))
    graph = dependency.graph(net, {"input": torch.randn(2, 4)})
    reasons = {name: group.pinned for group in graph.groups for (name, d) in group.lanes if d == 0}
    assert "softmax" in reasons["0.weight"]
    assert "output" in reasons["2.weight"]
    assert not graph.families()
    with pytest.raises(BadInput, match="stay|keeps"):
        cut(net, graph, [next(g for g in graph.groups if g.pinned)])


def test_all_of_a_layer_cannot_go() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = dependency.graph(net, {"input": torch.randn(2, 4)})
    with pytest.raises(BadInput, match="all its channels"):
        cut(net, graph, graph.families()[0])


def test_writing_into_a_view_is_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y[:, 0] = y[:, 1] * 2
            return self.b(y)

    with pytest.raises(Unsupported, match="view"):
        dependency.graph(Writes(), {"x": torch.randn(2, 4)})


def test_a_size_in_the_code_of_a_traced_module_follows() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).view(-1, 3, 4)
            return self.b(F.pad(y[:, 1:], (0, 0, 1, 0)).reshape(-1, 12))

    net = torch.fx.symbolic_trace(Sized()).eval()
    x = torch.randn(5, 8)
    graph = dependency.graph(net, {"x": x})
    family = max(graph.families(), key=len)
    gone = [family[0]]
    masked, small = mask_out(copy.deepcopy(net), graph, gone), cut(copy.deepcopy(net), graph, gone)
    torch.testing.assert_close(small(x), masked(x))
    assert small.b.in_features < 12
