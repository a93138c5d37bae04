"""llama.cpp by its C functions, which the wheel's library exports: full logits of many tokens in one pass. Grade A.

Parameters travel as opaque structures, longer than any real one: llama.cpp fills in its defaults, and only the three
leading words are changed. Before use `unusable` compares the defaults and a batch with what is known of them.
"""

import ctypes as c
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import xllamacpp

from wherry.errors import BadInput, Corrupt, Exhausted, Unsupported
from wherry.formats.gguf.header import Header
from wherry.session import NoPredict, Sampling, Score, draw, scored

BATCH = 512  # tokens of one llama_decode
ROWS = 128  # tokens whose logits are held inside of llama.cpp at once
WORDS = 512  # of an opaque structure, 4 bytes each; the real ones have fewer than 100
DEFAULTS = [512, 2048, 512, 1]  # n_ctx, n_batch, n_ubatch, n_seq_max, as llama_context_default_params has them
FLASH, TYPE_K, TYPE_V = 13, 26, 27  # words of llama_context_params: flash_attn_type, type_k, type_v
AUTO, F16, TYPES = 2**32 - 1, 1, {"q8_0": 8, "q4_0": 2}  # -1; of ggml_type
CACHES = {"int8": "q8_0", "int4": "q4_0"}
ERROR = 4  # GGML_LOG_LEVEL_ERROR


class Opaque(c.Structure):
    """Parameters whose layout beyond the first words does not matter."""

    _fields_ = [("word", c.c_uint32 * WORDS)]


class Batch(c.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c.c_int32), ("token", c.POINTER(c.c_int32)), ("embd", c.c_void_p), ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p), ("seq_id", c.c_void_p), ("logits", c.POINTER(c.c_int8)),
    ]  # fmt: skip


LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
# name: (result, arguments)
FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, c.c_void_p]),
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, Opaque]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, Opaque]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_n_ctx": (c.c_uint32, [c.c_void_p]),
    "llama_set_n_threads": (None, [c.c_void_p, c.c_int32, c.c_int32]),
    "llama_batch_get_one": (Batch, [c.POINTER(c.c_int32), c.c_int32]),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_memory_seq_rm": (c.c_bool, [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]),
    "llama_adapter_lora_init": (c.c_void_p, [c.c_void_p, c.c_char_p]),
    "llama_set_adapters_lora": (c.c_int32, [c.c_void_p, c.POINTER(c.c_void_p), c.c_size_t, c.POINTER(c.c_float)]),
    "llama_free": (None, [c.c_void_p]),
    "llama_model_free": (None, [c.c_void_p]),
}
said: list[str] = []  # the last errors that llama.cpp logged


@LOG
def _listen(level: int, text: bytes, _: None) -> None:
    if os.environ.get("WHERRY_DEBUG"):
        sys.stderr.write(text.decode(errors="replace"))
    if level == ERROR:
        said.append(text.decode(errors="replace").strip())
        del said[:-20]


@cache
def library() -> c.CDLL:
    """The wheel's library with typed functions. Raises AttributeError or OSError when it does not export them."""
    return typed(c.CDLL(sys.modules["xllamacpp.xllamacpp"].__file__))


def typed(lib: c.CDLL) -> c.CDLL:
    """A library of llama.cpp, its functions given their types."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@cache
def unusable(typed: bool = False) -> str:
    """Why this wheel's C functions must not be called, or an empty string. typed: types of the cache are set too."""
    try:
        lib = library()
    except (AttributeError, OSError) as error:
        return f"the library of xllamacpp {xllamacpp.__version__} does not export what is needed ({error})"
    words = list(lib.llama_context_default_params().word[: len(DEFAULTS)])
    if words != DEFAULTS:
        return f"default parameters begin with {words}, not with {DEFAULTS}"
    words = list(lib.llama_context_default_params().word)
    if typed and (words[FLASH - 3 : FLASH + 1] != [AUTO] * 4 or words[TYPE_K - 1 : TYPE_V + 2] != [0, F16, F16, 0]):
        return "the types of the cache are not where they were"
    one = (c.c_int32 * 3)(5, 6, 7)
    batch = lib.llama_batch_get_one(one, 3)
    empty = not any((batch.embd, batch.pos, batch.n_seq_id, batch.seq_id, bool(batch.logits)))
    if batch.n_tokens != 3 or not batch.token or batch.token[2] != 7 or not empty:
        return "llama_batch has another layout"
    lib.llama_backend_init()
    return ""


class Direct(NoPredict):
    """One model and one context. Thread-safe: each decoding step is a turn; a call that was interrupted by another
    one's steps computes its own prompt again.

    cache: type of block for keys and values, or "" for llama.cpp's fp16.
    adapter: of a low-rank correction, a file that is added to the weights; None = none.
    reuse: keep what two calls of `generate` have in common at their beginning (a conversation that goes on).
    """

    grade = "A"

    def __init__(
        self, header: Header, threads: int, context: int, facts: dict[str, str], adapter: Path | None = None,
        cache: str = "",
    ) -> None:  # fmt: skip
        self.lib, self.facts, self.limit, self.reuse = library(), facts, context, True
        self.lock = threading.Lock()
        self.held: list[int] = []  # ids in the key-value cache
        self.lib.llama_log_set(_listen, None)  # each time: a server in this process takes it away
        del said[:]
        self.model = self.lib.llama_model_load_from_file(
            os.fsencode(header.path), self.lib.llama_model_default_params()
        )
        self.context = None
        if not self.model:
            raise refused(header)
        parameters = self.lib.llama_context_default_params()
        parameters.word[0], parameters.word[1], parameters.word[2] = context, BATCH, BATCH
        if cache:  # values in blocks want flash attention
            parameters.word[FLASH] = 1
            parameters.word[TYPE_K] = parameters.word[TYPE_V] = TYPES[cache]
        self.context = self.lib.llama_init_from_model(self.model, parameters)
        if not self.context or self.lib.llama_n_ctx(self.context) < context:
            self.close()
            raise Exhausted(f"llama.cpp could not make a context of {context} tokens for {header.path}: {last()}")
        if adapter is not None:  # freed with its model
            thin = self.lib.llama_adapter_lora_init(self.model, os.fsencode(adapter))
            failed = not thin or self.lib.llama_set_adapters_lora(
                self.context, (c.c_void_p * 1)(thin), 1, (c.c_float * 1)(1.0)
            )
            if failed:
                self.close()
                raise Corrupt(f"{adapter}: llama.cpp does not take it with {header.path.name}: {last()}")
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """Full logits of one window, computed from an empty cache. Memory: 4 bytes x tokens x vocabulary."""
        ids = self._checked(tokens, 2, self.limit)
        logits = np.empty((len(ids) - 1, self.vocabulary), dtype=np.float32)
        with self.lock:
            self._forget(0)
            for begin in range(0, len(logits), ROWS):
                end = min(begin + ROWS, len(logits))
                self._decode(ids[begin:end], logits[begin:end])
        return scored(logits, ids[1:], top_k)

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """One token at a time."""
        ids = self._checked(tokens, 1, self.limit - 1)
        return self._generate(ids, sampling)

    def _generate(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        random, prompt = np.random.default_rng(sampling.seed), len(ids)
        logits = np.empty((1, self.vocabulary), dtype=np.float32)
        first = True
        for _ in range(min(sampling.max_tokens, self.limit - len(ids))):
            with self.lock:
                self._forget(common(self.held, ids[:-1]) if self.reuse or not first else 0)
                for begin in range(len(self.held), len(ids), BATCH):
                    self._decode(ids[begin : begin + BATCH], logits)
            first = False
            token = draw(logits[0], sampling, random, ids, prompt)
            if token in sampling.stop:
                return
            yield token
            ids = [*ids, token]

    def close(self) -> None:
        """Free the model, its cache and its threads."""
        with self.lock:
            context, self.context = self.context, None
            model, self.model = self.model, None
            if context:
                self.lib.llama_free(context)
            if model:
                self.lib.llama_model_free(model)

    def _checked(self, tokens: Sequence[int], least: int, most: int) -> list[int]:
        return checked(tokens, least, most, self.limit, self.vocabulary)

    def _forget(self, keep: int) -> None:
        """Drop all but the first `keep` tokens from the key-value cache."""
        if self.context is None:
            raise BadInput("this session is closed")
        memory = self.lib.llama_get_memory(self.context)
        if not keep or not self.lib.llama_memory_seq_rm(memory, 0, keep, -1):
            self.lib.llama_memory_clear(memory, True)
            keep = 0
        del self.held[keep:]

    def _decode(self, ids: list[int], logits: np.ndarray) -> None:
        """Append ids to the cache; fill logits [rows, vocabulary] with those of the last `rows` ids."""
        n, rows = len(ids), len(logits)
        wanted = (c.c_int8 * n)(*([0] * (n - rows) + [1] * rows))
        code = self.lib.llama_decode(self.context, Batch(n, (c.c_int32 * n)(*ids), None, None, None, None, wanted))
        if code:
            self.held.clear()
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            raise Exhausted(f"llama.cpp could not compute {n} tokens (code {code}): {last()}")
        self.held += ids
        logits[:] = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (rows, self.vocabulary))


def checked(tokens: Sequence[int], least: int, most: int, context: int, vocabulary: int) -> list[int]:
    """Token ids as a list, refused where llama.cpp would abort. Raises BadInput."""
    ids = [int(token) for token in tokens]
    if not least <= len(ids) <= most:
        raise BadInput(f"{len(ids)} tokens are not {least} to {most}, which fit the context of {context}")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise BadInput(f"token ids reach from {min(ids)} to {max(ids)}; this model has 0 to {vocabulary - 1}")
    return ids


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def last() -> str:
    """What llama.cpp said last, in one line."""
    lines = [line for line in said if "failed to load model" not in line] or said
    return lines[-1].split("\n")[0][:200] if lines else "it gave no reason"


def refused(header: Header) -> Unsupported | Corrupt:
    """The error for a file that llama.cpp does not load."""
    if any("unknown model architecture" in line or "unsupported" in line for line in said):
        return Unsupported(f"{header.path}: llama.cpp does not run it: {last()}")
    return Corrupt(f"{header.path}: llama.cpp refuses it: {last()}")
