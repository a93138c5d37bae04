"""Board: the end of a run in the terminal: one table that fits 100 columns, what failed, and the verdict."""

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from wherry.page import Page
from wherry.report import Report


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


def show(report: Report, console: Console) -> None:
    """Print them."""
    for part in render(report):
        console.print(part, highlight=False)
