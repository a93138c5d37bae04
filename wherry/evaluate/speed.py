"""Speed and memory of one loaded session, as a user meets them: wall-clock time, text handling of the runtime included.

Units:  prefill and decode in tokens/s, time to first token in s, sentences/s, latency in s; medians of the repeats,
        low and high are the slowest and the fastest repeat (not a confidence interval).
Cost:   repeats x (prompt + new) tokens, or repeats x 64 sentences, after one warm-up of each kind.
Fails:  a peak belongs to a process: measure each artifact in a process of its own, or peaks mix.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from wherry.data import read, sentences, shipped
from wherry.errors import BadInput
from wherry.evaluate.perplexity import Progress, silent
from wherry.report import Report
from wherry.session import Sampling, Session
from wherry.task import Task

BATCH = 8
SENTENCES = 64
RUNS, MOST_S = 100, 5.0  # of a model that takes arrays: so many runs, or so many seconds
Example = Callable[[int], dict[str, np.ndarray]]


def measure(
    session: Session,
    task: Task,
    where: str = "",
    repeats: int = 3,
    prompt: int = 512,
    new: int = 64,
    texts: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = silent,
    example: Example | None = None,
) -> Report:
    """Time a session and read this process's peak memory.

    Args:
        session, task: what to time, and what it is for.
        where: name of the artifact in the rows.
        repeats: timed runs, 3 or more.
        prompt: tokens of the prefill prompt; random ones, new for each run, so that no prompt cache helps.
        new: tokens to generate after a prompt of 16, timed from the first to the last.
        texts: sentences for encoders; by default those of the shipped pairs.
        seed: of the random prompts.
        progress: called with (done, total, text).
        example: gives inputs of that many rows, for models of which no text is at hand.
    """
    if repeats < 3:
        raise BadInput(f"repeats={repeats}: three is the least for a median")
    if task.kind == "text-generation":
        report = _generator(session, task, where, repeats, prompt, new, seed, progress)
    elif example is not None:
        report = _arrays(session, example, where, progress)
    else:
        report = _encoder(session, task, where, repeats, list(texts), progress)
    peak, how = peak_memory_bytes()
    report.add("peak memory", where, peak, "B", note=how)
    return report


def _generator(
    session: Session, task: Task, where: str, repeats: int, prompt: int, new: int, seed: int, progress: Progress
) -> Report:
    rng = np.random.default_rng(seed)
    vocabulary = _plain_tokens(task)
    prompt = max(1, min(prompt, task.max_length - 2))
    new = max(2, min(new, task.max_length - 18))
    draw = lambda count: [int(token) for token in rng.choice(vocabulary, count)]  # noqa: E731
    _stream(session, draw(prompt), 4)  # warm up: buffers, pages, threads
    first, decode, short = [], [], []
    for run in range(repeats):
        first.append(_stream(session, draw(prompt), 1)[0])
        stamps = _stream(session, draw(16), new)
        short.append(len(stamps))
        if len(stamps) > 1:
            decode.append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
        progress(run + 1, repeats, f"speed of {where}".rstrip(" of"))
    report = Report()
    note = f"median of {repeats}, slowest to fastest; "
    rates = [prompt / seconds for seconds in first]
    _median(
        report, "prefill", where, rates, "tokens/s", f"{note}prompt of {prompt} tokens, until the first answer token"
    )
    counted = f"{min(short)} to {max(short)}" if min(short) != max(short) else str(new)
    early = "" if min(short) == new else f" (of {new} asked for: the model ended by itself)"
    _median(report, "decode", where, decode, "tokens/s", f"{note}{counted} tokens{early}, without prefill")
    _median(report, "time to first token", where, first, "s", f"{note}prompt of {prompt} tokens")
    return report


def _encoder(session: Session, task: Task, where: str, repeats: int, texts: list[str], progress: Progress) -> Report:
    texts = sorted((texts or sentences(read(shipped("pairs")), SENTENCES, seed=0))[:SENTENCES], key=len)
    words = sum(len(text.split()) for text in texts) / len(texts)
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]

    def answer(batch: list[str]) -> None:
        inputs = task.batch(batch)
        task.answer(session.predict(inputs), inputs)

    for batch in batches:
        answer(batch)
    rates, latency = [], []
    for run in range(repeats):
        start = perf_counter()
        for batch in batches:
            answer(batch)
        rates.append(len(texts) / (perf_counter() - start))
        single = texts[(run * len(texts)) // repeats]
        start = perf_counter()
        answer([single])
        latency.append(perf_counter() - start)
        progress(run + 1, repeats, f"speed of {where}".rstrip(" of"))
    report = Report()
    note = f"median of {repeats}, slowest to fastest; "
    how = f"{note}text to embedding, batches of {BATCH}, {words:.1f} words each"
    _median(report, "sentences", where, rates, "sentences/s", how)
    _median(report, "latency", where, latency, "s", f"{note}one sentence")
    return report


def _arrays(session: Session, example: Example, where: str, progress: Progress) -> Report:
    """Inputs as they are, random: the time of the model alone."""
    one, many = example(1), example(BATCH)
    latency: list[float] = []
    rates: list[float] = []
    for inputs, seconds, rows in ((one, latency, 1), (many, rates, BATCH)):
        session.predict(inputs)
        begin = perf_counter()
        while len(seconds) < RUNS and perf_counter() - begin < MOST_S or len(seconds) < 3:
            start = perf_counter()
            session.predict(inputs)
            seconds.append(perf_counter() - start)
        progress(rows, BATCH, f"speed of {where}".rstrip(" of"))
    report = Report()
    note = f"of {len(latency)} runs with one example, random numbers"
    report.add(
        "latency", where, float(np.median(latency)), "s", float(min(latency)), float(max(latency)), f"median {note}"
    )
    report.add("latency p99", where, float(np.quantile(latency, 0.99)), "s", note=note)
    _median(report, "examples", where, [BATCH / s for s in rates], "examples/s", f"batches of {BATCH}, random numbers")
    return report


def _plain_tokens(task: Task) -> np.ndarray:
    """Ids of the vocabulary without special and added tokens."""
    tokenizer = task.tokenizer
    special = set(tokenizer.get_added_tokens_decoder())
    plain = [i for i in range(tokenizer.get_vocab_size(with_added_tokens=True)) if i not in special]
    return np.array(plain or [0])


def _stream(session: Session, tokens: list[int], count: int) -> list[float]:
    """Seconds from the call to each generated token; at least one."""
    start, stamps = perf_counter(), []
    for _ in session.generate(tokens, Sampling(max_tokens=count)):
        stamps.append(perf_counter() - start)
        if len(stamps) == count:
            break
    return stamps or [perf_counter() - start]


def _median(report: Report, what: str, where: str, values: list[float], unit: str, note: str) -> None:
    if not values:
        report.add(what, where, None, unit, note="the model ended every answer at once: no token to time")
        return
    report.add(what, where, float(np.median(values)), unit, float(min(values)), float(max(values)), note)


def peak_memory_bytes() -> tuple[int, str]:
    """The most physical memory that this process has held so far, in bytes, and how it was read."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "VmHWM of the process"
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset), "peak working set of the process"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss of the process"
