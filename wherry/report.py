"""Report: rows of (what, where, value, unit). Every verb returns or fills one; nothing is a dict of dicts."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wherry.errors import Corrupt

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Row:
    """One fact. `low` and `high` are the ends of a 95% interval where the value is a measured one."""

    what: str  # "perplexity", "bytes", "top-1 agreement", "weight error"
    where: str  # "gguf", "original", "model.layers.3.mlp.up_proj.weight", ""
    value: Value
    unit: str = ""  # "B", "nats/token", "tokens/s", "MB", "%", ""
    low: float | None = None
    high: float | None = None
    note: str = ""

    def text(self) -> str:
        """The value as a person reads it, with unit and interval."""
        if self.value is None:
            return f"not measured: {self.note}" if self.note else "not measured"
        out = f"{_number(self.value)} {self.unit}".strip()
        if self.low is not None and self.high is not None:
            out += f" [{_number(self.low)}, {_number(self.high)}]"
        return out


def _number(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


@dataclass
class Report:
    """A list of rows with a title; merged, printed as a table, saved as JSON, looked up by (what, where)."""

    title: str = ""
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        what: str,
        where: str,
        value: Value,
        unit: str = "",
        low: float | None = None,
        high: float | None = None,
        note: str = "",
    ) -> Row:
        """Append one row and return it."""
        row = Row(what, where, value, unit, low, high, note)
        self.rows.append(row)
        return row

    def extend(self, other: "Report") -> "Report":
        """Append the rows of another report; returns self."""
        self.rows.extend(other.rows)
        return self

    def get(self, what: str, where: str | None = None) -> Row | None:
        """The last row of that `what` (and `where`), or None."""
        for row in reversed(self.rows):
            if row.what == what and (where is None or row.where == where):
                return row
        return None

    def select(self, what: str) -> list[Row]:
        """All rows of that `what`, in order."""
        return [row for row in self.rows if row.what == what]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_json(self) -> str:
        """Rows as a JSON document; keys sorted, so that equal reports are equal bytes."""
        rows = [{k: v for k, v in asdict(row).items() if v not in (None, "")} for row in self.rows]
        return json.dumps({"title": self.title, "rows": rows}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def save(self, path: Path | str) -> None:
        """Write JSON to a temporary name, then rename."""
        write_atomic(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> "Report":
        """Read what `save` wrote. Raises Corrupt when it is not that."""
        return cls.from_json(Path(path).read_text(encoding="utf8"), str(path))

    @classmethod
    def from_json(cls, text: str, origin: str) -> "Report":
        """Read what `to_json` made. Raises Corrupt naming `origin` when it is not that."""
        try:
            data = json.loads(text)
            return cls(data["title"], [Row(**{"where": "", "value": None, **row}) for row in data["rows"]])
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{origin} is not a report of wherry: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises Corrupt when it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Corrupt(f"{path} is not a JSON object, but a {type(found).__name__}")
    return found


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either whole or absent: temporary name, flush to disk, rename."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
