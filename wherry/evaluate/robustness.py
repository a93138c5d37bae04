"""Robustness: quality of the original and of the compressed model on inputs as they come in life, side by side.

Idea:   the same perturbed inputs for both. `difference` is compressed - original; `beyond clean` is the difference
        there less the difference on clean inputs. Both are paired. The second says whether compressing made the model
        brittle; that both models get worse together does not.
Cost:   each model runs over the data once, and once for each of about ten perturbations.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wherry.evaluate import field, metric
from wherry.evaluate.interval import Interval, weighted
from wherry.evaluate.metric import Metric
from wherry.evaluate.perplexity import Progress, silent
from wherry.evaluate.perturb import Perturbation, of
from wherry.report import Report
from wherry.task import Task

CLEAN = "clean"
CALLS = 200  # single examples that are timed


def measure(
    models: dict[str, tuple[Any, Task]],
    examples: Sequence[Any],
    wanted: Sequence[Any],
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Rows "METRIC: PERTURBATION" for each model, and at the places "difference" and "beyond clean" for the two.

    Args:
        models: {name: (session or Writer, task)}; one, or the original and then the compressed one.
        examples, wanted: raw examples and their targets.
        seed: of the perturbations.
    """
    names = list(models)
    task = models[names[0]][1]
    report, base = Report(), {}
    every: list[Perturbation | None] = [None, *of(task)]
    for i, change in enumerate(every):
        label = CLEAN if change is None else str(change)
        given = list(examples) if change is None else change.all(list(examples), seed)
        main: dict[str, Metric] = {}
        for name in names:
            said = field.ask(models[name][0], models[name][1], given, name)
            main[name] = field.metrics(said, wanted, models[name][1])[0]
            for row in metric.rows([main[name]], name):
                report.add(f"{row.what}: {label}", name, row.value, row.unit, row.low, row.high, row.note)
        if len(names) == 2:
            first, last = main[names[0]], main[names[1]]
            _add(report, f"{first.name}: {label}", "difference", metric.difference(last, first), "paired")
            if change is None:
                base = {"first": first, "last": last}
            else:
                found = extra(last, first, base["last"], base["first"])
                _add(report, f"{first.name}: {label}", "beyond clean", found, "difference here less that when clean")
        progress(i + 1, len(every), f"robustness: {label}")
    return report


def extra(last: Metric, first: Metric, last_clean: Metric, first_clean: Metric) -> Interval:
    """(last - first) - (last_clean - first_clean), the same examples drawn for all four."""
    return weighted(lambda w: last.of(w) - first.of(w) - last_clean.of(w) + first_clean.of(w), last.count)


def _add(report: Report, what: str, where: str, found: Interval, note: str) -> None:
    value = found.value if np.isfinite(found.value) else None
    report.add(what, where, value, "", found.low, found.high, f"{note}; 95% interval" if value is not None else note)


def latency(models: dict[str, tuple[Any, Task]], examples: Sequence[Any], seed: int = 0) -> Report:
    """Median and 99th percentile of a call with one example, preparing included; models take turns, randomly."""
    rng, report = np.random.default_rng(seed), Report()
    chosen = [examples[int(i)] for i in rng.choice(len(examples), CALLS, replace=len(examples) < CALLS)]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for session, task in models.values():
        field.ask(session, task, chosen[:3], batch=1)  # warm
    for example in chosen:
        for name in rng.permutation(list(models)):
            seconds[name] += field.ask(*models[name], [example], batch=1).seconds
    for name, found in seconds.items():
        note = f"{len(found)} calls of one example each, preparing included"
        for what, share in (("latency p50", 50), ("latency p99", 99)):
            report.add(what, name, float(np.percentile(found, share)), "s", note=note)
    return report
