"""wherry's own engine: GGUF files and our checkpoints of Llama-like models and Gemma on x86 CPUs, by `wherry-native`.

Full logits (grade A). Requests of several threads are computed together: each step has one token of every answer and
a part of new prompts. A conversation that begins as an earlier one did finds its keys and values again.
Source: native/ in this repository; docs/native.md.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import psutil
import wherry_native

from wherry.artifact import Artifact
from wherry.errors import BadInput, Diverged, Exhausted, Unsupported
from wherry.runtimes.native.shape import Shape
from wherry.session import NoPredict, Sampling, Score, Session, scored

INTERFACE = 5  # of the wheel that this file speaks to
if wherry_native.INTERFACE != INTERFACE:
    raise ModuleNotFoundError("the native wheel is of another version than wherry", name="wherry_native")

FORMATS = ("gguf", "compressed_tensors", "safetensors")
CONTEXT = 8192  # tokens that a session holds unless the model's own limit is lower
SEQUENCES = 32  # answers that are computed together; more wait
PAGE = 32  # tokens
CACHE_TOKENS = 32768  # of all answers together, unless memory is short; taken from the system as they are written


def available() -> dict[str, str]:
    """Version and the instruction set that it uses here."""
    return {"version": f"wherry-native {wherry_native.__version__}", "isa": wherry_native.best_isa()}


def accepts(artifact: Artifact) -> bool:
    """Text generators in a GGUF file or in a Hugging Face folder, also compressed by wherry."""
    return artifact.format in FORMATS and artifact.manifest["task"]["kind"] == "text-generation"


def load(
    artifact: Artifact,
    device: str = "cpu",
    threads: int = 0,
    context: int = 0,
    isa: str = "",
    cache_tokens: int = 0,
    pinned: bool = False,
    activations: int = 8,
    cache: Literal["recorded", "float", "int8"] = "recorded",
) -> Session:
    """Read the weights once, into panels of the same integers.

    Args:
        artifact: a GGUF artifact or bare file, or a Hugging Face folder.
        device: "cpu".
        threads: 0 = all cores that this process may use.
        context: tokens that a call may hold, prompt and answer together; 0 = the model's limit, at most 8192.
        isa: kernels by name (wherry_native.isas()); "" = the best here.
        cache_tokens: keys and values of all answers together; 0 = 32768, or what a quarter of the free memory holds.
        pinned: bind each thread to a core of its own.
        activations: bits that the inputs of products are rounded to, 8 or 16 (exact to about 2^-16, at about half the
            speed where arithmetic is the limit).
        cache: keys and values are kept as the artifact says ("recorded"), in bf16 ("float"), or in 8 bits with a scale
            for each head and token ("int8"): half the memory of a context.

    Raises:
        Unsupported: another architecture, or weights of a type that is not read.
        Corrupt: the file contradicts itself.
        Exhausted: not enough memory for the weights, or for one context.
    """
    from wherry.runtimes.native import weights

    if device != "cpu":
        raise BadInput(f"--device {device}: the native runtime runs on the CPU; use cpu")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    threads = threads or len(cores)
    source = weights.source(artifact)
    shape = source.shape
    kept = artifact.manifest.get("kv_cache") if cache == "recorded" else cache
    bits = 8 if kept == "int8" else 16
    token_bytes = shape.token_bytes(bits)
    context = min(context or CONTEXT, shape.context) if not context else context
    tokens = cache_tokens or max(context, CACHE_TOKENS)
    room = psutil.virtual_memory().available // 4
    if not cache_tokens:
        tokens = max(min(tokens, room // token_bytes), min(context, tokens))
    if tokens * token_bytes > 4 * room or source.bytes > 4 * room:
        raise Exhausted(
            f"{artifact.path}: weights of {source.bytes / 1e9:.1f} GB and keys and values of "
            f"{tokens * token_bytes / 1e9:.1f} GB do not fit in {4 * room / 1e9:.1f} GB of free memory.\n"
            f"Free memory, or take a smaller context."
        )
    try:
        tables = (shape.frequencies, shape.factors, shape.windows, shape.rotation)
        engine = wherry_native.Engine(shape.config(context), *tables)
        try:
            source.fill(engine)
            pages = -(-tokens // PAGE)
            engine.start(isa, threads, cores if pinned else (), pages, SEQUENCES, activations, bits)
        except BaseException:
            engine.close()
            raise
    except wherry_native.NativeError as error:
        if "out of memory" in str(error):
            raise Exhausted(f"{artifact.path}: {error}; free memory, or take a smaller context") from error
        kind = BadInput if any(word in str(error) for word in ("no kernels", "threads", "activations")) else Unsupported
        raise kind(f"{artifact.path}: the native runtime does not run it: {error}") from error
    facts = {
        "runtime": "native", **available(), "isa": isa or wherry_native.best_isa(), "threads": str(threads),
        "device": "cpu", "format": artifact.format, "context": str(context),
        "cache": f"{pages * PAGE} tokens of {bits} bits", "activations": f"{activations} bits",
    }  # fmt: skip
    if bits == 8:
        facts["kv cache"] = "int8, a scale for each head and token"
    return Native(engine, shape, context, facts)


class Native(NoPredict):
    """One engine. Thread-safe; calls of several threads share its steps.

    parallel: how many answers are worth computing at the same time.
    """

    grade = "A"
    parallel = SEQUENCES

    def __init__(self, engine: Any, shape: Shape, context: int, facts: dict[str, str]) -> None:
        self.engine, self.shape, self.limit, self.facts = engine, shape, context, facts
        self.open = True
        self.inside = 0  # calls into the engine that have not returned
        self.door = threading.Condition()

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """Full logits of one text. Memory: 4 bytes x tokens x vocabulary."""
        ids = self._checked(tokens, 2, self.limit)
        logits = np.empty((len(ids) - 1, self.shape.vocab), dtype=np.float32)
        for _ in self._answer(ids, wherry_native.sampling(), (), logits):
            pass
        return scored(logits, ids[1:], top_k)

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Tokens as they come; closing the iterator ends the answer at its next step."""
        ids = self._checked(tokens, 1, self.limit - 1)
        how = wherry_native.sampling(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
            top_k=sampling.top_k, min_p=sampling.min_p, repeat=sampling.repetition_penalty,
            presence=sampling.presence_penalty, frequency=sampling.frequency_penalty, seed=sampling.seed & (2**64 - 1),
        )  # fmt: skip
        return self._answer(ids, how, sampling.stop, None)

    def stats(self) -> dict[str, int]:
        """Steps, tokens, requests that run and wait, pages of the cache."""
        with self._call():
            return self.engine.stats()

    def close(self) -> None:
        """Free memory and threads; answers that are being written end with an error."""
        with self.door:
            self.open = False
            while self.inside:
                self.door.wait()
            self.engine.close()

    def _answer(self, ids: list[int], how: Any, stop: Sequence[int], logits: np.ndarray | None) -> Iterator[int]:
        with self._call():
            try:
                request = self.engine.submit(ids, how, stop, logits)
            except wherry_native.NativeError as error:
                raise Exhausted(f"{error}; take a shorter text, or load with a larger cache_tokens") from error
        end = "running"
        try:
            while end == "running":
                with self._call():
                    tokens, _, end = self.engine.read(request)
                yield from tokens
        finally:
            if end == "running" and self.open:
                with self._call():
                    self.engine.cancel(request)
        if end == "diverged":
            raise Diverged("the model answered with NaN or infinity; check the artifact: wherry verify")
        if end == "closed":
            raise BadInput("this session is closed")

    def _call(self) -> "Call":
        return Call(self)

    def _checked(self, tokens: Sequence[int], least: int, most: int) -> list[int]:
        ids = [int(token) for token in tokens]
        if not least <= len(ids) <= most:
            raise BadInput(f"{len(ids)} tokens are not {least} to {most}, which fit the context of {self.limit}")
        if min(ids) < 0 or max(ids) >= self.shape.vocab:
            raise BadInput(f"token ids reach from {min(ids)} to {max(ids)}; this model has 0 to {self.shape.vocab - 1}")
        return ids


class Call:
    """Inside, the engine is not freed. Raises BadInput when the session is closed."""

    def __init__(self, session: Native) -> None:
        self.session = session

    def __enter__(self) -> None:
        with self.session.door:
            if not self.session.open:
                raise BadInput("this session is closed")
            self.session.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.session.door:
            self.session.inside -= 1
            self.session.door.notify_all()
