"""Steps: from a method's name and its knobs as text to a Pass, and what two steps beside each other mean."""

from typing import Any

from wherry import shelf
from wherry.errors import BadInput, Unsupported
from wherry.gait import Pass, Pruner
from wherry.knobs import values
from wherry.scheme import Scheme
from wherry.shelf import suggest

SHELVES = ("quant", "prune", "distill")  # where a recipe's steps stand


def kind(method: str) -> type[Pass]:
    """The class of a method, from the first shelf that has it. Raises Unsupported: no such method."""
    name, known = method.replace("-", "_"), {place: shelf.names(place) for place in SHELVES}
    for place, names in known.items():
        if name in names:
            found = shelf.load(place, name)
            if not issubclass(found, Pass):
                raise Unsupported(f"{method} is a step of training recipes: wherry train --recipe '{method}'")
            return found
    every = [name for names in known.values() for name in names]
    raise Unsupported(f"no '{name}' in {', '.join(SHELVES)}{suggest(name, every)}; there are: {', '.join(every)}")


def build(method: str, knobs: dict[str, Any]) -> Pass:
    """A pass from its name and its knobs as text or YAML values.

    Raises:
        Unsupported: no such method; BadInput: no such knob, or a value of the wrong type.
    """
    made_of = kind(method)
    made = made_of(**values(made_of, method, knobs, made_of.knobs()))
    if made.embedding != "keep":
        Scheme.parse(made.embedding)
    return made


def shares(step: Pass, after: Pass | None) -> bool:
    """Whether a step only says how much the one after it prunes. Raises BadInput where no such one comes after it."""
    alone = step.gait == "zeros" and not hasattr(step, "prune")
    if alone and not isinstance(after, Pruner):
        raise BadInput(f"{step.method} says how much is pruned: a step that prunes comes after it, like wanda")
    if alone and isinstance(after, Pruner) and after.by_itself:
        raise BadInput(f"{after} says itself how much each layer takes: leave {step.method} out, or that knob")
    return alone
