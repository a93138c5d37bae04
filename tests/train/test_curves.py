"""The curves of report.html, read back from its SVG, are those of metrics.jsonl."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from wherry import page
from wherry.data import shipped
from wherry.report import Report
from wherry.train import loop, watch
from wherry.train.job import Job

FIELDS = {"training loss": "loss", "held-out loss": "held-out loss", "samples per second": "samples per second"}


def drawn(html: str) -> dict[str, np.ndarray]:
    """Curves [points, 2] of update and value, from the attributes and the points of each SVG alone."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        given = dict(re.findall(r'([\w-]+)="([^"]*)"', svg))
        _, _, wide, high = map(float, given["viewBox"].split())
        x, y = np.array([point.split(",") for point in given["points"].split()], float).T
        low, top, first, last = (float(given[f"data-{name}"]) for name in ("low", "high", "first", "last"))
        found[given["data-curve"]] = np.stack([first + x / wide * (last - first), top - y / high * (top - low)], 1)
    return found


def close(found: np.ndarray, rows: list[dict], field: str) -> None:
    wanted = np.array([(row["update"], row[field]) for row in rows if field in row], float)
    assert found.shape == wanted.shape, field
    span = max(1e-9, np.ptp(wanted, axis=0)[1], wanted[:, 1].max())
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], atol=0.01 * max(1, len(wanted)) / 100 + 0.01)
    np.testing.assert_allclose(found[:, 1], wanted[:, 1], atol=1e-4 * span)


def test_a_runs_curves_are_its_metrics(tiny_llama: Path, tmp_path: Path) -> None:
    out, held_out = tmp_path / "out", tmp_path / "held-out.txt"
    held_out.write_text(shipped("evaluation").read_text(encoding="utf8")[:2000], encoding="utf8")
    loop.run(Job(
        model=str(tiny_llama), out=str(out), data=str(shipped("calibration")), held_out=str(held_out),
        steps=6, batch=4, length=32, eval_every=2, learning_rate=1e-2, cache=str(tmp_path / "cache"),
    ))  # fmt: skip
    rows = watch.lines(out / "metrics.jsonl")
    assert [row["update"] for row in rows if "held-out loss" in row] == [0, 2, 4, 6]
    html = (out / "report.html").read_text(encoding="utf8")
    found = drawn(html)
    assert found.keys() == FIELDS.keys()
    for name, field in FIELDS.items():
        close(found[name], rows, field)
    assert "<script" not in html
    assert not re.search(r"""https?://|(src|href)=""", html)


@pytest.mark.parametrize("steps", [2, 200, 201, 1234])
def test_long_runs_are_thinned_evenly_to_their_end(steps: int) -> None:
    rng = np.random.default_rng(0)
    rows = [{"update": i, "loss": float(9 - i / steps + rng.normal()), "samples per second": 50.0} for i in
            range(1, steps + 1)]  # fmt: skip
    result = dict.fromkeys(("held_out", "mfu", "tokens_per_second", "skipped", "rollbacks"))
    result |= {"model": "a", "out": "b", "steps": steps, "loss": 8.0, "seconds": 1.0, "samples_per_second": 50.0,
               "ranks": 1, "layout": "one process", "params": 3, "trained": 3, "notes": [], "judged": [],
               "cpu_seconds": 1.0}  # fmt: skip
    report = watch.report(result, rows)
    found = drawn(page.render(Report.from_json(report.to_json(), "a run")))
    assert set(found) == {"training loss", "samples per second"}
    updates = np.round(found["training loss"][:, 0]).astype(int)
    assert len(updates) <= 200
    assert updates[-1] == steps
    assert len(set(np.diff(updates))) == 1
    close(found["training loss"], [rows[i - 1] for i in updates], "loss")


def test_one_update_has_no_line() -> None:
    report = Report("x")
    report.add("training loss", "", 2.0, "nats")
    report.add("curve: training loss", "update 1", 2.0, "nats")
    html = page.render(report)
    assert drawn(html) == {}
    assert "Training loss" in html
    assert json.loads(report.to_json())
