"""LSTM, GRU and RNN: with constant weights nn.LSTM, nn.GRU, nn.RNN, else (and for rare options) written out.

Shapes: x [time, batch, inputs] (layout 1: [batch, time, inputs]); ONNX outputs y [time, directions, batch, hidden].
        Gates: ONNX has i o f c and z r h; torch has i f g o and r z n.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import builds, runs
from wherry.formats.onnx.torch_module.values import Constant, Node

ORDER = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}  # ONNX's gates in torch's order
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def activation(name: str, alpha: float | None, beta: float | None) -> Callable[[Tensor], Tensor]:
    """One of the functions that ONNX names, any case."""

    def either(value: float | None, default: float) -> float:
        return default if value is None else value

    table: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": nn.functional.softsign,
        "softplus": nn.functional.softplus, "affine": lambda x: x * either(alpha, 1.0) + either(beta, 0.0),
        "leakyrelu": lambda x: nn.functional.leaky_relu(x, either(alpha, 0.01)),
        "hardsigmoid": lambda x: torch.clamp(x * either(alpha, 0.2) + either(beta, 0.5), 0, 1),
        "scaledtanh": lambda x: either(alpha, 1.0) * torch.tanh(either(beta, 1.0) * x),
        "elu": lambda x: nn.functional.elu(x, either(alpha, 1.0)),
        "thresholdedrelu": lambda x: torch.where(x >= either(alpha, 1.0), x, 0),
    }  # fmt: skip
    return table[name.lower()]


def walk(
    kind: str, x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, lengths: Tensor | None,
    states: list[Tensor | None], peephole: Tensor | None, direction: str, hidden: int, names: list[str] | None,
    alphas: list[float] | None, betas: list[float] | None, clip: float | None, layout: int, before: int, forget: int,
    outputs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All three kinds, step by step, direction by direction."""
    x = x.transpose(0, 1) if layout else x
    time, batch = x.shape[:2]
    states = [s.transpose(0, 1) if layout and s is not None else s for s in states]
    ways = 2 if direction == "bidirectional" else 1
    names = names or DEFAULTS[kind] * ways
    per = len(names) // ways
    finals: list[list[Tensor]] = [[] for _ in states]
    sides = []
    for d in range(ways):
        functions = []
        for i in range(d * per, d * per + per):
            functions.append(activation(names[i], *[v[i] if v and i < len(v) else None for v in (alphas, betas)]))
        backwards = direction == "reverse" or d == 1
        now = [x.new_zeros(batch, hidden) if s is None else s[d] for s in states]
        wb, rb = bias[d].chunk(2) if bias is not None else (x.new_zeros(w.shape[1]),) * 2
        ys: list[Tensor] = [x.new_zeros(0)] * time
        for step in range(time)[:: -1 if backwards else 1]:
            new = cell(kind, x[step], w[d], r[d], wb, rb, now, None if peephole is None else peephole[d], functions,
                       clip, before, forget)  # fmt: skip
            if lengths is not None:
                live = (step < lengths)[:, None]
                ys[step] = torch.where(live, new[0], 0)
                now = [torch.where(live, n, o) for n, o in zip(new, now, strict=True)]
            else:
                ys[step], now = new[0], new
        sides.append(torch.stack(ys))
        for final, state in zip(finals, now, strict=True):
            final.append(state)
    y, ends = torch.stack(sides, 1), [torch.stack(f) for f in finals]
    if layout:
        y, ends = y.permute(2, 0, 1, 3), [e.transpose(0, 1) for e in ends]
    return (y, *ends)[:outputs]


def cell(
    kind: str, x: Tensor, w: Tensor, r: Tensor, wb: Tensor, rb: Tensor, now: list[Tensor], p: Tensor | None,
    f: list[Callable[[Tensor], Tensor]], clip: float | None, before: int, forget: int,
) -> list[Tensor]:  # fmt: skip
    """One step: the new states, the output first."""

    def cut(v: Tensor) -> Tensor:
        return v if clip is None else v.clamp(-clip, clip)

    h = now[0]
    if kind == "RNN":
        return [f[0](cut(x @ w.t() + wb + h @ r.t() + rb))]
    if kind == "LSTM":
        i, o, g, c = (x @ w.t() + wb + h @ r.t() + rb).chunk(4, -1)
        old = now[1]
        pi, po, pf = p.chunk(3) if p is not None else (0, 0, 0)
        i = f[0](cut(i + pi * old))
        g = f[0](cut(g + pf * old)) if not forget else 1 - i
        new = g * old + i * f[1](cut(c))
        return [f[0](cut(o + po * new)) * f[2](new), new]
    gate, recurrent = (x @ w.t() + wb).chunk(3, -1), r.chunk(3)
    rz, rr, rh = rb.chunk(3)
    z = f[0](cut(gate[0] + h @ recurrent[0].t() + rz))
    reset = f[0](cut(gate[1] + h @ recurrent[1].t() + rr))
    inner = reset * (h @ recurrent[2].t() + rh) if before else (reset * h) @ recurrent[2].t() + rh
    return [(1 - z) * f[1](cut(gate[2] + inner)) + z * h]


@runs("LSTM")
def lstm(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None, c: Tensor | None = None, peephole: Tensor | None = None, *, hidden_size: int,
    direction: str = "forward", activations: list[str] | None = None, activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None, clip: float | None = None, layout: int = 0, input_forget: int = 0,
    outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs, last output, last memory."""
    return walk("LSTM", x, w, r, bias, lengths, [h, c], peephole, direction, hidden_size, activations, activation_alpha,
                activation_beta, clip, layout, 0, input_forget, outputs)  # fmt: skip


@runs("GRU")
def gru(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None, *, hidden_size: int, direction: str = "forward", activations: list[str] | None = None,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None, clip: float | None = None,
    layout: int = 0, linear_before_reset: int = 0, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs and the last output."""
    return walk("GRU", x, w, r, bias, lengths, [h], None, direction, hidden_size, activations, activation_alpha,
                activation_beta, clip, layout, linear_before_reset, 0, outputs)  # fmt: skip


@runs("RNN")
def rnn(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None, *, hidden_size: int, direction: str = "forward", activations: list[str] | None = None,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None, clip: float | None = None,
    layout: int = 0, outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs and the last output."""
    return walk("RNN", x, w, r, bias, lengths, [h], None, direction, hidden_size, activations, activation_alpha,
                activation_beta, clip, layout, 0, 0, outputs)  # fmt: skip


def plain(b: Builder, node: Node) -> dict[str, Any] | None:
    """Arguments of torch's layer, when it does what the node does."""
    facts, kind = node.facts, node.kind
    values = [*b.inputs(node), *[None] * 8][:8]
    if not isinstance(values[0], fx.Node) or not all(isinstance(v, Constant) for v in values[1:3]):
        return None
    if values[3] is not None and not isinstance(values[3], Constant) or values[7] is not None:
        return None
    if values[4] is not None or "clip" in facts or facts.get("layout") or facts.get("input_forget"):
        return None
    if kind == "GRU" and not facts.get("linear_before_reset"):
        return None
    ways = 2 if facts.get("direction", "forward") == "bidirectional" else 1
    names = [n.lower() for n in facts.get("activations", DEFAULTS[kind] * ways)]
    normal = [n.lower() for n in DEFAULTS[kind] * ways]
    if names != normal and not (kind == "RNN" and names == ["relu"] * ways):
        return None
    return {"nonlinearity": names[0]} if kind == "RNN" else {}


@builds("LSTM", "GRU", "RNN")
def _recurrent(b: Builder, node: Node) -> Any:
    more = plain(b, node)
    if more is None:
        return NotImplemented
    x, w, r, bias, _, *states = [*b.inputs(node), *[None] * 8][:7]
    kind, hidden = node.kind, node.facts["hidden_size"]
    direction = node.facts.get("direction", "forward")
    both = direction == "bidirectional"
    with torch.device("meta"):
        layer = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[kind](
            w.tensor.shape[2], hidden, bias=bias is not None, bidirectional=both, **more
        )
    for d in range(2 if both else 1):
        end = f"_l0{'_reverse' if d else ''}"
        parts = {f"weight_ih{end}": w.tensor[d], f"weight_hh{end}": r.tensor[d]}
        if bias is not None:
            parts[f"bias_ih{end}"], parts[f"bias_hh{end}"] = bias.tensor[d].chunk(2)
        for name, value in parts.items():
            gates = value.chunk(len(ORDER[kind]))
            setattr(layer, name, nn.Parameter(torch.cat([gates[i] for i in ORDER[kind]]).contiguous()))
    start = [None if fresh(s) else b.tensor(s) for s in states[: 2 if kind == "LSTM" else 1]]
    if any(s is not None for s in start):
        size = b.size(x, 1, None)
        zeros = b.call(torch.zeros, (2 if both else 1, size, hidden)) if any(s is None for s in start) else None
        start = [zeros if s is None else s for s in start]
    args: list[Any] = [b.call(torch.flip, x, [0]) if direction == "reverse" else x]
    if start[0] is not None:
        args.append((start[0], start[1]) if kind == "LSTM" else start[0])
    out = b.layer(layer, b.place(node, w), *args)
    y, end_states = b.call(operator.getitem, out, 0), b.call(operator.getitem, out, 1)
    if direction == "reverse":
        y = b.call(torch.flip, y, [0])
    ends = [b.call(operator.getitem, end_states, i) for i in range(2)] if kind == "LSTM" else [end_states]
    y = b.call(torch.unflatten, y, 2, (2, hidden)) if both else y  # [time, batch, ways, hidden]
    y = b.call(torch.transpose, y, 1, 2) if both else b.call(torch.unsqueeze, y, 1)
    return [y, *ends][: len(node.outputs)]


def fresh(state: Any) -> bool:
    """Whether a first state is left out, or is all zeros: then it holds for every batch."""
    return state is None or isinstance(state, Constant) and not bool(state.tensor.any())
