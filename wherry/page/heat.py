"""Heat: the error of every quantized tensor as a picture, layer by kind, on one scale of even lightness."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wherry.page.figure import Figure
from wherry.report import Row

STEPS = 9  # colours of the heat map, of even distance in lightness


@dataclass(frozen=True)
class Cell:
    """One tensor: its error in %, and its step on the colour scale."""

    figure: Figure
    step: int
    worst: bool


@dataclass(frozen=True)
class Heat:
    """kinds: column heads. layers: (number, a cell or None per kind). outside: (name, cell). worst: (name, figure)."""

    kinds: list[Figure]
    layers: list[tuple[Figure, list[Cell | None]]]
    outside: list[tuple[Figure, Cell]]
    worst: list[tuple[Figure, Figure]]
    least: Figure
    most: Figure

    @classmethod
    def of(cls, rows: Sequence[Row], errors: dict[str, int]) -> "Heat":
        """Sort tensors into the picture by the number in their name; errors: {tensor: index of its row}."""
        value = {name: float(rows[i].value or 0) for name, i in errors.items()}
        ranked = sorted(value, key=lambda name: -value[name])
        inside = [name for name in ranked if re.search(r"\.\d+\.", name)] or ranked
        low, high = value[inside[-1]], value[inside[0]]
        worst = set(ranked[:3])

        def percent(name: str) -> Figure:
            return Figure(errors[name], "value", f"{100 * value[name]:.{1 if value[name] >= 0.01 else 2}f}", "%")

        def cell(name: str) -> Cell:
            step = round((STEPS - 1) * (min(max(value[name], low), high) - low) / (high - low)) if high > low else 0
            return Cell(percent(name), step, name in worst and high > low)

        places: dict[int, dict[str, str]] = {}
        outside = []
        for name in errors:
            match = re.search(r"\.(\d+)\.(.+)$", name)
            if match:
                places.setdefault(int(match[1]), {})[match[2]] = name
            else:
                label = name.removesuffix(".weight").rpartition(".")[2]
                outside.append((Figure(errors[name], "where", label), cell(name)))
        full = list(dict.fromkeys(kind for line in places.values() for kind in line))
        labels = short(full)
        first = {kind: next(line[kind] for line in places.values() if kind in line) for kind in full}
        kinds = [Figure(errors[first[kind]], "where", label) for kind, label in zip(full, labels, strict=True)]
        layers = []
        for number, line in sorted(places.items()):
            layer = Figure(errors[next(iter(line.values()))], "where", str(number))
            layers.append((layer, [cell(line[kind]) if kind in line else None for kind in full]))
        named = [(Figure(errors[name], "where", name), percent(name)) for name in ranked[:5]]
        return cls(kinds, layers, outside, named, percent(inside[-1]), percent(inside[0]))


def short(kinds: list[str]) -> list[str]:
    """The shortest ends of dotted names that still tell them apart: self_attn.q_proj.weight -> q."""
    parts = [[p for p in kind.removesuffix(".weight").split(".") if p != "dense"] for kind in kinds]
    labels = [name[-1:] for name in parts]
    for i, name in enumerate(parts):
        if [tuple(x) for x in labels].count(tuple(labels[i])) > 1 and len(name) > 1:
            same = [j for j in range(len(parts)) if labels[j] == labels[i]]
            deepest = max(same, key=lambda j: len(parts[j]))
            labels[deepest] = parts[deepest][-2:]
    return [" ".join(label).removesuffix("_proj").replace("_", " ") for label in labels]
