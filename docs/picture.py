"""Make the README's picture and the figures of its demo tables out of a demo's reports.

    make demo
    python docs/picture.py [demo-out]      writes docs/demo.json and docs/demo.svg
    make docs                              puts them into both READMEs

Nothing is typed in: every figure is a row of a report.json below demo-out. Plain SVG, no fonts and no pictures from
elsewhere, light and dark.
"""

import datetime
import json
import platform
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from wherry.demo import language, table
from wherry.report import Report

HERE = Path(__file__).parent
LANGUAGE = ["model", "MB", "perplexity", "KL, nats/token", "top-1 %", "prefill tok/s", "decode tok/s", "peak MB"]
ENCODER = ["model", "MB", "Spearman [95%]", "sentences/s"]
SHOWN = {
    "shipped": "smollm2-shipped", "W8": "smollm2-w8", "W4": "smollm2-w4", "fp32": "minilm-fp32", "int8": "minilm-int8",
}  # fmt: skip
STYLE = """
text{font:14px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#1d2430}
.t{font-size:20px;font-weight:600}.s{fill:#5b6472;font-size:13px}.n{text-anchor:end;font-variant-numeric:tabular-nums}
.bar{fill:#1f6f8b}.base{fill:#c3c9d1}.rule{stroke:#e3e6ea}.ground{fill:#ffffff}
@media(prefers-color-scheme:dark){text{fill:#e7eaee}.s{fill:#a4adb9}.bar{fill:#4fa9c6}.base{fill:#4a5361}
.rule{stroke:#2c333d}.ground{fill:#12161c}}
"""


def load(folder: Path) -> dict[str, Report]:
    """The demo's reports by the names that wherry.demo gives them. Exits when the demo has not finished."""
    absent = [name for name in SHOWN.values() if not (folder / name / "report.json").exists()]
    if absent:
        raise SystemExit(f"{folder} lacks {', '.join(absent)}: run `make demo` first")
    return {key: Report.load(folder / name / "report.json") for key, name in SHOWN.items()}


def rows(folder: Path, reports: dict[str, Report]) -> tuple[list[list[str]], list[list[str]]]:
    """The demo's own two tables, with the project's own decoder where it was there."""
    found = table(reports)
    for name in ("W8", "W4"):
        path = folder / f"decoder-{name.lower()}" / "report.json"
        if path.exists():
            report = Report.load(path)
            if name == "W8":
                found.append(language("own decoder, original", report, "original"))
            found.append(language(f"own decoder {name}", report, "gguf"))
    encoders = [row for row in found if row[0].startswith("MiniLM")]
    return [row for row in found if row not in encoders], encoders


def machine(report: Report) -> str:
    """Where it was measured, from the facts that the runtimes reported."""
    facts = {key: report.get(f"fact: {key}", "gguf") for key in ("version", "isa", "threads")}
    told = {key: row.text() for key, row in facts.items() if row is not None}
    parts = [told.get("version", ""), f"{told['threads']} threads" if "threads" in told else "", told.get("isa", "")]
    return ", ".join(filter(None, [f"{platform.system()} {platform.machine()}", *parts]))


def number(text: str) -> float | None:
    """The number that a cell of the table begins with."""
    try:
        return float(text.split(" ")[0].replace(",", ""))
    except ValueError:
        return None


def draw(models: list[list[str]], encoders: list[list[str]], where: str) -> str:
    """Bars of file sizes from zero, each with its quality and speed beside it."""
    chosen = [row for row in models if row[0].startswith("SmolLM2")]
    original = next(row for row in chosen if "original" in row[0])
    small = next(row for row in chosen if row[0].endswith("W4"))
    share = 100 * (number(small[1]) or 0) / (number(original[1]) or 1)
    title = f"{share:.0f}% of the bytes, KL {small[3]} nats per token, {small[6]} tokens/s instead of {original[6]}"
    lines = [
        f'<text class="t" x="24" y="38">{escape(title)}</text>',
        '<text class="s" x="24" y="60">SmolLM2-135M-Instruct in 4 bits, against its float32 reference; '
        "proved in llama.cpp by make demo</text>",
    ]
    y = 92
    for head, part, columns in (
        ("File, MB", chosen, ((2, "perplexity"), (3, "KL, nats/token"), (6, "decode tok/s"))),
        ("File, MB", encoders, ((2, "Spearman [95%]"), (3, "sentences/s"))),
    ):
        most = max(number(row[1]) or 0 for row in part)
        ends = [640, 760, 876] if len(columns) == 3 else [760, 876]
        lines.append(f'<text class="s" x="210" y="{y}">{head}</text>')
        lines += [
            f'<text class="s n" x="{x}" y="{y}">{name}</text>' for x, (_, name) in zip(ends, columns, strict=True)
        ]
        lines.append(f'<line class="rule" x1="24" x2="876" y1="{y + 8}" y2="{y + 8}"/>')
        for row in part:
            y += 32
            width = 240 * (number(row[1]) or 0) / most
            kind = "base" if "original" in row[0] or "fp32" in row[0] or "shipped" in row[0] else "bar"
            lines.append(f'<text x="24" y="{y}">{escape(row[0])}</text>')
            lines.append(f'<rect class="{kind}" x="210" y="{y - 14}" width="{width:.1f}" height="18" rx="2"/>')
            lines.append(f'<text x="{218 + width:.1f}" y="{y}">{row[1]}</text>')
            lines += [
                f'<text class="n" x="{x}" y="{y}">{escape(row[i])}</text>'
                for x, (i, _) in zip(ends, columns, strict=True)
            ]
        y += 48
    lines.append(f'<text class="s" x="24" y="{y - 8}">{escape(where)}</text>')
    body, text = "\n".join(lines), escape("; ".join(" ".join(row) for row in [*chosen, *encoders]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {y + 12}" role="img">\n'
        f"<title>{escape(title)}</title><desc>{text}</desc>\n<style>{STYLE}</style>\n"
        f'<rect class="ground" width="900" height="{y + 12}"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    reports = load(folder)
    models, encoders = rows(folder, reports)
    where = machine(reports["W4"])
    newest = max((folder / name / "report.json").stat().st_mtime for name in SHOWN.values())
    day = datetime.datetime.fromtimestamp(newest, datetime.UTC).date().isoformat()
    tables = [{"head": LANGUAGE, "rows": models}, {"head": ENCODER, "rows": encoders}]
    picture = draw(models, encoders, f"{where}; {day}")
    title = picture.partition("<title>")[2].partition("</title>")[0]
    found = {"title": title, "machine": where, "date": day, "tables": tables}
    (HERE / "demo.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    (HERE / "demo.svg").write_text(picture, encoding="utf8")


if __name__ == "__main__":
    main()
