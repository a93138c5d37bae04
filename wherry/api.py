"""The verbs: inspect, plan, compress, export, verify, evaluate, compare, measure, serve, chat."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wherry import data, shelf
from wherry.choose import able, artifacts, open_session
from wherry.errors import BadInput, Missing
from wherry.report import Report

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]
SAMPLES, LENGTH, SEED = 64, 512, 0
MAX_KL, MAX_RATIO = 0.5, 1.5  # it is still this model; no promise of quality


def quiet(done: int, total: int, text: str) -> None:
    """A progress display that shows nothing."""


def silent(text: str) -> None:
    """A voice that says nothing."""


def default_recipe(checkpoint: Any) -> str:
    """What is done when no recipe is given: GPTQ at 4 bits for generators, static int8 for encoders."""
    if checkpoint.task.kind != "text-generation":
        return "rtn:scheme=W8A8_STATIC"
    from wherry.recipe import roles

    widths = {checkpoint.shape(name)[-1] for name, role, _ in roles(checkpoint) if role == "linear"}
    size = next((g for g in (64, 32, 16) if all(k % g == 0 for k in widths)), -1)
    return f"gptq:scheme=W4A16_ASYM,group_size={size}"


def plan(model: str | Path, recipe: str | None = None, formats: tuple[str, ...] = ()) -> Any:
    """Decide and check everything that can be known before any work. Cost: seconds; reads no weights."""
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Recipe

    checkpoint = Checkpoint.open(model)
    return Recipe.parse(default_recipe(checkpoint) if recipe is None else recipe).plan(checkpoint, formats)


def inspect(model: str | Path, target: str | None = None) -> Report:
    """Architecture, task, parameters, bytes, and how many tensors are stored in which way. Reads no weights."""
    from wherry.summary import inspect as summarize

    return summarize(model, target, default_recipe)


def capture(model: Any, out: str | Path, example_inputs: Any = None, **options: Any) -> Report:
    """A torch module, or a transformers folder of a classifier or encoder, as a graph model: see capture.py."""
    from wherry.capture import capture as draw
    from wherry.capture import folder

    if isinstance(model, str | Path) and example_inputs is None:
        return folder(model, out)
    return draw(model, out, example_inputs, **options)


def dry_run(
    model: str | Path,
    recipe: str | None = None,
    formats: tuple[str, ...] = (),
    data_file: str | Path | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = SEED,
) -> Report:
    """The plan of a compression, tensor by tensor, with the forecast of memory, disk and size. Writes nothing."""
    from wherry.deliver import forecast

    made, batches, _ = _prepare(model, recipe, formats, data_file, samples, length, seed, silent)
    report = Report(f"plan: {made.recipe}")
    for row in made.rows:
        stays = f"as it is ({row.dtype})" if row.step < 0 else row.dtype
        what = str(row.scheme) if row.scheme else stays
        what += f", {100 * row.sparsity:.4g}% zeros" if row.sparsity else ""
        note = "; ".join([*([row.reason] if row.reason else []), *row.notes])
        report.add(what, row.name, row.after, "B", note=f"was {row.before:,} B" + (f"; {note}" if note else ""))
    for what, value in forecast(made, batches, formats).items():
        report.add(f"forecast: {what}", "", value, "B")
    report.add("forecast: blocks", "", made.config.get("num_hidden_layers"), note="a killed run loses at most one")
    return report


def _prepare(
    model: str | Path, recipe: str | None, formats: tuple[str, ...], data_file: str | Path | None,
    samples: int, length: int, seed: int, say: Say,
) -> tuple[Any, list[Any], dict[str, Any]]:  # fmt: skip
    from wherry.deliver import calibration

    made = plan(model, recipe, formats)
    if recipe is None:
        say(f"no --recipe given: taking {made.recipe}")
    if not made.recipe.calibrated:
        if data_file is not None:
            data.read(data_file)
            say(f"{made.recipe} needs no data: {data_file} is not used")
        return made, [], {"data": None}
    if data_file is None and made.checkpoint.graph is not None and made.task.kind != "sentence-similarity":
        raise BadInput(
            f"{made.recipe} calibrates on examples of {made.task.kind}, and none are shipped.\n"
            "Give --data (a folder, table or .npz), or a scheme without static ranges: W8A8, W8A16."
        )
    source = data.read(data_file or data.shipped("calibration"))
    if data_file is None:
        say(f"no --data given: calibrating on the shipped {source.name}")
    batches = calibration(made.checkpoint, source, samples, length, seed)
    found = sum(len(next(iter(batch.values()))) for batch in batches)
    if made.task.kind == "text-generation" and found < samples:
        say(f"{source.name} gives {found} windows of {length} tokens, fewer than the {samples} asked for")
    return made, batches, {"data": source.digest, "calibration": source.name, "windows": [samples, length, seed]}


def compress(
    model: Any,
    out: str | Path,
    recipe: str | None = None,
    formats: tuple[str, ...] = (),
    data_file: str | Path | None = None,
    evaluation: str | Path | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = SEED,
    max_kl: float = MAX_KL,
    max_ratio: float = MAX_RATIO,
    device: str = "cpu",
    progress: Progress = quiet,
    say: Say = silent,
    example_inputs: Any = None,
) -> Report:
    """Compress a model into the folder `out` and prove each format; stock transformers loads it, or the plan says not.

    A killed run goes on where it was when it is called again with the same arguments.

    Args:
        model: folder, .gguf or .onnx file, hub id, or a torch.nn.Module, which is captured first.
        example_inputs: of a module: tensors by name or in order, batch 2 or more.
        out: folder to make; it must not exist.
        recipe: recipe string or YAML file; None = default_recipe, and `say` tells.
        formats: names on the formats shelf; each becomes a folder inside of `out`.
        data_file: calibration data (.txt, .jsonl, .csv, .tsv, .npy token ids); None = the shipped text.
        evaluation: data to judge on; None = the shipped text, from another source than the calibration's.
        samples, length, seed: calibration windows, their length in tokens, and how they are drawn.
        max_kl, max_ratio: how far an export may be from the original to pass: KL in nats/token and perplexity ratio.
        device: where solvers compute, "cpu" or "cuda"; the model itself runs on the CPU.
        progress: called as progress(done, total, text). say: told what was chosen by default.

    Returns: sizes; the proof's rows and a verdict. The same rows are in out/report.json.

    Raises:
        wherry.Error: before any work where it can be known; nothing is left behind.
    """
    from wherry.deliver import deliver
    from wherry.describe import sizes, write
    from wherry.prove import prove_folder, text_windows

    if not isinstance(model, str | Path):
        with TemporaryDirectory() as folder:
            capture(model, graph := Path(folder) / type(model).__name__, example_inputs)
            options = {"max_kl": max_kl, "max_ratio": max_ratio, "device": device, "progress": progress, "say": say}
            return compress(
                graph, out, recipe, formats, data_file, evaluation, samples, length, seed, **options  # type: ignore[arg-type]
            )
    _there(device)
    out = Path(out)
    judged = data.read(evaluation) if evaluation else None
    for name in formats:
        shelf.find("formats", name)
    made, batches, stamp = _prepare(model, recipe, formats, data_file, samples, length, seed, say)
    made.device, stamp = device, stamp | ({} if device == "cpu" else {"device": device})
    report = Report(f"{made.checkpoint.name} -> {out.name}")
    full = bool(formats) or made.checkpoint.graph is not None  # a graph's result is what runs
    if formats and made.task.kind == "text-generation":
        text_windows(made.task, judged)  # too little text to judge on is told before the work

    def describe(result: Path) -> None:
        report.extend(sizes(made, result))
        report.extend(prove_folder(result, made.checkpoint, judged, full, (max_kl, max_ratio), progress))
        write(result, out, report, stamp)

    deliver(made, out, formats, batches, stamp | {"judged": judged.digest if judged else None}, describe, progress)
    return report if report.rows else Report.load(out / "report.json")


def _there(device: str) -> None:
    """Raise BadInput for a device that solvers do not know, Missing for one that is not here."""
    if device == "cpu":
        return
    if device != "cuda":
        raise BadInput(f"--device {device} is not known; it is cpu or cuda")
    import torch

    if not torch.cuda.is_available():
        raise Missing("--device cuda: torch sees no CUDA device here; leave --device out to solve on the CPU")


def export(checkpoint: str | Path, out: str | Path, format: str, progress: Progress = quiet) -> Report:
    """Write a checkpoint in another format, holding the same codes, into the folder `out`.

    Raises Unsupported, before any work, when the format cannot hold one of its schemes.
    """
    from wherry.checkpoint import Checkpoint
    from wherry.deliver import save
    from wherry.evaluate import proof
    from wherry.journal import vacant
    from wherry.recipe import Plan

    source, out = Checkpoint.open(checkpoint), Path(out)
    vacant(out)
    module = shelf.find("formats", format)
    notes = Plan.of(source).legal(format)
    artifact = save(source, out, format, progress)
    report = Report(f"{source.name} -> {out}")
    report.add("bytes", format, artifact.bytes, "B")
    for name, note in notes.items():
        report.add("note", name, note)
    report.extend(proof.structure(artifact, module.decode(artifact), None, format, progress=progress))
    return proof.conclude(report)


def verify(
    artifact: str | Path,
    against: str | Path | None = None,
    data_file: str | Path | None = None,
    runtime: str = "auto",
    speed: bool = True,
    max_kl: float = MAX_KL,
    max_ratio: float = MAX_RATIO,
    progress: Progress = quiet,
) -> Report:
    """Reload an artifact on the runtime that will run it and prove it; the last row is the verdict, PASS or FAIL.

    Args:
        artifact: a folder that wherry wrote, or a .gguf file; of a folder with exports inside, all are proved.
        against: the original model; without it, structure and finite outputs alone are proved, and the report says so.
        data_file: data to judge on; None = what the package ships.
        runtime: a name, or "auto" for the usual one of each format.
        speed: also measure speed and memory.
        max_kl, max_ratio: how far from the original it may be: KL in nats/token and perplexity ratio.
        progress: called as progress(done, total, text).
    """
    from wherry.checkpoint import Checkpoint
    from wherry.prove import item, prove, rewritten

    original = Checkpoint.open(against) if against else None
    source = data.read(data_file) if data_file else None
    found = artifacts(artifact)
    if runtime != "auto":
        found = [a for a, _ in able(artifact, runtime)]
    items = [item(a, Path(artifact), runtime) for a in found]
    original = rewritten(original, items[0].artifact)
    limits = (max_kl, max_ratio)
    report = prove(items, original, source, speed=speed, limits=limits, progress=progress)
    report.title = f"proof of {artifact}"
    if original is None:
        report.rows.insert(
            0,
            replace(
                report.rows[0], what="against", where="", value=None, note="no --against: not compared with an original"
            ),
        )
    return report


def evaluate(
    model: str | Path,
    data_file: str | Path | None = None,
    runtime: str = "auto",
    progress: Progress = quiet,
    against: str | Path | None = None,
    robustness: bool = False,
    max_bad: float = data.MAX_BAD,
    most: int = 0,
) -> Report:
    """Quality of a model or artifact on data, by the metrics of its task, each with a 95% interval.

    Args:
        model: an artifact, a graph model, a checkpoint; of a task that writes, a folder with encoder and decoder.
        data_file: labelled examples, see `data.read`; None = what the package ships, for texts and sentence pairs.
        runtime: a name, or "auto". progress: called as progress(done, total, text).
        against: the original: measured too, with paired differences.
        robustness: also under noise, blur, typos ... (`evaluate.perturb`), and the latency of single calls.
        max_bad: share of pictures or sounds that may be undecodable; they are named in the report.
        most: judge on so many examples, drawn with a seed; 0 = all.
    """
    from wherry import judge

    return judge.evaluate(model, data_file, runtime, progress, against, robustness, max_bad, most)


def explain(
    model: str | Path, given: str, against: str | Path | None = None, out: str | Path = "explain.png",
    runtime: str = "auto", progress: Progress = quiet,
) -> Report:  # fmt: skip
    """Which parts of one input an answer rests on, as a picture; with `against`, before and after compression.

    Args:
        model: as for `evaluate`. against: the original; its answer is what is explained in both.
        given: a text, "A || B" for a pair of sentences, or a file: of text, a picture, or a sound.
        out: .png or .html. runtime: a name, or "auto".
    """
    from wherry.explain import explain as work

    return work(model, given, against, Path(out), runtime, progress)


def compare(
    a: str | Path, b: str | Path, data_file: str | Path | None = None, progress: Progress = quiet,
    max_bad: float = data.MAX_BAD,
) -> Report:  # fmt: skip
    """Two models or artifacts on the same data: sizes, quality with paired intervals, B against A."""
    from wherry import judge

    return judge.compare(a, b, data_file, progress, max_bad)


def measure(artifact: str | Path, runtime: str = "auto", threads: int = 0, progress: Progress = quiet) -> Report:
    """Speed of an artifact on this machine, and the peak memory of this process."""
    from wherry.evaluate import speed

    session, opened, _ = open_session(artifact, runtime, threads)
    example = opened.example if "inputs" in opened.manifest else None
    report = speed.measure(session, opened.task, opened.name, progress=progress, example=example)
    for key, value in session.facts.items():
        report.add(f"fact: {key}", opened.name, value)
    session.close()
    return report


def serve(
    artifact: str | Path, host: str = "127.0.0.1", port: int = 8000, runtime: str = "auto", threads: int = 0
) -> None:
    """Serve an artifact until Ctrl-C or SIGTERM: an API for its task, metrics, and a page at /."""
    from wherry.opened import opened as open_model
    from wherry.opened import whole
    from wherry.serve.app import create_app
    from wherry.serve.listen import check_port, run

    check_port(host, port)
    found = open_model(artifact, runtime, threads)
    session, opened = found.session, whole(found, Path(artifact))
    reports = [folder / "report.json" for folder in (opened.path, opened.path.parent)]  # exports lie inside of a run
    report = next((Report.load(file) for file in reports if file.is_file()), Report())
    try:
        run(create_app(session, opened, report.extend(found.chosen)), host, port)
    finally:
        session.close()


def chat(artifact: str | Path, runtime: str = "auto", threads: int = 0) -> None:
    """Talk to an artifact in the terminal."""
    from wherry.serve import chat as terminal

    session, opened, _ = open_session(artifact, runtime, threads)
    terminal.chat(session, opened)
    session.close()


def listing(what: str = "") -> Report:
    """Names and first lines of a shelf, of all shelves, or of the schemes."""
    from wherry.shelf import SHELVES, suggest

    report = Report(what or "what there is")
    if what in ("", "schemes"):
        from wherry.scheme import PRESETS

        for name, scheme in PRESETS.items():
            report.add(name, "schemes", None, note=scheme.explain())
    if what not in ("", "schemes", *SHELVES):
        raise BadInput(f"no shelf '{what}'{suggest(what, SHELVES)}; there are: {', '.join(SHELVES)}, schemes")
    for name in SHELVES if not what else [what] if what != "schemes" else []:
        for method, line in shelf.names(name).items():
            report.add(method, name, None, note=line)
    return report


def commands(path: str | Path) -> list[str]:
    """Copy-paste lines that load what lies at `path`, for each format in it."""
    return [line for artifact in artifacts(path) for line in shelf.find("formats", artifact.format).command(artifact)]


def doctor() -> Report:
    """What this machine has, and the pip line of each optional package that is missing."""
    from wherry.doctor import examine

    return examine()


def demo(out: str | Path = "demo-out", progress: Progress = quiet, say: Say = print) -> Callable[[int, bool], None]:
    """Compress two real models, prove them; returns what serves one: call it with (port, stay)."""
    from wherry.demo import run

    return run(Path(out), progress, say)
