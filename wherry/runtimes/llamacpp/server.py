"""llama.cpp by the wheel's server interface: one request for each token. Grade B.

Idea:   a request for one token with a huge bias on the wanted one returns its log-probability before the bias, and the
        top-k; the server's prompt cache makes the next request cost one token.
Limits: the server withholds a token that ends inside of a UTF-8 character and then reports nothing: such tokens are
        looked up in the whole distribution instead (about a second each at 49,152 tokens). It listens on a port of
        127.0.0.1 while it lives.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

from wherry.errors import BadInput, Corrupt, Exhausted
from wherry.formats.gguf.header import Header
from wherry.runtimes.llamacpp.direct import checked
from wherry.session import NoPredict, Sampling, Score, draw

FORCED = 1e9  # a bias that no logit outweighs
LIKELIEST = 256  # tokens that an answer is drawn from


class Server(NoPredict):
    """One in-process server with one slot. Thread-safe: one request after another."""

    grade = "B"

    def __init__(
        self, header: Header, threads: int, context: int, facts: dict[str, str], adapter: Path | None = None,
        cache: str = "",
    ) -> None:  # fmt: skip
        self.facts, self.limit, self.lock = facts, context, threading.Lock()
        self.vocabulary = len(header.metadata.get("tokenizer.ggml.tokens", ()))
        self.end = int(header.metadata.get("tokenizer.ggml.eos_token_id", 0))
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(header.path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = context, 1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        if cache:
            kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
            parameters.cache_type_k = parameters.cache_type_v = kind
            parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if adapter is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        parameters.verbosity = -1
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.server: Any = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise Corrupt(f"{header.path}: llama.cpp refuses it: {error}") from error
        finally:
            for number, handler in before.items():  # the server took them, and Ctrl-C would only stop its loop
                if main and handler is not None:
                    signal.signal(number, handler)

    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """Teacher-forced: one request for each token."""
        ids = self._checked(tokens, 2, self.limit)
        rows = [self._forced(ids[:i], ids[i], top_k) for i in range(1, len(ids))]
        top = np.array([[(entry["id"], entry["logprob"]) for entry in tops] for _, tops in rows])
        return Score(
            np.array([value for value, _ in rows], dtype=np.float32),
            top[..., 0].astype(np.int64),
            top[..., 1].astype(np.float32),
        )

    def _forced(self, prompt: list[int], token: int, top_k: int) -> tuple[float, list[dict[str, Any]]]:
        """(log-probability of a token after a prompt, the top-k)."""
        content = self._ask(prompt, token, top_k)
        if content and content[0]["id"] == token:
            return content[0]["logprob"], content[0]["top_logprobs"]
        every = self._likeliest(prompt, self.vocabulary)
        return next(entry["logprob"] for entry in every if entry["id"] == token), every[:top_k]

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """One token for each request, drawn here among the likeliest 256."""
        if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0):
            raise BadInput("llama.cpp's server interface draws without penalties here; load with api=direct")
        return self._generate(self._checked(tokens, 1, self.limit - 1), sampling)

    def _generate(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        random = np.random.default_rng(sampling.seed)
        for _ in range(min(sampling.max_tokens, self.limit - len(ids))):
            tops = self._likeliest(ids, min(LIKELIEST, self.vocabulary))
            token = tops[draw(np.array([entry["logprob"] for entry in tops]), sampling, random)]["id"]
            if token in sampling.stop:
                return
            yield token
            ids = [*ids, token]

    def close(self) -> None:
        """End the server; its memory and threads are freed."""
        with self.lock:
            self.server = None

    def _likeliest(self, prompt: list[int], count: int) -> list[dict[str, Any]]:
        """The likeliest next tokens, best first: those beside the end token, which is never withheld."""
        content = self._ask(prompt, self.end, count)
        if not content:
            raise Exhausted("llama.cpp's server returned no probabilities; load with api=direct")
        return content[0]["top_logprobs"]

    def _ask(self, prompt: list[int], token: int, count: int) -> list[dict[str, Any]]:
        """What the server says of one forced token after a prompt; empty when it withholds it."""
        request = {
            "prompt": prompt, "n_predict": 1, "n_probs": count, "temperature": 0, "cache_prompt": True,
            "logit_bias": [[token, FORCED]],
        }  # fmt: skip
        with self.lock:
            if self.server is None:
                raise BadInput("this session is closed")
            reply = self.server.handle_completions(request)
        if "error" in reply:
            raise Exhausted(f"llama.cpp's server: {reply['error'].get('message', reply['error'])}")
        return (reply["choices"][0]["logprobs"] or {}).get("content", [])

    def _checked(self, tokens: Sequence[int], least: int, most: int) -> list[int]:
        return checked(tokens, least, most, self.limit, self.vocabulary)
