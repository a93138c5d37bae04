"""Page: report.html, one self-contained file made of report.json and nothing else.

Every figure, name and remark on it is a field of one row of the report and carries that row's number
(`data-row`) and field (`data-field`), so that whoever doubts a figure, or a test, finds where it is from.
`facts` adds the rows that a page and a model card need beside what was measured.
"""

import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from wherry.report import Report, Row

STEPS = 9  # colours of the heat map, of even distance in lightness
# what, label, unit on the page; the order of the table
MEASURES = {
    "Size": (("bytes", "Weights on disk"), ("bits per parameter", "Bits per parameter")),
    "Quality": (
        ("perplexity", "Perplexity"),
        ("perplexity ratio", "Perplexity, times the original's"),
        ("kl", "KL divergence from the original"),
        ("top-1 agreement", "Same likeliest next token"),
        ("spearman", "Spearman's correlation"),
        ("spearman difference", "Spearman, change"),
        ("pearson", "Pearson's correlation"),
        ("pearson difference", "Pearson, change"),
        ("embedding agreement", "Cosine with the original's embedding"),
        ("kl to the checkpoint", "KL added by the runtime"),
        ("top-1 agreement to the checkpoint", "Same token as in torch"),
    ),
    "Speed": (
        ("prefill", "Reading a prompt"),
        ("decode", "Writing an answer"),
        ("time to first token", "Time to the first token"),
        ("sentences", "Embedding"),
        ("latency", "One sentence"),
        ("peak memory", "Peak memory"),
    ),
}
SCALES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf", "xllamacpp", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Figure:
    """A field of a row as a person reads it."""

    row: int
    field: str
    text: str
    unit: str = ""


def facts(manifest: dict[str, Any], commands: Sequence[str] = (), formats: Sequence[str] = ()) -> Report:
    """Rows about what was made: model, licence, plan, files, versions, and the lines that make it and load it.

    Args:
        manifest: of the artifact, or of the checkpoint that holds the exports.
        commands: copy-paste lines that load the result.
        formats: names of the exports beside it.
    """
    report = Report()
    report.add("model", "", manifest["model"])
    report.add("task", "", manifest["task"]["kind"])
    report.add("format", "", manifest["format"])
    report.add(
        "license",
        "",
        manifest.get("license") or None,
        note="" if manifest.get("license") else "not stated by the source",
    )
    report.add("source", "", manifest.get("source") or manifest["model"])
    plan = manifest.get("plan") or []
    for scheme in dict.fromkeys(row["scheme"] for row in plan if row["scheme"]):
        rows = [row for row in plan if row["scheme"] == scheme]
        size = f"{sum(r['before'] for r in rows):,} B before, {sum(r['after'] for r in rows):,} B after"
        report.add("stored as", scheme, len(rows), "tensors", note=size)
    for reason in dict.fromkeys(row["reason"] or "no scheme" for row in plan if not row["scheme"]):
        rows = [row for row in plan if not row["scheme"] and (row["reason"] or "no scheme") == reason]
        report.add("left as it is", reason, len(rows), "tensors", note=f"{sum(r['after'] for r in rows):,} B")
    recipe = manifest.get("recipe") or ""
    if recipe:
        source = shlex.quote(str(manifest.get("source") or "MODEL"))
        more = f" --format {','.join(formats)}" if formats else ""
        report.add("made by", "", f"wherry compress {source} -o OUT --recipe {shlex.quote(recipe)}{more}")
    for i, line in enumerate(commands, 1):
        report.add("loaded by", str(i), line)
    for name, entry in manifest["files"].items():
        report.add("file", name, entry["bytes"], "B", note=f"sha256 {entry['sha256']}")
    report.add("version", "wherry", manifest.get("wherry") or None)
    report.add("version", "python", platform.python_version())
    for package in PACKAGES:
        try:
            report.add("version", package, version(package))
        except PackageNotFoundError:
            continue
    return report


def plain(x: float, like: float | None = None) -> str:
    """A number with four significant digits and no exponent where that is readable; `like` fixes the decimals."""
    size = abs(x if like is None else like)
    if x != 0 and size < 1e-4:
        return f"{x:.2e}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4
    return f"{x:,.{digits}f}"


def number(x: float, unit: str, like: float | None = None) -> tuple[str, str]:
    """A value and its unit as shown: bytes as kB, MB, GB; shares as %; rates without false digits."""
    size = abs(x if like is None else like)
    if unit == "B":
        for name, scale in SCALES:
            if size >= scale:
                return f"{x / scale:.3g}" if size / scale < 100 else f"{x / scale:,.0f}", name
        return f"{x:,.0f}", "B"
    if unit.endswith("/s"):
        return (f"{x:,.0f}" if size >= 100 else f"{x:.1f}" if size >= 10 else f"{x:.2f}"), unit
    if unit == "%":
        return f"{x:.1f}", unit
    return plain(x, like), unit


class Page:
    """What the template asks for; all of it Figures of one report."""

    def __init__(self, report: Report) -> None:
        self.rows: list[Row] = list(report.rows)
        self.last = {(row.what, row.where): i for i, row in enumerate(self.rows)}

    def field(self, i: int, name: str, text: str = "") -> Figure:
        """A text field of row i, or a part of it."""
        return Figure(i, name, text or str(getattr(self.rows[i], name)))

    def fact(self, what: str, where: str = "") -> Figure | None:
        """The value of the last row (what, where), as text; None where there is none."""
        i = self.last.get((what, where))
        return None if i is None else self.value(i)

    def value(self, i: int) -> Figure:
        """The value of row i, formatted."""
        row = self.rows[i]
        if row.value is None:
            return Figure(i, "note", row.note or "not measured")
        if isinstance(row.value, bool):
            return Figure(i, "value", "yes" if row.value else "no")
        if isinstance(row.value, str):
            return Figure(i, "value", row.value)
        if isinstance(row.value, int) and row.unit != "B":
            return Figure(i, "value", f"{row.value:,}", row.unit)
        return Figure(i, "value", *number(float(row.value), row.unit))

    def ends(self, i: int) -> tuple[Figure, Figure] | None:
        """Low and high of row i, with the decimals of its value."""
        row = self.rows[i]
        if row.low is None or row.high is None or not isinstance(row.value, int | float):
            return None
        low, high = (number(end, row.unit, float(row.value)) for end in (row.low, row.high))
        return Figure(i, "low", *low), Figure(i, "high", *high)

    def find(self, *whats: str, where: str) -> int | None:
        """Index of the first of these measures that has a value for `where`."""
        for what in whats:
            i = self.last.get((what, where))
            if i is not None and self.rows[i].value is not None:
                return i
        return None

    @property
    def places(self) -> list[str]:
        """What was measured: the original first, then the rest as they come."""
        whats = {what for group in MEASURES.values() for what, _ in group}
        found = [row.where for row in self.rows if row.what in whats and row.where]
        return sorted(dict.fromkeys(found), key=lambda where: where != "original")

    @property
    def heads(self) -> list[Figure]:
        """The places as figures: their names hold digits too."""
        whats = {what for group in MEASURES.values() for what, _ in group}
        return [
            self.field(next(i for i, r in enumerate(self.rows) if r.where == p and r.what in whats), "where")
            for p in self.places
        ]

    @property
    def chosen(self) -> str:
        """The artifact that the headline speaks of: the first export, else the checkpoint."""
        others = [place for place in self.places if place != "original"]
        return next((place for place in others if place != "checkpoint"), others[0] if others else "")

    @property
    def verdict(self) -> Figure | None:
        """PASS or FAIL."""
        i = self.last.get(("verdict", ""))
        return None if i is None else self.value(i)

    @property
    def failed(self) -> bool:
        """Whether the verdict is FAIL."""
        return self.verdict is not None and self.verdict.text != "PASS"

    def table(self) -> list[tuple[str, list[tuple[str, list[int | None]]]]]:
        """Groups of (label, index of the row for each place), without measures that nothing has."""
        groups = []
        for group, measures in MEASURES.items():
            lines = [(label, [self.last.get((what, place)) for place in self.places]) for what, label in measures]
            lines = [line for line in lines if any(i is not None for i in line[1])]
            if lines:
                groups.append((group, lines))
        return groups

    def bars(self, *whats: str) -> list[tuple[Figure, int, float]]:
        """(name, row, share of the longest) of the first measure that at least two places have; zero is at the left."""
        for what in whats:
            found = [
                (i, float(self.rows[i].value or 0))
                for place in self.places
                if (i := self.find(what, where=place)) is not None
            ]
            if len(found) > 1:
                most = max(value for _, value in found) or 1
                return [(self.field(i, "where"), i, round(100 * value / most, 2)) for i, value in found]
        return []

    def whiskers(self, *whats: str) -> list[tuple[Figure, int, float, float, float]]:
        """(name, row, low, value, high), as shares of the common range, of the first measure that two places have."""
        for what in whats:
            found = [i for place in self.places if (i := self.find(what, where=place)) is not None]
            if len(found) < 2:
                continue
            spans = []
            for i in found:
                row = self.rows[i]
                ends = (row.low if row.low is not None else row.value, row.high if row.high is not None else row.value)
                spans.append((i, float(ends[0] or 0), float(row.value or 0), float(ends[1] or 0)))
            low, high = min(s[1] for s in spans), max(s[3] for s in spans)
            room = (high - low) * 0.04 or 1.0
            share = lambda x, a=low - room, b=high + room: round(100 * (float(x) - a) / (b - a), 2)  # noqa: E731
            return [(self.field(i, "where"), i, share(a), share(v), share(b)) for i, a, v, b in spans]
        return []

    def heat(self) -> "Heat | None":
        """Relative error of each quantized tensor: layer x kind, and those outside of the layers."""
        errors = {
            row.where: i for i, row in enumerate(self.rows) if row.what == "weight error" and row.value is not None
        }
        return Heat.of(self, errors) if errors else None

    def checks(self) -> list[tuple[Figure | None, list[int]]]:
        """Rows of checks by place, failed ones first."""
        found = [i for i, row in enumerate(self.rows) if row.what.startswith("check: ")]
        order = {False: 0, None: 1, True: 2}
        groups = []
        for where in dict.fromkeys(self.rows[i].where for i in found):
            mine = sorted(
                (i for i in found if self.rows[i].where == where), key=lambda i: order[bool_or_none(self.rows[i].value)]
            )
            groups.append((self.field(mine[0], "where") if where else None, mine))
        return groups

    def all(self, what: str) -> list[int]:
        """Indices of all rows of that `what`, or of a family: "fact: " and so on."""
        return [
            i
            for i, row in enumerate(self.rows)
            if row.what == what or (what.endswith(" ") and row.what.startswith(what))
        ]


def bool_or_none(value: Any) -> bool | None:
    """True, False or None."""
    return None if value is None else bool(value)


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
    def of(cls, page: Page, errors: dict[str, int]) -> "Heat":
        """Sort tensors into the picture by the number in their name."""
        value = {name: float(page.rows[i].value or 0) for name, i in errors.items()}
        low, high = min(value.values()), max(value.values())
        ranked = sorted(value, key=lambda name: -value[name])
        worst = set(ranked[:3])

        def percent(name: str) -> Figure:
            return Figure(errors[name], "value", f"{100 * value[name]:.{1 if value[name] >= 0.01 else 2}f}", "%")

        def cell(name: str) -> Cell:
            step = round((STEPS - 1) * (value[name] - low) / (high - low)) if high > low else 0
            return Cell(percent(name), step, name in worst and high > low)

        places: dict[int, dict[str, str]] = {}
        outside = []
        for name in errors:
            match = re.search(r"\.(\d+)\.(.+)$", name)
            if match:
                places.setdefault(int(match[1]), {})[match[2]] = name
            else:
                outside.append(
                    (page.field(errors[name], "where", name.removesuffix(".weight").rpartition(".")[2]), cell(name))
                )
        full = list(dict.fromkeys(kind for line in places.values() for kind in line))
        labels = short(full)
        first = {kind: next(line[kind] for line in places.values() if kind in line) for kind in full}
        kinds = [page.field(errors[first[kind]], "where", label) for kind, label in zip(full, labels, strict=True)]
        layers = [
            (
                page.field(errors[next(iter(line.values()))], "where", str(layer)),
                [cell(line[k]) if k in line else None for k in full],
            )
            for layer, line in sorted(places.items())
        ]
        named = [(page.field(errors[name], "where"), percent(name)) for name in ranked[:5]]
        return cls(kinds, layers, outside, named, percent(ranked[-1]), percent(ranked[0]))


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


def render(report: Report) -> str:
    """The report as one HTML file that loads nothing from elsewhere. The report should have the rows of `facts`."""
    from jinja2 import Environment

    template = (files("wherry") / "page.html").read_text(encoding="utf8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        page=Page(report), rows=report.rows, steps=range(STEPS), title=report.title
    )
