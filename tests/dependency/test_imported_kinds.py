"""Each kind of tie between lanes on a module read from ONNX: the same groups as before, and pruned == masked."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.dependency.test_random_graphs import equal, parts_of
from wherry import dependency
from wherry.capture import capture
from wherry.formats.onnx.torch_module import module as imported


class Picture(nn.Module):
    """A stem, one construction, and a head over what it gives."""

    def __init__(self, layers: dict[str, nn.Module], build: Callable[..., torch.Tensor], width: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 5, 1)
        self.layers, self.build = nn.ModuleDict(layers), build

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.head(self.build(self.layers, F.relu(self.stem(x)))).mean((2, 3)),)


class Attention(nn.Module):
    """Grouped queries: four heads over two of keys, a residual, and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.q, self.o = nn.Linear(12, 24), nn.Linear(24, 16), nn.Linear(16, 24)
        self.k, self.v = nn.Linear(24, 8), nn.Linear(24, 8)
        self.up, self.gate, self.down = nn.Linear(24, 20), nn.Linear(24, 20), nn.Linear(20, 24)
        self.out = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        t = self.enter(x)
        q = self.q(t).view(-1, 6, 4, 4).transpose(1, 2)
        k, v = (f(t).view(-1, 6, 2, 4).transpose(1, 2) for f in (self.k, self.v))
        k, v = (z[:, :, None].expand(-1, 2, 2, 6, 4).reshape(-1, 4, 6, 4) for z in (k, v))
        a = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        t = t + self.o(a.transpose(1, 2).flatten(2))
        return (self.out(t + self.down(F.silu(self.gate(t)) * self.up(t))),)


class Tied(nn.Module):
    """One table that is looked up and is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        t = self.table(x)
        return (F.linear(t + torch.relu(self.mix(t)), self.table.weight),)


def conv(before: int, after: int, size: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, groups=groups)


def gated(p: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    a, b = p["a"](x).chunk(2, 1)
    return p["b"](a * b.sigmoid())


KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Picture(
        {"a": conv(8, 6), "b": conv(6, 8, 3)}, lambda p, x: x + p["b"](F.gelu(p["a"](x))), 8
    ),
    "concat": lambda: Picture(
        {"a": conv(8, 6), "b": conv(8, 4, 3)}, lambda p, x: torch.cat([p["a"](x), x, p["b"](x)], 1), 18
    ),
    "grouped": lambda: Picture({"a": conv(8, 16, 3, 4)}, lambda p, x: torch.relu(p["a"](x)), 16),
    "depthwise": lambda: Picture(
        {"a": conv(8, 8, 3, 8), "b": conv(8, 12)}, lambda p, x: p["b"](F.relu(p["a"](x) + x)), 12
    ),
    "upsampling": lambda: Picture(
        {"a": nn.ConvTranspose2d(8, 12, 2, 2), "b": nn.ConvTranspose2d(12, 8, 2, 2, groups=2)},
        lambda p, x: p["b"](F.relu(p["a"](x))), 8,
    ),
    "gate": lambda: Picture({"a": conv(8, 20), "b": conv(10, 8)}, gated, 8),
    "squeeze": lambda: Picture(
        {"a": conv(8, 6), "b": conv(6, 8)},
        lambda p, x: x * p["b"](F.relu(p["a"](x.mean((2, 3), keepdim=True)))).sigmoid(), 8,
    ),
    "norm": lambda: Picture(
        {"a": conv(8, 12), "n": nn.BatchNorm2d(12), "b": conv(12, 16), "g": nn.GroupNorm(8, 16)},
        lambda p, x: p["g"](p["b"](F.silu(p["n"](p["a"](x))))), 16,
    ),
    "attention": Attention,
    "tied": Tied,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ties_after_onnx(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = KINDS[kind]().eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    x = {"attention": torch.randn(2, 6, 12), "tied": torch.arange(8).reshape(2, 4)}.get(kind, torch.randn(2, 3, 8, 8))
    capture(net, tmp_path / "graph", {"x": x})
    read = imported(tmp_path / "graph" / "model.onnx")
    sizes = [sorted(map(len, dependency.graph(m, {"x": x}).families())) for m in (torch.fx.symbolic_trace(net), read)]
    assert sizes[0] == sizes[1]
    gone = 0
    for seed in range(4):
        masked, small, count, _ = parts_of(read, x, random.Random(seed).randrange(1000))
        gone += count
        equal(masked, small, x)
    assert gone
