"""Knobs: the fields of a step as text: "METHOD:knob=value,knob=value | METHOD ...", read, checked and written."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wherry.errors import BadInput
from wherry.scheme import OPTIONS, Scheme, one_grain
from wherry.shelf import suggest

SCHEMES = OPTIONS[:4]  # knobs of their own that are parts of the knob `scheme`


def split(text: str, word: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Method and knobs of each step of a recipe; `word` is what errors call a step. Raises BadInput."""
    for part in text.split("|"):
        method, _, rest = part.strip().partition(":")
        if not method:
            raise BadInput(f"recipe '{text}' has an empty step; write {word}:knob=value,knob=value")
        knobs: dict[str, str] = {}
        for item in filter(None, re.split(r",(?=[A-Za-z_]\w*=)", rest)):
            key, equals, value = item.partition("=")
            if not equals:
                raise BadInput(f"recipe '{text}': '{item}' is not knob=value")
            key, last = key.strip(), next(reversed(knobs), "")
            if key in knobs and (key, last) == ("group_size", "embedding"):  # of the embedding's own scheme
                knobs[last] += f",{key}={value.strip()}"
            elif key in knobs:
                raise BadInput(f"recipe '{text}': {method.strip()} has {key} twice; give it once")
            else:
                knobs[key] = value.strip()
        yield method.strip(), knobs


def values(kind: type, method: str, knobs: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The fields of a step's class from knobs as text or YAML values.

    Raises BadInput: no such knob, or a value of the wrong type.
    """
    hints, out = get_type_hints(kind), {}
    parts = [key for key in SCHEMES if key in knobs and key not in known and "scheme" in known]
    every = [*(key for key in SCHEMES if key not in known and "scheme" in known), *known]
    for name, value in knobs.items():
        if name not in known and name not in parts:
            raise BadInput(f"{method} has no knob '{name}'{suggest(str(name), every)}; it has: {', '.join(every)}")
        if name in known:
            out[name] = coerce(method, name, value, hints[name])
    one_grain(parts)
    for key in parts:
        scheme = out.get("scheme", next(f.default for f in dataclasses.fields(kind) if f.name == "scheme"))
        out["scheme"] = scheme.option(key, str(knobs[key]))
    return out


def spell(step: Any, names: Sequence[str], always: Sequence[str] = ()) -> str:
    """A step as text: the knobs of these names that are not at their default, and those that `always` stand there."""
    out = []
    for item in (item for item in dataclasses.fields(step) if item.name in names):
        value = getattr(step, item.name)
        if item.name in always or value != item.default:
            out.append(f"{item.name}={';'.join(value) if isinstance(value, tuple) else value}")
    return f"{step.method}:{','.join(out)}".rstrip(":")


def coerce(method: str, name: str, value: Any, kind: Any) -> Any:
    """A knob's value as the type that its field declares."""
    if kind is Scheme:
        return Scheme.parse(str(value))
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise BadInput(f"{method}: {name}={value} is not true or false")
    if kind in (int, float):
        try:
            return kind(value)
        except (ValueError, TypeError) as error:
            raise BadInput(
                f"{method}: {name}={value} is not {'a whole number' if kind is int else 'a number'}"
            ) from error
    if get_origin(kind) is Literal and str(value) not in get_args(kind):
        raise BadInput(
            f"{method}: {name}={value} is none of {', '.join(get_args(kind))}{suggest(str(value), get_args(kind))}"
        )
    if get_args(kind)[:1] == (str,):
        return tuple(value) if isinstance(value, list | tuple) else tuple(str(value).split(";"))
    return str(value)
