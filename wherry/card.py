"""Card: the model card (README.md) of a finished result: YAML for a model hub, then what it is, and its limits.

Every figure is a row of the report; the report should have the rows of `page.facts`.
Source: the metadata fields of model cards on the Hugging Face hub (license, base_model, base_model_relation, tags).
"""

from typing import Any

import yaml

from wherry.page import Page
from wherry.page.figure import number
from wherry.report import Report, Row

LIBRARIES = {"compressed_tensors": "transformers", "safetensors": "transformers", "gguf": "gguf", "onnx": "onnx"}


def front_matter(page: Page) -> dict[str, Any]:
    """The metadata of the card; a licence that the source does not state is left out, not invented."""
    text = {what: found.text for what in ("license", "source", "task", "format") if (found := _value(page, what))}
    data: dict[str, Any] = {}
    if "license" in text:
        data["license"] = text["license"].lower()
    if "/" in text.get("source", "") and not text["source"].startswith(("/", ".")):
        data["base_model"] = text["source"]
    data["base_model_relation"] = "quantized"
    if "task" in text:
        data["pipeline_tag"] = text["task"]
    if text.get("format") in LIBRARIES:
        data["library_name"] = LIBRARIES[text["format"]]
    schemes = [page.rows[i].where.partition(",")[0].lower() for i in page.all("stored as")]
    places = [place for place in page.places if place not in ("original", "checkpoint")]
    data["tags"] = list(dict.fromkeys(["wherry", "quantized", *schemes, *places]))
    return data


def _value(page: Page, what: str) -> Any:
    i = page.last.get((what, ""))
    return page.value(i) if i is not None and page.rows[i].value is not None else None


def render(report: Report) -> str:
    """The card as Markdown with YAML in front."""
    page = Page(report)
    model = _value(page, "model")
    name = model.text if model else report.title
    parts = [
        f"---\n{yaml.safe_dump(front_matter(page), sort_keys=False, allow_unicode=True)}---\n\n# {name}, compressed\n"
    ]
    source, recipe, license_ = (_value(page, what) for what in ("source", "recipe", "license"))
    if source:
        parts.append(f"Made from `{source.text}`" + (f" by `{recipe.text}`." if recipe else ".") + "\n")
    verdict = page.verdict
    if verdict:
        parts.append(f"Proof: **{verdict.text}**. {report.rows[verdict.row].note}.\n")
    else:
        parts.append("Proof: none was made.\n")
    parts += [_table(page), _plan(page), _loading(page), _limits(page, bool(license_))]
    return "\n".join(part for part in parts if part)


def _cell(page: Page, i: int | None) -> str:
    if i is None:
        return "-"
    figure, ends = page.value(i), page.ends(i)
    text = f"{figure.text} {figure.unit}".strip() if page.rows[i].value is not None else "not measured"
    return text + (f" [{ends[0].text}, {ends[1].text}]" if ends else "")


def _table(page: Page) -> str:
    groups = page.table()
    if not groups:
        return ""
    lines = [
        "## What it was, what it is\n",
        "| | " + " | ".join(page.places) + " |",
        "|---|" + "---:|" * len(page.places),
    ]
    for _, measures in groups:
        lines += [f"| {label} | " + " | ".join(_cell(page, i) for i in cells) + " |" for label, _, cells in measures]
    note = "\nIn brackets: 95% intervals; for speeds the slowest and the fastest run."
    data = [f" Judged on {page.value(i).text} ({page.rows[i].note})." for i in page.all("evaluation data")]
    return "\n".join(lines) + "\n" + note + "".join(data) + "\n"


def _plan(page: Page) -> str:
    stored, left = page.all("stored as"), page.all("left as it is")
    if not stored:
        return ""
    lines = ["## How it is stored\n"]
    lines += [
        f"- {page.value(i).text} {_tensors(page, i)} as `{page.rows[i].where}` ({page.rows[i].note})" for i in stored
    ]
    lines += [f"- {page.value(i).text} {_tensors(page, i)} left alone: {page.rows[i].where}" for i in left]
    errors = [row for row in page.rows if row.what == "weight error" and isinstance(row.value, float)]
    if errors:
        worst = max(errors, key=lambda row: float(row.value or 0))
        lines.append(f"- largest error of a weight: {_percent(worst)}, `{worst.where}`")
    return "\n".join(lines) + "\n"


def _tensors(page: Page, i: int) -> str:
    return "tensor" if page.rows[i].value == 1 else "tensors"


def _percent(row: Row) -> str:
    return f"{number(100 * float(row.value or 0), '')[0]}%"


def _loading(page: Page) -> str:
    lines = [page.value(i).text for i in page.all("loaded by")]
    made = _value(page, "made by")
    text = "## Load it\n\n```sh\n" + "\n".join(lines) + "\n```\n" if lines else ""
    return text + (f"\nMade again by:\n\n```sh\n{made.text}\n```\n" if made else "")


def _limits(page: Page, licensed: bool) -> str:
    lines = [
        "## Limits\n",
        "- It inherits whatever the original says wrongly or unfairly; compressing it was not meant to change that.",
        "- Quality is that on the text named above; on yours: `wherry verify OUT --against MODEL --data FILE`.",
    ]
    bounds = [page.rows[i].where for i in page.all("kl") if page.rows[i].note.startswith("lower bound")]
    if bounds:
        lines.append(f"- KL of {', '.join(bounds)} is a lower bound: the runtime tells only the likeliest tokens.")
    if page.all("prefill") or page.all("sentences"):
        lines.append("- Speeds are those of one machine; `report.json` names it.")
    if not licensed:
        lines.append("- The source states no licence: find out what it allows before you pass this on.")
    else:
        lines.append("- The original's licence goes with it.")
    return "\n".join(lines) + "\n"
