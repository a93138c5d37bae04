"""Curves: what a training run did over its updates, as lines; every point is a row `curve: NAME` of the report."""

from collections.abc import Sequence
from dataclasses import dataclass

from wherry.page.figure import Figure, number
from wherry.report import Row

WIDE, HIGH = 1000, 200  # of the SVG's own units; it is stretched to the page
# what, heading on the page, whether its axis begins at zero
SERIES = (
    ("training loss", "Loss on what it learns from", False),
    ("held-out loss", "Loss on held-out data", False),
    ("samples per second", "Samples per second, mean since the start", True),
)


@dataclass(frozen=True)
class Curve:
    """One line. low, high: values at the bottom and the top; first, last: updates at the left and the right end.

    points: the SVG's, x right and y down. ends: figures at the first and the last point, and their updates; most and
    least: the largest and the smallest value. left, right, top, bottom: ends of the axes; bottom: None for zero.
    """

    name: str
    heading: str
    points: str
    low: float
    high: float
    first: int
    last: int
    most: Figure
    least: Figure
    begins: tuple[Figure, Figure]
    finishes: tuple[Figure, Figure]
    left: Figure
    right: Figure
    top: Figure
    bottom: Figure | None


def curves(rows: Sequence[Row]) -> list[Curve]:
    """One for each series with two points or more. The losses share one axis of values, all share that of updates."""
    found = {what: _series(rows, what) for what, _, _ in SERIES}
    found = {what: line for what, line in found.items() if len(line) > 1}
    every = sorted((update, i) for line in found.values() for i, update, _ in line)
    losses = [point for what, line in found.items() for point in line if what.endswith("loss")]
    made = []
    for what, heading, from_zero in SERIES:
        if what not in found:
            continue
        line = found[what]
        points = sorted(line if from_zero else losses, key=lambda point: point[2])
        low, high = 0.0 if from_zero else points[0][2], points[-1][2]
        (first, left), (last, right) = every[0], every[-1]

        def place(update: int, value: float, low: float = low, high: float = high, first: int = first,
                  last: int = last) -> str:  # fmt: skip
            x = WIDE * (update - first) / ((last - first) or 1)
            y = HIGH * (high - value) / ((high - low) or 1)
            return f"{x:.2f},{y:.2f}"

        most, least = max(line, key=lambda p: p[2])[0], min(line, key=lambda p: p[2])[0]
        made.append(Curve(
            what, heading, " ".join(place(update, value) for _, update, value in line), low, high, first, last,
            _value(rows, most), _value(rows, least),
            (_value(rows, line[0][0]), _update(rows, line[0][0])),
            (_value(rows, line[-1][0]), _update(rows, line[-1][0])), _update(rows, left), _update(rows, right),
            _value(rows, points[-1][0]), None if from_zero else _value(rows, points[0][0]),
        ))  # fmt: skip
    return made


def _series(rows: Sequence[Row], what: str) -> list[tuple[int, int, float]]:
    """(index of the row, update, value) in the order of updates."""
    found = [
        (i, int(row.where.removeprefix("update ")), float(row.value))
        for i, row in enumerate(rows)
        if row.what == f"curve: {what}" and isinstance(row.value, int | float)
    ]
    return sorted(found, key=lambda point: point[1])


def _value(rows: Sequence[Row], i: int) -> Figure:
    return Figure(i, "value", *number(float(rows[i].value or 0), rows[i].unit))


def _update(rows: Sequence[Row], i: int) -> Figure:
    return Figure(i, "where", rows[i].where)
