"""The table of operators: what runs for each, and what is built instead where more is known.

    @runs("Name", ...)     a function of tensors (inputs, then attributes by name) that does what the operator does. It
                           is called in the torch graph, and at once when all that it is given is known
    @builds("Name", ...)   a function of the builder and the node that may give a layer or Python ints instead, or
                           NotImplemented: then what runs is taken
Names outside of ONNX's own domain are written "com.microsoft::Name".
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_origin

from wherry.formats.onnx.torch_module.values import Node

F = TypeVar("F", bound=Callable)


@dataclass
class Operator:
    """One operator: see above. `ints`: inputs that are wanted as Python ints (-1: all of them)."""

    run: Callable | None = None
    build: Callable | None = None
    ints: tuple[int, ...] = ()
    fold: bool = True  # known inputs give a known output: not for random numbers
    rename: dict[str, tuple[str, Any]] = field(default_factory=dict)  # attribute -> (argument, default)
    accepts: set[str] | None = None  # attributes; None: any
    many: bool = False  # returns a tuple of outputs


TABLE: dict[tuple[str, str], Operator] = {}


def _entry(name: str) -> Operator:
    domain, _, kind = name.rpartition("::")
    return TABLE.setdefault((domain, kind), Operator())


def runs(*names: str, ints: tuple[int, ...] = (), fold: bool = True) -> Callable[[F], F]:
    """Register the decorated function of tensors as what these operators do."""

    def register(function: F) -> F:
        signature = inspect.signature(function)
        for name in names:
            entry = _entry(name)
            entry.run, entry.ints, entry.fold = function, ints, fold
            entry.accepts = set(signature.parameters)
            entry.many = get_origin(signature.return_annotation) is tuple
        return function

    return register


def is_torch(name: str, function: Callable, **rename: tuple[str, Any]) -> None:
    """Register a function of torch itself: `attribute=("argument of torch", default)`."""
    entry = _entry(name)
    entry.run, entry.rename, entry.accepts = function, rename, set(rename)


def builds(*names: str) -> Callable[[F], F]:
    """Register the decorated function (builder, node) -> values."""

    def register(function: F) -> F:
        for name in names:
            _entry(name).build = function
        return function

    return register


def arguments(operator: Operator, node: Node) -> dict[str, Any]:
    """Attributes of the node as keyword arguments of what runs."""
    given = {operator.rename[k][0] if k in operator.rename else k: v for k, v in node.facts.items()}
    defaults = {argument: value for argument, value in operator.rename.values() if argument is not None}
    return {k: v for k, v in {**defaults, **given}.items() if k is not None}
