"""Board: what the terminal shows: one progress display per run, tables of rows, and the summary at the end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from wherry.page import Page
from wherry.report import Report

out = Console(width=None if sys.stdout.isatty() else 100, markup=False)  # 'wherry[torch]' is no markup
err = Console(stderr=True, markup=False)
LINE_EVERY_S = 10.0  # without a terminal, progress is a line of text, no oftener than this


def render(report: Report) -> list[RenderableType]:
    """The parts to print, one under the other: measures by place, failed checks, remarks by number, the verdict."""
    page = Page(report)
    parts: list[RenderableType] = []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for place in page.places:
        table.add_column(place, justify="right")
    for _, lines in page.table():
        for label, unit, found in lines:
            table.add_row(
                f"{label}, {unit}" if unit else label, *["" if i is None else _cell(page, i, unit) for i in found]
            )
    if page.places:
        parts.append(table)
    failed = [row for row in report if row.what.startswith("check: ") and row.value is False]
    for row in failed:
        parts.append(Text(f"failed: {row.what.removeprefix('check: ')} ({row.where}): {row.note}", style="red"))
    for row in report.select("zeros"):
        parts.append(Text(f"zeros: {row.value:.3g}% {row.note}"))
    for row in report.select("sample"):
        parts.append(Text(f"sample ({row.where}), {row.note}\n  {str(row.value)[:300]}"))
    notes = report.select("note")
    if notes:
        parts.append(Text(f"{len(notes)} remarks on single tensors: see --json, report.html or --dry-run", style="dim"))
    verdict = report.get("verdict")
    if verdict is not None:
        style = "bold green" if verdict.value == "PASS" else "bold red"
        parts.append(Text.assemble((str(verdict.value), style), f": {verdict.note}"))
    return parts


def _cell(page: Page, i: int, unit: str) -> str:
    figure, ends = page.value(i), page.ends(i)
    text = (
        figure.text
        if figure.unit == unit
        else f"{figure.text} {figure.unit}".strip()
        if page.rows[i].value is not None
        else "not measured"
    )
    return text + (f"\n[{ends[0].text}, {ends[1].text}]" if ends else "")


def summary(report: Report) -> None:
    """Print the parts of `render`."""
    for part in render(report):
        out.print(part, highlight=False)


def verdict(report: Report, as_json: bool) -> None:
    """Show a report with a verdict, as a summary or as JSON rows; exit with 1 when it failed."""
    if as_json:
        show(report, as_json)
    else:
        summary(report)
    found = report.get("verdict")
    if found and found.value != "PASS":
        sys.exit(1)


@contextmanager
def bar() -> Iterator[Callable[[int, int, str], None]]:
    """One progress display on standard error, with time left; plain lines when there is no terminal."""
    if not err.is_terminal:
        said, when = "", 0.0

        def line(done: int, total: int, text: str) -> None:
            nonlocal said, when
            key = text.split(".")[0]
            if text and (key != said or monotonic() - when > LINE_EVERY_S):
                said, when = key, monotonic()
                print(f"{done}/{total} {text}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=err) as shown:
        current = shown.add_task("")

        def update(done: int, total: int, text: str) -> None:
            shown.update(current, completed=done, total=total, description=f"{text:32.32}")

        yield update


def grid(report: Report, as_json: bool) -> None:
    """Print rows that several places share as one table with a column per place, the others below; or JSON rows."""
    places: dict[str, list[str]] = {}
    for row in report:
        places.setdefault(row.what, []).append(row.where)
    shared = [what for what, where in places.items() if len(set(where)) > 1]
    columns = list(dict.fromkeys(where for what in shared for where in places[what]))
    if as_json or not shared or len(columns) > 4:
        show(report, as_json)
        return
    last = {(row.what, row.where): row for row in report}
    alone = [row for row in report if row.what not in shared]
    paired = [row for row in alone if row.where in columns and row.low is not None]
    table = Table(title=report.title or None, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for place in columns:
        table.add_column(place, justify="right")
    for what in [*shared, *(row.what for row in paired)]:
        found = [last.get((what, place)) for place in columns]
        table.add_row(what, *["" if row is None else row.text().replace(" [", "\n[") for row in found])
    out.print(table)
    rest = [row for row in alone if row not in paired]
    if rest:
        show(Report("", rest), False)


def show(report: Report, as_json: bool) -> None:
    """Print a report as a table, or as JSON rows."""
    if as_json:
        sys.stdout.write(report.to_json())
        return
    table = Table(title=report.title or None, title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("where")
    table.add_column("value", justify="right")
    table.add_column("note", overflow="fold")
    for row in report:
        value = "" if row.value is None else row.text()
        table.add_row(row.what, row.where, value, row.note)
    out.print(table)
