"""If, Loop and Scan: inner graphs become inner modules. An If whose condition is known is its branch alone."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from wherry.errors import Unsupported
from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.table import builds
from wherry.formats.onnx.torch_module.values import Constant, Ints, Node


class Branch(nn.Module):
    """One of two inner modules, by a condition; torch.cond where torch is exporting."""

    def __init__(self, then: fx.GraphModule, otherwise: fx.GraphModule) -> None:
        super().__init__()
        self.then, self.otherwise = then, otherwise

    def forward(self, condition: Any, *captured: Any) -> tuple:
        """The outputs of the branch that `condition` (a bool, or a tensor of one) chooses."""
        if torch.compiler.is_exporting() and isinstance(condition, Tensor):
            # what comes out may not be what went in
            then = lambda *given: tuple(y.clone() for y in self.then(*given))  # noqa: E731
            otherwise = lambda *given: tuple(y.clone() for y in self.otherwise(*given))  # noqa: E731
            return tuple(torch.cond(condition.reshape(()), then, otherwise, captured))
        return self.then(*captured) if bool(condition) else self.otherwise(*captured)


class Loop(nn.Module):
    """The body again and again: at most `count` times, while its condition holds."""

    def __init__(self, body: fx.GraphModule, carried: int) -> None:
        super().__init__()
        self.body, self.carried = body, carried

    def forward(self, count: Any, condition: Any, states: list[Any], *captured: Any) -> list[Any]:
        """The last states, then what each step put out, stacked."""
        go = True if condition is None else bool(condition)
        step, kept = 0, []
        while go and (count is None or step < int(count)):
            again, *rest = self.body(torch.tensor(step), torch.tensor(go), *states, *captured)
            states, go = rest[: self.carried], bool(again)
            kept.append(rest[self.carried :])
            step += 1
        return [*states, *[torch.stack(parts) for parts in zip(*kept, strict=True)]]


class Scan(nn.Module):
    """The body for each slice of its inputs."""

    def __init__(self, body: fx.GraphModule, states: int, facts: dict[str, Any], slices: int) -> None:
        super().__init__()
        self.body, self.states, self.facts, self.slices = body, states, facts, slices

    def forward(self, inputs: list[Tensor], *captured: Any) -> list[Any]:
        """The last states, then what each step put out, stacked."""
        states, xs = list(inputs[: self.states]), inputs[self.states :]
        axes = self.facts.get("scan_input_axes") or [0] * len(xs)
        back = self.facts.get("scan_input_directions") or [0] * len(xs)
        count = xs[0].shape[axes[0]]
        kept: list[list[Tensor]] = []
        for step in range(count):
            parts = [x.select(a, count - 1 - step if d else step) for x, a, d in zip(xs, axes, back, strict=True)]
            out = self.body(*states, *parts, *captured)
            states = list(out[: self.states])
            kept.append(list(out[self.states :]))
        columns = [list(column) for column in zip(*kept, strict=True)]
        out_axes = self.facts.get("scan_output_axes") or [0] * len(columns)
        out_back = self.facts.get("scan_output_directions") or [0] * len(columns)
        return [*states, *[
            torch.stack(c[::-1] if d else c, a) for c, a, d in zip(columns, out_axes, out_back, strict=True)
        ]]  # fmt: skip


def inner(b: Builder, graph: Any, captured: list[str] | None = None) -> tuple[fx.GraphModule, list[str]]:
    """The module of an inner graph, and the outer names that it reads, which are its last inputs.

    captured: names that it is to take in this order, more than it reads perhaps (both branches of an If take the same).
    """
    child = Builder(graph, b.opsets, b, b.symbolic)
    child.constants()
    for value in graph.input:
        child.env[value.name] = child.graph.placeholder(child.safe(value.name))
    for name in captured or []:
        child.get(name)
    child.build()
    values = [child.tensor(child.get(o.name)) for o in graph.output]
    child.graph.output(tuple(values))
    order = {p: i for i, p in enumerate(n for n in child.graph.nodes if n.op == "placeholder")}
    first = next((n for n in child.graph.nodes if n.op != "placeholder"), None)
    for p in order:  # inputs stand before all else
        if first is not None:
            first.prepend(p)
    return fx.GraphModule(child.root, child.graph, "Inner"), list(child.captured)


def outer_values(b: Builder, names: list[str]) -> list[Any]:
    """What the graph around gives an inner one."""
    return [b.tensor(b.get(name)) for name in names]


@builds("If")
def _if(b: Builder, node: Node) -> Any:
    condition = b.get(node.inputs[0])
    known = b.known(condition)
    if known is not None:
        graph = node.facts["then_branch" if bool(known) else "else_branch"]
        return inline(b, graph)
    _, first = inner(b, node.facts["then_branch"])
    _, second = inner(b, node.facts["else_branch"])
    both = list(dict.fromkeys(first + second))
    asked = condition.items[0] if isinstance(condition, Ints) else b.tensor(condition)
    then, _ = inner(b, node.facts["then_branch"], both)
    otherwise, _ = inner(b, node.facts["else_branch"], both)
    out = b.layer(Branch(then, otherwise), b.place(node), asked, *outer_values(b, both))
    return b.items(out, len(node.outputs))


def inline(b: Builder, graph: Any) -> list[Any]:
    """The nodes of an inner graph as nodes of this one."""
    saved, here = b.scope(graph), b.node
    b.constants()
    b.build()
    results = [b.get(o.name) for o in graph.output]
    b.restore(saved)
    b.node = here
    return results


@builds("Loop")
def _loop(b: Builder, node: Node) -> Any:
    count, condition, *states = b.inputs(node)
    body, names = inner(b, node.facts["body"])
    carried = len(states)
    args = [b.tensor(v) for v in states]
    out = b.layer(
        Loop(body, carried), b.place(node), b.tensor(count), b.tensor(condition), args, *outer_values(b, names)
    )
    return b.items(out, len(node.outputs))


@builds("Scan")
def _scan(b: Builder, node: Node) -> Any:
    if b.opsets.get("", 9) < 9:
        raise Unsupported(f"{node} of opset 8 is not imported")
    values = [b.tensor(v) for v in b.inputs(node)]
    slices = node.facts["num_scan_inputs"]
    body, names = inner(b, node.facts["body"])
    facts = {k: v for k, v in node.facts.items() if k != "body"}
    out = b.layer(Scan(body, len(values) - slices, facts, slices), b.place(node), values, *outer_values(b, names))
    return b.items(out, len(node.outputs))


@builds("Constant")
def _constant(b: Builder, node: Node) -> Any:
    facts = node.facts
    if "value" in facts:
        return Constant(facts["value"], node.outputs[0])
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64), ("value_floats", torch.float32),
                        ("value_ints", torch.int64)):  # fmt: skip
        if name in facts:
            return Constant(torch.tensor(facts[name], dtype=dtype), node.outputs[0])
    raise Unsupported(f"{node} holds {', '.join(facts) or 'nothing'}: only dense numbers are imported")
