"""Which runtime runs an artifact: named by the user, or the fastest of those installed, measured on this machine."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from wherry import knobs, shelf
from wherry.artifact import MANIFEST, Artifact
from wherry.errors import BadInput, Error, Missing, Unsupported
from wherry.report import Report, read_object
from wherry.session import Sampling, Session
from wherry.task import Task

GIVEN = ("artifact", "device", "threads")  # of a runtime's load, said elsewhere
QUICK_TOKENS = 24
GRAPH = "model.onnx"


def artifacts(path: Path | str) -> list[Artifact]:
    """The artifact at `path` and those inside of it; a plain Hugging Face folder counts as one."""
    path = Path(path)
    if path.is_dir() and not (path / MANIFEST).exists() and (path / "config.json").exists():
        return [shelf.find("runtimes", "torch").wrap(path)]
    if path.suffix == ".onnx" or path.is_dir() and not (path / MANIFEST).exists() and (path / GRAPH).exists():
        return [graph(path if path.suffix == ".onnx" else path / GRAPH)]
    found = [Artifact.open(path)]
    if path.is_file():  # somebody else's GGUF file: its configuration and tokenizer are read out of it
        side = shelf.find("formats", "gguf").unpacked(path)
        task = Task.of(side, read_object(side / "config.json")).to_dict()
        found = [replace(found[0], side=side, manifest=found[0].manifest | {"task": task})]
    if path.is_dir():
        found += [Artifact.open(file.parent) for file in sorted(path.glob(f"*/{MANIFEST}"))]
    return found


def graph(file: Path) -> Artifact:
    """An ONNX file that nobody sealed, as an artifact of the `onnx` format; its task is the task.json beside it."""
    if not file.is_file():
        raise Missing(f"no such file: {file}")
    told = file.parent / "task.json"
    task = Task.of(file.parent, {}) if told.exists() else shelf.find("formats", "onnx").load(file).task
    fields = {"format": "onnx", "main": file.name, "model": file.stem if file.name != GRAPH else file.parent.name}
    return Artifact(file.parent, {**fields, "files": {}, "plan": [], "license": "", "task": task.to_dict()})


def load(artifact: Artifact, runtime: str, threads: int = 0) -> Session:
    """A session. `runtime`: a name, or with knobs of its own: "native:activations=16,pinned=true".

    Raises BadInput: the runtime has no such knob, or a value of the wrong type; and what its `load` raises.
    """
    name, given = next(knobs.split(runtime, "runtime"))
    begin = shelf.find("runtimes", name).load
    known = {p.name: p for p in inspect.signature(begin, eval_str=True).parameters.values() if p.name not in GIVEN}
    for knob in given:
        if knob not in known or known[knob].kind is inspect.Parameter.VAR_KEYWORD:
            has = ", ".join(known) or "none"
            raise BadInput(f"the runtime {name} has no knob '{knob}'{shelf.suggest(knob, known)}; it has: {has}")
    values = {knob: knobs.coerce(name, knob, value, known[knob].annotation) for knob, value in given.items()}
    session: Session = begin(artifact, threads=threads, **values)
    return session


def able(path: Path | str, runtime: str = "auto") -> list[tuple[Artifact, str]]:
    """Pairs of artifact and runtime that are installed and fit.

    Raises:
        Unsupported: the named runtime cannot run what lies there; Missing: none that could is installed.
    """
    names = list(shelf.names("runtimes")) if runtime == "auto" else [runtime]
    pairs, absent, here = [], [], artifacts(path)
    for name in names:
        try:
            module = shelf.find("runtimes", name.partition(":")[0])
            module.available()
        except Missing as error:
            if runtime != "auto":
                raise
            absent.append(str(error).splitlines()[-1])
            continue
        pairs += [(artifact, name) for artifact in here if module.accepts(artifact)]
    if not pairs:
        formats = ", ".join(artifact.format for artifact in here)
        if absent:
            raise Missing(
                f"no installed runtime runs {path} ({formats}).\nInstall one: {' or '.join(dict.fromkeys(absent))}"
            )
        raise Unsupported(f"{runtime} does not run {path} ({formats})")
    return pairs


def quick(session: Session, artifact: Artifact) -> float:
    """Seconds for a little work: decode 24 tokens, or embed 8 sentences; after one warm-up."""
    task = artifact.task
    if task.kind == "text-generation":
        prompt = list(range(10, 42))

        def work() -> None:
            for _ in session.generate(prompt, Sampling(max_tokens=QUICK_TOKENS)):
                pass
    else:
        batch = artifact.example(8) if "inputs" in artifact.manifest else task.batch(task.examples() * 4)

        def work() -> None:
            session.predict(batch)

    work()
    start = perf_counter()
    work()
    return perf_counter() - start


def open_session(path: Path | str, runtime: str = "auto", threads: int = 0) -> tuple[Session, Artifact, Report]:
    """Load an artifact on a runtime; with "auto", time each that fits and keep the fastest. The report says which."""
    report, best = Report("choice of runtime"), None
    pairs = able(path, runtime)
    if len(pairs) == 1:
        artifact, name = pairs[0]
        report.add("runtime", artifact.format, name, note="the only one that fits" if runtime == "auto" else "as asked")
        return load(artifact, name, threads), artifact, report
    failures = []
    for artifact, name in pairs:
        try:
            session = load(artifact, name, threads)
            seconds = quick(session, artifact)
        except Error as error:
            failures.append(error)
            report.add("not chosen", f"{artifact.format} on {name}", None, note=str(error).splitlines()[0])
            continue
        report.add("quick run", f"{artifact.format} on {name}", seconds, "s")
        if best is None or seconds < best[0]:
            if best:
                best[1].close()
            best = (seconds, session, artifact, name)
        else:
            session.close()
    if best is None:
        raise failures[0]
    report.add("runtime", best[2].format, best[3], note=f"the fastest of {len(pairs) - len(failures)} measured")
    return best[1], best[2], report


def measured(artifact: Artifact, runtime: str, where: str, threads: int = 0, timeout_s: int = 1200) -> Report:
    """Speed and peak memory of one artifact on one runtime, in a fresh process, so that peaks do not mix."""
    path = artifact.main if artifact.format == "gguf" and not (artifact.path / MANIFEST).exists() else artifact.path
    command = [
        sys.executable,
        "-m",
        "wherry",
        "measure",
        str(path),
        "--runtime",
        runtime,
        "--threads",
        str(threads),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise BadInput(
            f"measuring {where} on {runtime} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    found = Report.from_json(done.stdout, "the measuring process")
    return Report(found.title, [replace(row, where=where) for row in found])
