"""Figure: a field of a report row as a person reads it, and how numbers are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

SCALES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Figure:
    """A field of a row as a person reads it."""

    row: int
    field: str
    text: str
    unit: str = ""


def size_of(parts: Iterable[int]) -> str:
    """Bytes in all, as text."""
    return " ".join(number(float(sum(parts)), "B"))


def plain(x: float, like: float | None = None) -> str:
    """A number with about four significant digits (two when small), no exponent; `like` fixes the decimals."""
    size = abs(x if like is None else like)
    if 0 < size < 1e-7:
        return f"{x:.1e}"
    if 0 < size < 0.01:
        return f"{x:.{2 - math.floor(math.log10(size)) - 1}f}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4
    return f"{x:,.{digits}f}"


def number(x: float, unit: str, like: float | None = None) -> tuple[str, str]:
    """A value and its unit as shown: bytes as kB, MB, GB; shares as %; rates without false digits."""
    size = abs(x if like is None else like)
    if unit == "B":
        for name, scale in SCALES:
            if size >= scale:
                return f"{x / scale:,.{2 if size < 10 * scale else 1 if size < 100 * scale else 0}f}", name
        return f"{x:,.0f}", "B"
    if unit.endswith("/s"):
        return (f"{x:,.0f}" if size >= 100 else f"{x:.1f}" if size >= 10 else f"{x:.2f}"), unit
    if unit == "%":
        return f"{x:.1f}", unit
    if unit == "bits":
        return f"{x:.2f}", ""
    if unit == "s" and size < 1:
        return (f"{1000 * x:,.0f}" if size >= 0.1 else f"{1000 * x:.1f}"), "ms"
    return plain(x, like), unit
