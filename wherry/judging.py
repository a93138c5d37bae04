"""The verbs that judge, on the command line: verify, evaluate, explain, compare, measure."""

from pathlib import Path
from typing import Annotated

import typer

from wherry.board import bar, grid, show, verdict
from wherry.options import (
    Against,
    ArtifactPath,
    DataFile,
    Json,
    MaxBad,
    MaxKl,
    MaxRatio,
    Model,
    Runtime,
    Threads,
)  # fmt: skip

app = typer.Typer()


@app.command()
def verify(
    artifact: ArtifactPath,
    against: Annotated[
        str | None, typer.Option(help="The original model, to compare with.", show_default=False)
    ] = None,
    data: DataFile = None,
    runtime: Runtime = "auto",
    max_kl: MaxKl = 0.5,
    max_ratio: MaxRatio = 1.5,
    json: Json = False,
) -> None:
    """Reload an artifact in the runtime that will run it, check and measure it: PASS or FAIL."""
    from wherry import api

    with bar() as progress:
        report = api.verify(artifact, against, data, runtime, max_kl=max_kl, max_ratio=max_ratio, progress=progress)
    verdict(report, json)


@app.command()
def evaluate(
    model: Model,
    data: DataFile = None,
    runtime: Runtime = "auto",
    against: Against = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Also under noise, blur, typos ..., and the latency of single calls.")
    ] = False,
    max_bad: MaxBad = 0.01,
    most: Annotated[int, typer.Option(help="Judge on so many examples, drawn with a seed; 0 = all.", min=0)] = 0,
    json: Json = False,
) -> None:
    """Measure quality on labelled data, by the metrics of the model's task, with intervals."""
    from wherry import api

    with bar() as progress:
        report = api.evaluate(model, data, runtime, progress, against, robustness, max_bad, most)
    grid(report, json)


@app.command()
def explain(
    model: Model,
    given: Annotated[str, typer.Option("--input", help='A text, "A || B", or a file.', show_default=False)],
    against: Against = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture to write: .png or .html.")] = Path("explain.png"),
    runtime: Runtime = "auto",
    json: Json = False,
) -> None:
    """Draw which parts of one input an answer rests on, before and after compression."""
    from wherry import api

    with bar() as progress:
        report = api.explain(model, given, against, out, runtime, progress)
    show(report, json)


@app.command()
def compare(a: Model, b: Model, data: DataFile = None, max_bad: MaxBad = 0.01, json: Json = False) -> None:
    """Measure two models or artifacts side by side on the same data."""
    from wherry import api

    with bar() as progress:
        report = api.compare(a, b, data, progress, max_bad)
    grid(report, json)


@app.command()
def measure(artifact: ArtifactPath, runtime: Runtime = "auto", threads: Threads = 0, json: Json = False) -> None:
    """Time an artifact and read this process's peak memory."""
    from wherry import api

    show(api.measure(artifact, runtime, threads), json)
