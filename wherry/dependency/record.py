"""Record: one run of a module, as the list of tensor operators that it really called.

The run is eager: control flow, `.item()` and lists of layers are no obstacle, and composite functions arrive as the
ATen operators that they are made of. Cost: one forward pass; shapes are kept, and the tensors until the run is over.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from wherry.errors import BadInput


@dataclass(eq=False)
class Value:
    """One tensor of the run. name: of a parameter or buffer, else ""; kind: parameter, buffer, input or made."""

    shape: tuple[int, ...]
    kind: str = "made"
    name: str = ""
    uses: list["Op"] = field(default_factory=list, repr=False)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(eq=False)
class Op:
    """One call: ATen name without overload, arguments with Values in place of tensors, outputs."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value]
    pointwise: bool
    where: str = ""
    schema: Any = field(default=None, repr=False)

    def given(self, *names: str) -> list[Any]:
        """Arguments by their names in the operator's schema; a default where the call has none."""
        found = []
        for name in names:
            place, argument = next((i, a) for i, a in enumerate(self.schema.arguments) if a.name == name)
            default = argument.default_value if argument.has_default_value() else None
            found.append(self.args[place] if place < len(self.args) else self.kwargs.get(name, default))
        return found

    @property
    def values(self) -> list[Value]:
        """Tensors that it reads, then those that it makes."""
        read = [v for v in tree_flatten((self.args, self.kwargs))[0] if isinstance(v, Value)]
        return [*read, *self.outputs]

    def __str__(self) -> str:
        return f"{self.name} in {self.where}" if self.where else self.name


@dataclass
class Record:
    """A run: its operators in order, and the Values of parameters, buffers and results."""

    ops: list[Op]
    parameters: dict[str, Value]
    buffers: dict[str, Value]
    outputs: list[Value]
    alias: dict[str, str]  # second name of a tied parameter -> the first
    nodes: dict[str, Any] = field(default_factory=dict)  # of an fx graph: node's name -> Value or nest of Values


def run(module: nn.Module, inputs: Mapping[str, Any]) -> Record:
    """Run the module on example inputs (by name of forward's arguments) in eval mode and write down what it calls.

    Raises BadInput when the module does not run on these inputs.
    """
    taken = set(inspect.signature(module.forward).parameters)
    if unknown := set(inputs) - taken - ({*inputs} if "kwargs" in taken else set()):
        raise BadInput(f"forward has no argument '{sorted(unknown)[0]}'; it has: {', '.join(sorted(taken))}")
    training = module.training
    recorder = Recorder(module, inputs)
    handles = [m.register_forward_pre_hook(recorder.enter(n)) for n, m in module.named_modules()]
    try:
        with torch.no_grad(), recorder:
            result = recorder.call(module.eval(), inputs)
    except RuntimeError as error:
        raise BadInput(f"the module does not run on the example inputs: {str(error).splitlines()[0]}") from error
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    return recorder.finish(result)


class Recorder(TorchDispatchMode):
    """Writes operators down as they are called. A tensor changed in place becomes a new Value."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.alive: list[Any] = []  # an id is unique only while its tensor lives
        self.now: dict[int, Value] = {}
        self.shared: dict[int, set[int]] = {}  # storage -> ids of the tensors that look at it
        self.where = ""
        self.record = Record(self.ops, {}, {}, [], {})
        for kind, items in (("parameter", module.named_parameters), ("buffer", module.named_buffers)):
            for name, tensor in items(remove_duplicate=False):
                if id(tensor) in self.now:
                    self.record.alias[name] = self.now[id(tensor)].name
                    continue
                value = self.value(tensor, kind, name)
                (self.record.parameters if kind == "parameter" else self.record.buffers)[name] = value
        for tensor in tree_flatten(dict(inputs))[0]:
            if isinstance(tensor, Tensor):
                self.value(tensor, "input")

    def enter(self, name: str) -> Callable[..., None]:
        """A hook that notes which module runs."""

        def hook(*_: Any) -> None:
            self.where = name

        return hook

    def call(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The module's result; of an fx graph, node by node, so that each node's Values are known."""
        if not isinstance(module, torch.fx.GraphModule):
            return module(**inputs)
        recorder = self

        class Noting(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                result = super().run_node(n)
                recorder.alive.append(result)
                recorder.record.nodes[n.name] = tree_map(
                    lambda t: recorder.now.get(id(t)) if isinstance(t, Tensor) else None, result
                )
                return result

        order = [n.target for n in module.graph.nodes if n.op == "placeholder"]
        return Noting(module).run(*[inputs[name] for name in order if name in inputs])

    def value(self, tensor: Tensor, kind: str = "made", name: str = "") -> Value:
        """A new Value of a tensor; the tensor is that Value from now on."""
        made = Value(tuple(tensor.shape), kind, name)
        self.now[id(tensor)] = made
        self.alive.append(tensor)
        self.shared.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        return made

    def known(self, tensor: Tensor) -> Value:
        """The Value of a tensor that is read: a constant of the code where nothing has made it."""
        return self.now.get(id(tensor)) or self.value(tensor, "constant")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and write it down."""
        kwargs = kwargs or {}
        noted = tree_map(lambda t: self.known(t) if isinstance(t, Tensor) else t, (args, kwargs))
        pairs = zip(args, func._schema.arguments, strict=False)
        written = [a for a, s in pairs if s.alias_info and s.alias_info.is_write]
        seen = any(isinstance(t, Tensor) and len(self.shared[t.untyped_storage()._cdata]) > 1 for t in written)
        result = func(*args, **kwargs)
        outputs = [self.value(t) for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__ + (" on a view" if seen else "")
        read, named = noted
        if seen:  # what else looks at that memory changes too
            other = {i for t in written if isinstance(t, Tensor) for i in self.shared[t.untyped_storage()._cdata]}
            read = (*read, [self.now[i] for i in sorted(other) if i in self.now])
        op = Op(name, read, named, outputs, torch.Tag.pointwise in func.tags, self.where, func._schema)
        for value in dict.fromkeys(op.values):
            value.uses.append(op)
        self.ops.append(op)
        return result

    def finish(self, result: Any) -> Record:
        """The record, with the Values of the results."""
        flat = result.values() if isinstance(result, Mapping) else result
        tensors = [t for t in tree_flatten(flat if isinstance(flat, Tensor) else list(flat))[0]]
        self.record.outputs = [self.now[id(t)] for t in tensors if isinstance(t, Tensor) and id(t) in self.now]
        self.alive.clear()
        return self.record
