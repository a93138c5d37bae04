"""`wherry VERB ...`: the command line. Each command is one call of the verb of the same name in `wherry.api`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from wherry import __version__, judging, shelf, training
from wherry.board import bar, err, show, verdict
from wherry.errors import Error
from wherry.options import (
    ArtifactPath,
    DataFile,
    DryRun,
    Json,
    Length,
    MaxKl,
    MaxRatio,
    Model,
    Out,
    RecipeText,
    Runtime,
    Samples,
    Seed,
    Threads,
)  # fmt: skip  # fmt: skip

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Compress a trained model, prove it on the runtime that will run it, export it, serve it.",
    epilog="First use: wherry compress MODEL -o OUT --format gguf, then wherry serve OUT",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options that go before the verb."""
    if version:
        print(f"wherry {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: Model,
    target: Annotated[
        str | None, typer.Option(help="A format: say which tensors it can hold.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Say what a model is: architecture, task, parameters, bytes, tensors."""
    from wherry import api

    show(api.inspect(model, target), json)


@app.command()
def compress(
    model: Model,
    out: Out,
    recipe: RecipeText = None,
    format: Annotated[str, typer.Option(help="Also export: gguf, onnx, openvino; several joined by commas.")] = "",
    data: DataFile = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Data to judge on, apart from --data.", show_default=False)
    ] = None,
    samples: Samples = 64,
    length: Length = 512,
    seed: Seed = 0,
    max_kl: MaxKl = 0.5,
    max_ratio: MaxRatio = 1.5,
    device: Annotated[str, typer.Option(help="Where solvers compute: cpu or cuda.")] = "cpu",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Compress a model; with --format also export, reload, and measure each result against the original."""
    from wherry import api

    formats = tuple(filter(None, format.split(",")))
    settings: dict[str, Any] = {"samples": samples, "length": length, "seed": seed}
    if dry_run:
        show(api.dry_run(model, recipe, formats, data, **settings), json)
        return
    with bar() as progress:
        report = api.compress(
            model, out, recipe, formats, data, evaluation, max_kl=max_kl, max_ratio=max_ratio, device=device,
            progress=progress, say=_say(json), **settings,
        )  # fmt: skip
    verdict(report, json)
    if not json:
        _lines(out)


def _say(quiet: bool) -> Any:
    return (lambda text: None) if quiet else lambda text: err.print(text, highlight=False, soft_wrap=True)


def _lines(path: Path) -> None:
    from wherry import api

    print("\nLoad it:")
    for line in api.commands(path):
        print(f"  {line}")


@app.command()
def capture(
    model: Annotated[str, typer.Argument(help="package.module:function that makes a module, or a folder.")],
    out: Out,
    example: Annotated[Path | None, typer.Option(help="Inputs by name (.npz), batch 2 or more.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors for the module.")] = None,
    script: Annotated[bool, typer.Option("--script", help="Let the TorchScript exporter try too.")] = False,
    json: Json = False,
) -> None:
    """Draw a torch module as a graph model (ONNX), which every other verb takes; compared with the module at once."""
    from wherry.capture import command

    show(command(model, out, example, weights, script), json)


@app.command()
def export(
    checkpoint: Model,
    out: Out,
    format: Annotated[str, typer.Option(help="A name of `wherry list formats`.", show_default=False)],
    json: Json = False,
) -> None:
    """Write a checkpoint in another format, holding the same codes."""
    from wherry import api

    with bar() as progress:
        report = api.export(checkpoint, out, format, progress)
    show(report, json)
    if not json:
        _lines(out)


app.add_typer(judging.app)  # verify, evaluate, explain, compare, measure
app.add_typer(training.app)  # train, distill, heal, launch


@app.command()
def serve(
    artifact: ArtifactPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 = any free one.")] = 8000,
    runtime: Runtime = "auto",
    threads: Threads = 0,
) -> None:
    """Serve an artifact: OpenAI-compatible API, metrics, and a page at /."""
    from wherry import api

    api.serve(artifact, host, port, runtime, threads)


@app.command()
def chat(artifact: ArtifactPath, runtime: Runtime = "auto", threads: Threads = 0) -> None:
    """Talk to an artifact in the terminal."""
    from wherry import api

    api.chat(artifact, runtime, threads)


@app.command(name="list")
def listing(
    what: Annotated[str, typer.Argument(help="A shelf: quant, formats, runtimes, evaluate, ...; or schemes.")] = "",
    json: Json = False,
) -> None:
    """List methods, formats, runtimes: what there is, one line each."""
    from wherry import api

    show(api.listing(what), json)


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine has: CPU features, memory, disk, packages, and the pip line of each that is missing."""
    from wherry.doctor import examine

    show(examine(), json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to work; a finished step is not done again.")] = Path(
        "demo-out"
    ),
    port: Annotated[int, typer.Option(help="Port of the server; 0 = any free one.")] = 8000,
) -> None:
    """Compress two real models, prove them, serve one: everything at once."""
    from wherry.demo import run

    with bar() as progress:
        server = run(out, progress, _say(False))
    server(port, sys.stdin.isatty() and sys.stdout.isatty())


def main() -> None:
    """Run a command; turn a wherry.Error into one to three lines and its exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on where it was", highlight=False)
        sys.exit(130)
    except Error as error:
        if debug:
            raise
        err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.code)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            found = shelf.missing(error, f"wherry {' '.join(sys.argv[1:2])}")
            err.print(f"error: {found}", highlight=False, markup=False, soft_wrap=True)
            sys.exit(found.code)
        if type(error).__module__.split(".")[0] in ("click", "typer"):
            said, hint, code = error.format_message(), f"wherry {' '.join(sys.argv[1:2])} --help says more.", 2  # type: ignore[attr-defined]
        else:
            said, hint, code = f"{type(error).__name__}: {error}", "This is a fault of wherry; --debug shows where.", 1
        err.print(f"error: {said}\n{hint}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(code)


if __name__ == "__main__":
    main()
