"""The HTTP application: OpenAI's routes, health, metrics and the page, over one loaded session.

It knows no runtime and no torch: it is handed a Session and calls it from one worker thread.
Prompts and answers are never logged, and nothing of them is kept after the answer.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from wherry import errors
from wherry.artifact import Artifact
from wherry.report import Report
from wherry.serve import inference, openai
from wherry.serve.answer import Answers
from wherry.serve.door import Door
from wherry.serve.events import Events, collect, events, until_gone
from wherry.serve.facts import own_sampling
from wherry.serve.failure import Watch, error_answer, http_answer
from wherry.serve.listen import check_port, run, serving
from wherry.serve.openai import BadField, TextRequest
from wherry.serve.pieces import Piece
from wherry.serve.work import Embedder, Writer
from wherry.session import Sampling, Session

__all__ = ["Service", "check_port", "create_app", "run", "serving"]

TEXT_BODY, DATA_BODY = 4 << 20, 32 << 20  # bytes


def create_app(
    session: Session,
    artifact: Artifact,
    report: Report | None = None,
    *,
    queue: int = 32,
    max_tokens: int = 1024,
    max_body: int = 0,
) -> Starlette:
    """The application for one loaded artifact; serve it with `run`, or any ASGI server with one worker.

    Args:
        session: the artifact, loaded by a runtime. The caller closes it after the server has ended.
        artifact: names the model and its task.
        report: the proof that came with the artifact, for the page; None when there is none.
        queue: requests that may run or wait at once; the next one gets 429 with Retry-After.
        max_tokens: length of an answer when the request sets none.
        max_body: largest request body, in bytes; 0: 4 MiB for texts, 32 MiB for pictures, sounds and arrays.

    Raises:
        Missing: the artifact has no tokenizer.
    """
    kind = artifact.task.kind
    max_body = max_body or (TEXT_BODY if artifact.task.modality == "text" else DATA_BODY)
    service: Door
    if kind in ("text-generation", "sentence-similarity"):
        service = Service(session, artifact, report, queue, max_tokens, max_body)
    else:
        service = Answers(session, artifact, report, queue, max_body)
    routes: list[Route | Mount] = [*inference.Inference(service).routes(), *service.routes()]
    app = Starlette(
        routes=routes,
        lifespan=service.lifespan,
        middleware=[Middleware(Watch, metrics=service.metrics, model=service.model)],
        exception_handlers={errors.Error: error_answer, HTTPException: http_answer},
    )
    app.state.service = service
    return app


class Service(Door):
    """A model that writes text, or a sentence encoder: OpenAI's routes."""

    def __init__(
        self, session: Session, artifact: Artifact, report: Report | None, queue: int, max_tokens: int, max_body: int
    ) -> None:
        length = artifact.task.max_length
        self.context = min(length, int(session.facts.get("context", length)))
        super().__init__(session, artifact, report, queue, max_body, self.context)
        self.max_tokens, self.writes = max_tokens, self.task.kind == "text-generation"
        self.page = "index.html" if self.writes else "similarity.html"
        self.tokenizer = self.task.tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.defaults = own_sampling(self.task)
        self.known["defaults"] = {"max_tokens": max_tokens, **self.defaults}
        self.writer, self.embedder = Writer(session, self.task), Embedder(session, self.task)

    def routes(self) -> list[Route | Mount]:
        """OpenAI's, and those of every model."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            *super().routes(),
        ]

    async def open(self) -> None:
        """Begin to collect sentences."""
        self.embedder.start()

    async def close(self) -> None:
        """Stop the worker threads."""
        await self.writer.close()
        await self.embedder.close()
        await super().close()

    def halt(self) -> None:
        """End running answers at their next token."""
        self.writer.halt()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._text(request, chat=True)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._text(request, chat=False)

    async def _text(self, request: Request, chat: bool) -> Response:
        start = time.perf_counter()
        body = await self._body(request)
        self._needs(self.writes, "is a sentence encoder: it writes no text.\nUse /v1/embeddings, or the page at /.")
        asked = openai.text_request(body, chat)
        tokens = await asyncio.to_thread(self._tokens, asked.prompt)
        room = self.context - len(tokens)
        if room < 1:
            raise BadField(
                f"the prompt has {len(tokens)} tokens, but the model's context is {self.context}, and an answer "
                f"needs room too.\nSend a shorter prompt.",
                "messages" if chat else "prompt",
                "context_length_exceeded",
            )
        stream = self._written(asked, tokens, room, chat, start)
        head = (f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), self.model, chat)
        if asked.stream:
            first = await until_gone(request, anext(stream, None))
            return Events(events(head, asked, len(tokens), first, stream))
        made = await until_gone(request, collect(stream))
        counts = openai.usage(len(tokens), made[-1].tokens)
        text = "".join(piece.text for piece in made)
        return JSONResponse(openai.answer(*head, text, made[-1].finish or "stop", counts))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        body = await self._body(request)
        self._needs(not self.writes, "writes text: it gives no sentence vectors.\nUse /v1/chat/completions.")
        given, packed = openai.embedding_request(body)
        with self.line.place():
            rows = await asyncio.to_thread(self._rows, given)
            read = sum(map(len, rows))
            self.metrics.tokens.labels("in").inc(read)
            vectors = await until_gone(request, self.embedder.embed(rows))
        return JSONResponse(openai.embeddings(self.model, vectors, packed, read))

    async def _body(self, request: Request) -> dict[str, Any]:
        """The body as an object, and a check of what every request needs."""
        body = openai.parse(await self.raw(request))
        if body.get("model") is not None:
            self.named(body["model"])
        return body

    def _needs(self, right: bool, otherwise: str) -> None:
        if not right:
            raise errors.Unsupported(f"{self.model} {otherwise}")

    def _tokens(self, prompt: str | list[int] | list[dict[str, str]]) -> list[int]:
        if isinstance(prompt, list) and isinstance(prompt[0], dict):
            try:
                text = self.task.chat(prompt)
            except jinja2.TemplateError as error:
                what = f"the model's chat template cannot take this conversation: {error}"
                raise BadField(what, "messages") from error
            tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        elif isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt).ids
        else:
            tokens = self._checked(prompt, "prompt")
        if not tokens:
            raise BadField("the prompt is empty", "prompt")
        return tokens

    def _rows(self, given: Iterable[str | list[int]]) -> list[list[int]]:
        rows = []
        for i, item in enumerate(given):
            row = self.tokenizer.encode(item).ids if isinstance(item, str) else self._checked(item, f"input[{i}]")
            if not row:
                raise BadField(f"input[{i}] is empty", "input")
            if len(row) > self.context:
                raise BadField(
                    f"input[{i}] has {len(row)} tokens, but the model reads {self.context} at most.\n"
                    f"Send it in parts, or shortened.",
                    "input",
                    "context_length_exceeded",
                )
            rows.append(row)
        return rows

    def _checked(self, ids: Any, where: str) -> list[int]:
        size = self.tokenizer.get_vocab_size()
        if max(ids) >= size:
            raise BadField(f"{where} has token {max(ids)}, but the model has tokens 0 to {size - 1} only", where)
        return ids

    async def _written(
        self, asked: TextRequest, tokens: list[int], room: int, chat: bool, start: float
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of one answer: a place in the line, the sampling, and the counters around them."""
        sampling = Sampling(
            max_tokens=min(asked.max_tokens or self.max_tokens, room),
            temperature=self.defaults.get("temperature", 1.0) if asked.temperature is None else asked.temperature,
            top_p=self.defaults.get("top_p", 1.0) if asked.top_p is None else asked.top_p,
            top_k=asked.top_k,
            seed=secrets.randbits(31) if asked.seed is None else asked.seed % (1 << 31),
            stop=self.task.stop,
        )
        count, first, now, ended = 0, 0.0, 0.0, False
        with self.line.place():
            self.metrics.tokens.labels("in").inc(len(tokens))
            try:
                async with aclosing(self.writer.write(tokens, sampling, asked.stop, not chat)) as written:
                    async for piece in written:
                        now = time.perf_counter()
                        if count == 0 and piece.tokens:
                            first = now
                            self.metrics.first_token.observe(now - start)
                        count, ended = piece.tokens, piece.finish is not None
                        yield piece
                if not ended:
                    raise HTTPException(503, "the server shut down before the answer was complete")
            finally:
                self.metrics.tokens.labels("out").inc(count)
                if count > 1 and now > first:
                    self.metrics.speed.set((count - 1) / (now - first))
