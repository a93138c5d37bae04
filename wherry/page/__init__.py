"""Page: report.html, one self-contained file made of report.json and nothing else.

Every figure, name and remark on it is a field of one row of the report and carries that row's number
(`data-row`) and field (`data-field`), so that whoever doubts a figure, or a test, finds where it is from.
`facts` adds the rows that a page and a model card need beside what was measured.
"""

from dataclasses import dataclass
from importlib.resources import files

from wherry.page.curves import HIGH, WIDE, Curve, curves
from wherry.page.figure import Figure, number, plain
from wherry.page.heat import STEPS, Heat, short
from wherry.page.made import facts
from wherry.report import Report, Row

__all__ = ["MEASURES", "STEPS", "Figure", "Heat", "Page", "facts", "number", "plain", "render", "short"]

# what, label, unit on the page; the order of the table
MEASURES = {
    "Size": (("bytes", "Weights on disk"), ("bits per parameter", "Bits per parameter")),
    "Quality": (
        ("perplexity", "Perplexity"),
        ("perplexity ratio", "Perplexity, times the original's"),
        ("kl", "KL divergence from the original"),
        ("top-1 agreement", "Same likeliest next token"),
        ("same class", "Same likeliest class"),
        ("relative difference", "Outputs' distance from the original's"),
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
        ("examples", "Examples together"),
        ("latency", "One alone"),
        ("peak memory", "Peak memory"),
    ),
}


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

    def table(self) -> list[tuple[str, list[tuple[str, str, list[int | None]]]]]:
        """Groups of (label, unit, index of the row for each place), without measures that nothing has."""
        groups = []
        for group, measures in MEASURES.items():
            lines = []
            for what, label in measures:
                cells = [self.last.get((what, place)) for place in self.places]
                found = [self.rows[i].unit for i in cells if i is not None]
                if found:
                    unit = found[0] if set(found) == {found[0]} and found[0] not in ("B", "%", "s", "bits") else ""
                    lines.append((label, unit, cells))
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

    def whiskers(self) -> "Whiskers | None":
        """The change of the main measure with its interval, beside the line of no change; None without one."""
        for what, baseline in (("perplexity ratio", 1.0), ("spearman difference", 0.0)):
            found = [i for place in self.places if (i := self.find(what, where=place)) is not None]
            spans: list[tuple[float, float, float]] = []
            for i in found:
                row, value = self.rows[i], float(self.rows[i].value or 0)
                spans.append((value if row.low is None else row.low, value, value if row.high is None else row.high))
            if not spans:
                continue
            low, high = min(baseline, *(s[0] for s in spans)), max(baseline, *(s[2] for s in spans))
            room = (high - low) * 0.04 or 1.0
            share = lambda x, a=low - room, b=high + room: round(100 * (x - a) / (b - a), 2)  # noqa: E731
            lines = [
                (self.field(i, "where"), i, share(a), share(v), share(b))
                for i, (a, v, b) in zip(found, spans, strict=True)
            ]
            return Whiskers(what, share(baseline), lines)
        return None

    def heat(self) -> Heat | None:
        """Relative error of each quantized tensor: layer x kind, and those outside of the layers."""
        errors = {
            row.where: i for i, row in enumerate(self.rows) if row.what == "weight error" and row.value is not None
        }
        return Heat.of(self.rows, errors) if errors else None

    def curves(self) -> list[Curve]:
        """Loss, held-out loss and throughput of a training run over its updates."""
        return curves(self.rows)

    @property
    def learned(self) -> Figure | None:
        """Of a training run: the held-out loss at its end, else the training loss."""
        i = self.find("held-out loss", "training loss", where="")
        return None if i is None else self.value(i)

    def checks(self) -> "Checks | None":
        """All checks: kind by place, and those that did not pass with their reasons, failed ones first."""
        found = [i for i, row in enumerate(self.rows) if row.what.startswith("check: ")]
        if not found:
            return None
        whats = dict.fromkeys(self.rows[i].what for i in found)
        places = list(dict.fromkeys(self.rows[i].where for i in found))
        heads = [self.field(next(i for i in found if self.rows[i].where == place), "where") for place in places]
        lines = []
        for what in whats:
            cells = [self.last.get((what, place)) for place in places]
            lines.append(
                (self.field(next(i for i in cells if i is not None), "what", what.removeprefix("check: ")), cells)
            )
        open_ = [i for i in found if not self.rows[i].value]
        return Checks(heads, lines, sorted(open_, key=lambda i: self.rows[i].value is None))

    def mark(self, i: int) -> str:
        """How a check ended, in a word."""
        value = self.rows[i].value
        return "not made" if value is None else "passed" if value else "FAILED"

    def all(self, what: str) -> list[int]:
        """Indices of all rows of that `what`, or of a family: "fact: " and so on."""
        return [
            i
            for i, row in enumerate(self.rows)
            if row.what == what or (what.endswith(" ") and row.what.startswith(what))
        ]


@dataclass(frozen=True)
class Whiskers:
    """lines: (name, index of the row, low, value, high); these and the baseline in % of the axis."""

    what: str
    baseline: float
    lines: list[tuple[Figure, int, float, float, float]]


@dataclass(frozen=True)
class Checks:
    """heads: places. lines: (kind, index of its row for each place). open: rows that failed or were not made."""

    heads: list[Figure]
    lines: list[tuple[Figure, list[int | None]]]
    open: list[int]


def render(report: Report) -> str:
    """The report as one HTML file that loads nothing from elsewhere. The report should have the rows of `facts`."""
    from jinja2 import Environment

    template = (files("wherry.page") / "page.html").read_text(encoding="utf8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        page=Page(report), rows=report.rows, steps=range(STEPS), title=report.title, wide=WIDE, high=HIGH
    )
