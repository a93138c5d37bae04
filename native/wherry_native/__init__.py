"""The native engine by its C interface: kernels, models that are filled weight by weight, requests that are read.

Nothing of wherry is known here; `wherry.runtimes.native` makes a session of it. Functions raise NativeError with the
library's own reason. Thread-safe where the library is: submit, read, cancel and stats from any thread.
"""

import ctypes as c
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "0.5.0"
INTERFACE = 5
PARTS = (
    "embed", "head", "norm", "attention_norm", "mlp_norm", "q", "k", "v", "o", "gate", "up", "down", "q_norm", "k_norm",
    "post_attention_norm", "post_mlp_norm",
)  # fmt: skip
ENDS = ("running", "stop", "length", "cancelled", "diverged", "closed")


class NativeError(Exception):
    """The library refused, and says why."""


class Config(c.Structure):
    """Sizes of a model, and what differs from Llama.

    neighbours: rotary pairs are neighbours, not halves of a head. rotations: tables of frequencies. gelu: the gate's
    activation is gelu by tanh, not silu. Caps c: scores and logits become c tanh(x / c); 0 = as they are.
    """

    _fields_ = [(name, c.c_int) for name in (
        "layers", "hidden", "inner", "heads", "kv_heads", "width", "vocab", "context", "neighbours", "rotations",
        "gelu",
    )] + [(name, c.c_float) for name in (
        "eps", "embed_scale", "query_scale", "attention_cap", "logit_cap",
    )]  # fmt: skip


class Sampling(c.Structure):
    """How tokens are drawn; the defaults of the library are given by `sampling()`."""

    _fields_ = [
        ("max_tokens", c.c_int), ("temperature", c.c_float), ("top_p", c.c_float), ("min_p", c.c_float),
        ("top_k", c.c_int), ("repeat", c.c_float), ("presence", c.c_float), ("frequency", c.c_float), ("seed", c.c_uint64),
        ("logprobs", c.c_int),
    ]  # fmt: skip


class Stats(c.Structure):
    """Counters of an engine since its start, and what it does now."""

    _fields_ = [(name, c.c_int64) for name in (
        "steps", "tokens", "prompt_tokens", "shared_tokens", "waiting", "running", "idle_pages", "pages",
    )]  # fmt: skip


def _library() -> c.CDLL:
    own = os.environ.get("WHERRY_NATIVE_LIBRARY")  # another build: with a sanitizer, say
    here = Path(__file__).parent
    file = Path(own) if own else next((p for p in sorted(here.glob("libwherry_native.*"))), None)
    if file is None or not file.is_file():
        raise ModuleNotFoundError("the native library is not built here", name="wherry_native")
    try:
        lib = c.CDLL(str(file))
    except OSError as error:  # built for another system
        raise ModuleNotFoundError(f"the native library does not load: {error}", name="wherry_native") from error
    i, p, i64 = c.c_int, c.c_void_p, c.c_int64
    floats, ints = c.POINTER(c.c_float), c.POINTER(c.c_int)
    functions: dict[str, tuple[Any, list[Any]]] = {
        "wn_error": (c.c_char_p, []), "wn_version": (i, []),
        "wn_isas": (i, []), "wn_isa_name": (c.c_char_p, [i]), "wn_isa_runs": (i, [i]),
        "wn_model": (p, [c.POINTER(Config), floats, floats, ints, ints]),
        "wn_vector": (i, [p, i, i, i, p, i]),
        "wn_weight": (i, [p] + [i] * 10),
        "wn_fill": (i, [p, i, i, p, i64, p, p, i, i]),
        "wn_start": (i, [p, i, i, ints, i, i, i, i, i]),
        "wn_submit": (i, [p, ints, i, c.POINTER(Sampling), ints, i, p]),
        "wn_read": (i, [p, i, ints, floats, i, i, c.c_double, ints]),
        "wn_cancel": (None, [p, i]), "wn_stats": (None, [p, c.POINTER(Stats)]),
        "wn_bytes": (i64, [p, i]), "wn_free": (None, [p]),
        "wn_alone": (p, [i] * 8 + [p, p, p]), "wn_alone_free": (None, [p]), "wn_alone_bytes": (i64, [p]),
        "wn_row": (None, [p, i, p]), "wn_product": (i, [p, i, p, i, i, i, p, p, p]),
    }  # fmt: skip
    for name, (result, arguments) in functions.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if lib.wn_version() != INTERFACE:
        reason = f"{file} has the interface {lib.wn_version()}, not {INTERFACE}: build it again"
        raise ModuleNotFoundError(reason, name="wherry_native")
    return lib


lib = _library()


def _said() -> str:
    return (lib.wn_error() or b"").decode()


def _good(code: int) -> int:
    if code < 0:
        raise NativeError(_said())
    return code


def _ints(values: Sequence[int]) -> Any:
    return (c.c_int * max(len(values), 1))(*values)


def isas() -> dict[str, bool]:
    """{instruction set: whether this processor can run it}, from plain C++ to the newest."""
    return {lib.wn_isa_name(i).decode(): bool(lib.wn_isa_runs(i)) for i in range(lib.wn_isas())}


def best_isa() -> str:
    """The one that is used when none is named."""
    return lib.wn_isa_name(-1).decode()


def isa_number(name: str) -> int:
    """Its number, -1 for "" (the best). Raises NativeError when there is none of that name, or it cannot run here."""
    if not name:
        return -1
    if not isas().get(name):
        raise NativeError(
            f"no kernels '{name}' that this processor can run; {', '.join(n for n, r in isas().items() if r)}"
        )
    return list(isas()).index(name)


class Engine:
    """A model that is filled and then started; closed by `close`, after which nothing may be called.

    frequencies: [rotations, width / 2]; factors: [rotations] of cosine and sine. For each layer, windows: positions that
    a token sees, 0 = all; rotation: the number of its frequencies.
    """

    def __init__(
        self, config: Config, frequencies: np.ndarray, factors: Sequence[float], windows: Sequence[int],
        rotation: Sequence[int],
    ) -> None:  # fmt: skip
        self.config = config
        tables = (config.rotations, config.width // 2)
        given = [np.ascontiguousarray(a, dtype=np.float32) for a in (frequencies, factors)]
        if given[0].shape != tables or given[1].shape != tables[:1]:
            raise NativeError("frequencies or factors of another length than the model's")
        if not len(windows) == len(rotation) == config.layers:
            raise NativeError("windows or rotations of another length than the model's")
        at = [a.ctypes.data_as(c.POINTER(c.c_float)) for a in given]
        self.handle = lib.wn_model(config, *at, _ints(windows), _ints(rotation))
        if not self.handle:
            raise NativeError(_said())

    def vector(self, part: str, layer: int, values: np.ndarray, bias: bool = False) -> None:
        """A norm's weight, or the bias of a matrix, as float32 [n]."""
        flat = np.ascontiguousarray(values, dtype=np.float32)
        _good(lib.wn_vector(self.handle, PARTS.index(part), layer, bias, flat.ctypes.data, flat.size))

    def blocks(self, part: str, layer: int, shape: tuple[int, int], kind: int) -> None:
        """Prepare a weight [n, k] whose rows come as blocks of a ggml type."""
        _good(lib.wn_weight(self.handle, PARTS.index(part), layer, *shape, kind, 0, 0, 0, 0, 0))

    def codes(
        self, part: str, layer: int, shape: tuple[int, int], bits: int, group: int, zero: int | None, half: bool
    ) -> None:
        """Prepare a weight whose rows come as codes. zero None: minimums beside scales. half: these are exact in fp16."""
        low = zero is None
        _good(lib.wn_weight(self.handle, PARTS.index(part), layer, *shape, -1, bits, group, low, zero or 0, half))

    def fill(
        self, part: str, layer: int, first: int, rows: np.ndarray,
        scale: np.ndarray | None = None, minimum: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """The next rows: bytes [count, bytes of a row], or codes [count, k] with scale and minimum [count, groups]."""
        rows = np.ascontiguousarray(rows).view(np.uint8)
        given = [None if a is None else np.ascontiguousarray(a, dtype=np.float32) for a in (scale, minimum)]
        at = [None if a is None else a.ctypes.data for a in given]
        place = (PARTS.index(part), layer, rows.ctypes.data, rows.nbytes, *at, first, len(rows))
        _good(lib.wn_fill(self.handle, *place))

    def start(
        self, isa: str = "", threads: int = 1, cores: Sequence[int] = (), pages: int = 64, sequences: int = 32,
        bits: int = 8, cache_bits: int = 16,
    ) -> None:  # fmt: skip
        """Start the engine's threads.

        pages: of 32 tokens, for all sequences together. bits: of activations, 8 or 16. cache_bits: of keys and values,
        16 (bf16) or 8 (with a scale for each head and token).
        """
        numbers = (isa_number(isa), threads, _ints(cores), len(cores), pages, sequences, bits, cache_bits)
        _good(lib.wn_start(self.handle, *numbers))

    def submit(
        self, tokens: Sequence[int], sampling: Sampling, stop: Sequence[int] = (), logits: np.ndarray | None = None
    ) -> int:
        """The number of a new request. logits [len(tokens) - 1, vocab] float32: score this text, and keep the array."""
        if logits is not None and (logits.shape != (len(tokens) - 1, self.config.vocab) or logits.dtype != np.float32):
            raise NativeError("logits of another shape than the text's")
        at = None if logits is None else logits.ctypes.data
        ids, ends = _ints(tokens), _ints(stop)
        return _good(lib.wn_submit(self.handle, ids, len(tokens), sampling, ends, len(stop), at))

    def read(self, request: int, seconds: float = 0.2, least: int = 1) -> tuple[list[int], list[float], str]:
        """(tokens, their log-probabilities, "running" or how it ended).

        Waits for `least` tokens or the end, at most `seconds`; gives what there is then, 64 tokens at most.
        Log-probabilities are 0 unless the request's sampling asked for them.
        """
        ids, logprob, end = (c.c_int * 64)(), (c.c_float * 64)(), c.c_int()
        n = _good(lib.wn_read(self.handle, request, ids, logprob, least, 64, seconds, c.byref(end)))
        return list(ids[:n]), list(logprob[:n]), ENDS[end.value]

    def cancel(self, request: int) -> None:
        """End a request; it cannot be read any more. One that scores is waited for."""
        lib.wn_cancel(self.handle, request)

    def stats(self) -> dict[str, int]:
        """Counters by name."""
        stats = Stats()
        lib.wn_stats(self.handle, c.byref(stats))
        return {name: getattr(stats, name) for name, _ in Stats._fields_}

    def bytes(self, cache: bool = False) -> int:
        """Memory of the weights, or what the key-value cache may grow to."""
        return lib.wn_bytes(self.handle, cache)

    def close(self) -> None:
        """Stop and free everything."""
        handle, self.handle = self.handle, None
        if handle:
            lib.wn_free(handle)


def sampling(**given: float) -> Sampling:
    """Greedy, 128 tokens, unless told otherwise."""
    return Sampling(**({"max_tokens": 128, "top_p": 1.0, "repeat": 1.0} | given))


class Alone:
    """One weight by itself, to test kernels: blocks of a ggml type, or codes with scales."""

    def __init__(
        self, shape: tuple[int, int], data: np.ndarray, kind: int = -1, bits: int = 0, group: int = 0,
        zero: int | None = 0, scale: np.ndarray | None = None, minimum: np.ndarray | None = None, half: bool = False,
    ) -> None:  # fmt: skip
        self.shape = shape
        data = np.ascontiguousarray(data).view(np.uint8)
        given = [None if a is None else np.ascontiguousarray(a, dtype=np.float32) for a in (scale, minimum)]
        at = [None if a is None else a.ctypes.data for a in given]
        self.handle = lib.wn_alone(*shape, kind, bits, group, zero is None, zero or 0, half, data.ctypes.data, *at)
        if not self.handle:
            raise NativeError(_said())

    def row(self, i: int) -> np.ndarray:
        """Row i as float32 [k]."""
        out = np.empty(self.shape[1], np.float32)
        lib.wn_row(self.handle, i, out.ctypes.data)
        return out

    def product(
        self, x: np.ndarray, isa: str = "", dense: bool = False, levels: int = 1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x W^T [tokens, n], the codes of x [levels * tokens, k up to 32], their scales [levels * tokens, groups]).

        levels: 1 = activations of 8 bits, 2 = what these leave is rounded once more.
        """
        n, k = self.shape
        x = np.ascontiguousarray(x, dtype=np.float32)
        groups = -(-k // 32)
        y = np.zeros((len(x), -(-n // 32) * 32), np.float32)
        q, scale = np.zeros((levels * len(x), groups * 32), np.int8), np.zeros((levels * len(x), groups), np.float32)
        at = (x.ctypes.data, len(x), dense, levels, y.ctypes.data, q.ctypes.data, scale.ctypes.data)
        _good(lib.wn_product(self.handle, isa_number(isa), *at))
        return y[:, :n], q, scale

    def bytes(self) -> int:
        """Memory of the panels."""
        return lib.wn_alone_bytes(self.handle)

    def close(self) -> None:
        """Free it."""
        handle, self.handle = self.handle, None
        if handle:
            lib.wn_alone_free(handle)


def read_all(engine: Engine, request: int) -> Iterator[int]:
    """Tokens of a request until it ends."""
    while True:
        tokens, _, end = engine.read(request)
        yield from tokens
        if end != "running":
            return
