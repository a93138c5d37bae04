"""ONNX Runtime on the CPU: encoders and language models from the `onnx` format; grade A, full logits. No torch.

Idea:   language models run with their key-value cache as one buffer per layer, of the length that the call may need,
        bound as input and output at once, so that nothing is copied from token to token. While a prompt is read,
        the optional input `logits_from` asks for the last row of logits only.
Cost:   memory: the file once, and what ONNX Runtime repacks for its kernels (about the codes once more).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from wherry.artifact import Artifact
from wherry.errors import BadInput, Corrupt, Error, Exhausted, Unsupported
from wherry.session import NoGenerate, NoPredict, Sampling, Score, Session, Signature, draw

CHUNK = 128  # tokens that go through the model at once; bounds the memory of activations
ROWS = 32  # rows of logits that are ranked at once
LAST = "logits_from"
SPIN = False  # idle threads sleep: on a machine that others use too, spinning ones halve the speed
SLOW = ["SkipLayerNormFusion"]  # its kernel takes 7 times as long as the Add and LayerNormalization that it fuses
ISA = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


def available() -> dict[str, str]:
    """Version, and the CPU's flags: ONNX Runtime picks its kernels by them when it runs, and does not say which."""
    return {"onnxruntime": ort.__version__, "isa": isa()}


def isa() -> str:
    """The vector extensions of this CPU that matter to integer kernels."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return "unknown (no /proc/cpuinfo here)"
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    have = set(line.partition(":")[2].split())
    return f"cpu flags: {' '.join(flag for flag in ISA if flag in have) or 'none of note'}"


def accepts(artifact: Artifact) -> bool:
    """Folders of the formats `onnx`, of any task, and `ort`."""
    return artifact.format in ("onnx", "ort")


def load(artifact: Artifact, device: str = "cpu", threads: int = 0) -> Session:
    """Load an artifact.

    Raises:
        BadInput: another device. Corrupt: the file is damaged. Unsupported: an operator that this version lacks.
    """
    if device != "cpu":
        raise BadInput(f"--device {device}: this version runs ONNX on the CPU; use cpu")
    kind = Decoder if artifact.task.kind == "text-generation" else Encoder
    return kind(artifact, threads)


def over(checkpoint: Any, threads: int = 0) -> Session:
    """A session over a float graph that was never exported: the original, to compare with."""
    fields = {"format": "onnx", "main": checkpoint.graph.path.name, "model": checkpoint.name, "files": {}, "plan": []}
    return Encoder(Artifact(checkpoint.path, {**fields, "task": checkpoint.task.to_dict()}), threads)


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """An inference session with that many threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(SPIN)))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW)
    except Exception as error:  # the wheel's kinds have no common base but Exception
        raise translated(error, path) from error


def translated(error: Exception, path: Path) -> Error:
    """The wheel's error as one of ours."""
    kind, text = type(error).__name__, " ".join(str(error).split())[:300]
    if kind in ("NotImplemented", "InvalidGraph") and "opset" in text.lower() or "not a registered function" in text:
        return Unsupported(f"ONNX Runtime {ort.__version__} cannot run {path}: {text}\npip install -U onnxruntime")
    if isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate memory" in text:
        return Exhausted(f"not enough memory to run {path}: {text}")
    return Corrupt(f"{path} is damaged, or its weights beside it are: {text}")


class Loaded:
    """What both kinds of session share: one ONNX Runtime session, a lock, facts."""

    grade = "A"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.path, self.lock = artifact.main, threading.Lock()
        threads = threads or cores()
        self.session: ort.InferenceSession | None = open_session(artifact.main, threads)
        self.facts = {
            "runtime": "onnxruntime", "version": ort.__version__, "build": build(),
            "isa": isa(), "threads": str(threads), "device": "cpu", "format": "onnx",
            "activations": str(artifact.manifest.get("activations", "")),
        }  # fmt: skip

    @property
    def live(self) -> ort.InferenceSession:
        """The session. Raises BadInput after close()."""
        if self.session is None:
            raise BadInput("this session is closed: load the artifact again")
        return self.session

    def close(self) -> None:
        """Free the weights and the threads."""
        with self.lock:
            self.session = None


def cores() -> int:
    """Physical cores that this process may use, at least 1; a second thread on one core only gets in the way."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def build() -> str:
    """The wheel's commit, as it says itself."""
    parts = [part.strip() for part in ort.get_build_info().split(",")]
    return next((part for part in parts if "commit" in part), parts[0])


def signature(values: Sequence[Any]) -> Signature:
    """Dtypes in numpy's words ("tensor(float)" is float32) and shapes of inputs or outputs."""
    kinds = {"float": "float32", "double": "float64"}
    types = {value.name: value.type.removeprefix("tensor(").removesuffix(")") for value in values}
    return {value.name: (kinds.get(types[value.name], types[value.name]), tuple(value.shape)) for value in values}


class Encoder(Loaded, NoGenerate):
    """A graph that is run once: a sentence encoder, a classifier, any other. Thread-safe."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact, threads)
        self.inputs, self.outputs = signature(self.live.get_inputs()), signature(self.live.get_outputs())

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs by name to outputs by name, the first axis of each being the batch."""
        with self.lock:
            session = self.live
            names = [output.name for output in session.get_outputs()]
            try:
                return dict(zip(names, session.run(names, inputs), strict=True))
            except Exception as error:  # the wheel's kinds have no common base but Exception
                shapes = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in inputs.items())
                reason = " ".join(str(error).split())[:200]
                raise BadInput(f"{self.path.name} does not take these inputs: {shapes}\n{reason}") from error


class Decoder(Loaded, NoPredict):
    """A language model with a key-value cache. Thread-safe: calls from several threads take turns, token by token."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact, threads)
        session = self.live
        self.limit = artifact.task.max_length
        self.past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
        present = {o.name: o.shape for o in session.get_outputs() if o.name.startswith("present.")}
        if not self.past or len(present) != len(self.past):
            raise Unsupported(
                f"{self.path} has no key-value cache as inputs and outputs: not a language model of this format"
            )
        self.facts["genai"] = genai()
        self.vocab = int(session.get_outputs()[0].shape[-1])
        self.last = any(i.name == LAST for i in session.get_overridable_initializers())
        config = artifact.path / "genai_config.json"
        self.width = head_size(config)

    def cache(self, length: int) -> Cache:
        """Room for `length` tokens."""
        return Cache(self, min(length, self.limit))

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """Full logits of one window, in parts of 128 tokens. Memory: 4 bytes x tokens x vocabulary, and one part."""
        self._check(tokens)
        if len(tokens) < 2:
            raise BadInput("one token predicts nothing that is given: score two or more")
        ids = np.array(tokens, np.int64)
        cache = self.cache(len(ids))
        k = min(top_k, self.vocab)
        logits = np.empty((len(ids) - 1, self.vocab), np.float32)
        given = np.empty(len(logits), np.float32)
        top, values = np.empty((len(logits), k), np.int64), np.empty((len(logits), k), np.float32)
        for begin in range(0, len(ids), CHUNK):
            part = cache.step(ids[begin : begin + CHUNK], every=True)
            logits[begin : begin + CHUNK] = part[: len(logits) - begin]
        for begin in range(0, len(logits), ROWS):
            rows = slice(begin, begin + ROWS)
            logprob = logits[rows] - logsumexp(logits[rows])
            given[rows] = np.take_along_axis(logprob, ids[1:][rows, None], -1)[:, 0]
            best = np.argpartition(-logprob, k - 1, -1)[:, :k]
            order = np.argsort(-np.take_along_axis(logprob, best, -1), -1, kind="stable")
            top[rows] = np.take_along_axis(best, order, -1)
            values[rows] = np.take_along_axis(logprob, top[rows], -1)
        return Score(given, top, values, logits)

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yield ids one by one; the prompt is read on the first call of next()."""
        self._check(tokens)
        random = np.random.default_rng(sampling.seed)
        count = min(sampling.max_tokens, self.limit - len(tokens))
        if count < 1:
            return
        cache = self.cache(len(tokens) + count)
        ids, text = np.array(tokens, np.int64), list(tokens)
        for i in range(0, len(ids), CHUNK):
            logits = cache.step(ids[i : i + CHUNK])
        for i in range(count):
            token = draw(logits[-1], sampling, random, text, len(tokens))
            if token in sampling.stop:
                return
            yield token
            text.append(token)
            if i + 1 < count:
                logits = cache.step(np.array([token], np.int64))

    def _check(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise BadInput("no tokens: a prompt of one token or more is wanted")
        if len(tokens) > self.limit:
            raise BadInput(f"{len(tokens)} tokens are more than the model's {self.limit}")
        if min(tokens) < 0 or max(tokens) >= self.vocab:
            raise BadInput(f"token ids go from {min(tokens)} to {max(tokens)}; the model knows 0 to {self.vocab - 1}")


class Cache:
    """The keys and values of one conversation: a buffer [1, heads, length, width] per layer and kind."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        self.decoder, self.length, self.seen = decoder, length, 0
        self.mask = np.ones((1, length), np.int64)
        self.buffers = {n: np.zeros((1, s[1], length, decoder.width), np.float32) for n, s in decoder.past.items()}
        self.values = {
            n: ort.OrtValue.ortvalue_from_numpy(b) for n, b in self.buffers.items()
        }  # no copy: the same memory

    def step(self, ids: np.ndarray, every: bool = False) -> np.ndarray:
        """Feed ids int64 [n]; logits float32 [n, vocab], or [1, vocab] of the last one unless `every`."""
        decoder = self.decoder
        total = self.seen + len(ids)
        feeds = {"input_ids": ids[None], "attention_mask": np.ascontiguousarray(self.mask[:, :total])}
        with decoder.lock:
            try:
                if len(ids) > 1 and decoder.last and not every:
                    logits = self._copying(feeds | {LAST: np.array([-1], np.int64)}, total)
                else:
                    logits = self._in_place(feeds)
            except RuntimeError as error:
                raise translated(error, decoder.path) from error
        self.seen = total
        return logits

    def _in_place(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """One run whose new keys and values go straight into the buffers."""
        session = self.decoder.live
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()[0]
        return logits

    def _copying(self, feeds: dict[str, np.ndarray], total: int) -> np.ndarray:
        """One run by plain feeds, which alone can set the optional input; the buffers are copied in and out."""
        past = {name: np.ascontiguousarray(buffer[:, :, : self.seen]) for name, buffer in self.buffers.items()}
        names = ["logits", *(name.replace("past_key_values", "present") for name in past)]
        logits, *present = self.decoder.live.run(names, feeds | past)
        for buffer, new in zip(self.buffers.values(), present, strict=True):
            buffer[:, :, self.seen : total] = new[:, :, self.seen : total]
        return logits[0]


def logsumexp(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the sum of exponentials over the last axis: [n, vocab] to [n, 1], summed in float64."""
    largest = logits.max(-1, keepdims=True)
    total: np.ndarray = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True, dtype=np.float64))
    return total.astype(np.float32)


def head_size(config: Path) -> int:
    """Numbers per attention head, from genai_config.json. Raises Corrupt when it does not say."""
    try:
        return int(json.loads(config.read_text(encoding="utf8"))["model"]["decoder"]["head_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{config} does not give the head size: {type(error).__name__}: {error}") from error


def genai() -> str:
    """Version of onnxruntime-genai, which loads the same folder; it is not needed here."""
    try:
        return version("onnxruntime-genai")
    except ModuleNotFoundError:
        return "not installed"


__all__ = ["accepts", "available", "load"]
