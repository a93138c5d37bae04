"""The HTTP application: OpenAI's routes, health, metrics and the page, over one loaded session.

It knows no runtime and no torch: it is handed a Session and calls it from one worker thread.
Prompts and answers are never logged, and nothing of them is kept after the answer.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from wherry import errors
from wherry.artifact import Artifact
from wherry.report import Report
from wherry.serve import openai
from wherry.serve.events import Events, collect, events, until_gone
from wherry.serve.facts import facts, own_sampling
from wherry.serve.failure import NoSuchModel, Watch, error_answer, http_answer
from wherry.serve.listen import check_port, run, serving
from wherry.serve.metrics import Metrics
from wherry.serve.openai import BadField, TextRequest
from wherry.serve.pieces import Piece
from wherry.serve.work import Embedder, Line, Writer
from wherry.session import Sampling, Session

__all__ = ["Service", "check_port", "create_app", "run", "serving"]

WEB = Path(__file__).parent / "web"


def create_app(
    session: Session,
    artifact: Artifact,
    report: Report | None = None,
    *,
    queue: int = 32,
    max_tokens: int = 1024,
    max_body: int = 4 << 20,
) -> Starlette:
    """The application for one loaded artifact; serve it with `run`, or any ASGI server with one worker.

    Args:
        session: the artifact, loaded by a runtime. The caller closes it after the server has ended.
        artifact: names the model and its task.
        report: the proof that came with the artifact, for the page; None when there is none.
        queue: requests that may run or wait at once; the next one gets 429 with Retry-After.
        max_tokens: length of an answer when the request sets none.
        max_body: largest request body, in bytes.

    Raises:
        Missing: the artifact has no tokenizer.
    """
    service = Service(session, artifact, report, queue, max_tokens, max_body)
    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.models, methods=["GET"]),
        Route("/v1/wherry/facts", service.facts, methods=["GET"]),
        Route("/health/live", service.live, methods=["GET"]),
        Route("/health/ready", service.ready, methods=["GET"]),
        Route("/metrics", service.scrape, methods=["GET"]),
        Route("/", service.page, methods=["GET"]),
        Mount("/web", StaticFiles(directory=WEB)),
    ]
    app = Starlette(
        routes=routes,
        lifespan=service.lifespan,
        middleware=[Middleware(Watch, metrics=service.metrics)],
        exception_handlers={errors.Error: error_answer, HTTPException: http_answer},
    )
    app.state.service = service
    return app


class Service:
    """What the routes share: the session, the line before it, and the counters."""

    def __init__(
        self, session: Session, artifact: Artifact, report: Report | None, queue: int, max_tokens: int, max_body: int
    ) -> None:
        self.session, self.task, self.model = session, artifact.task, artifact.name
        self.max_tokens, self.max_body = max_tokens, max_body
        self.created = int(artifact.main.stat().st_mtime)
        self.context = min(self.task.max_length, int(session.facts.get("context", self.task.max_length)))
        self.known = facts(session, artifact, report, self.context)
        self.writes = self.task.kind == "text-generation"
        self.tokenizer = self.task.tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.defaults = own_sampling(self.task)
        self.known["defaults"] = {"max_tokens": max_tokens, **self.defaults}
        self.line = Line(queue)
        self.writer, self.embedder = Writer(session, self.task), Embedder(session, self.task)
        self.metrics = Metrics({"model": self.model, "format": artifact.format, **session.facts})
        self.metrics.queue.set_function(lambda: self.line.inside)
        self.metrics.places.set(queue)
        self.started = self.draining = False

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Ready while inside; afterwards the worker threads are gone."""
        self.embedder.start()
        self.started = True
        yield
        self.started = False
        await self.writer.close()
        await self.embedder.close()

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

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/NAME."""
        model = {"id": self.model, "object": "model", "created": self.created, "owned_by": "wherry"}
        if "name" in request.path_params:
            self._named(request.path_params["name"])
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def facts(self, request: Request) -> Response:
        """GET /v1/wherry/facts."""
        return JSONResponse(self.known)

    async def live(self, request: Request) -> Response:
        """GET /health/live: the process answers."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: requests are taken."""
        if self.started and not self.draining:
            return JSONResponse({"status": "ready", "model": self.model})
        return JSONResponse({"status": "draining" if self.draining else "loading"}, 503)

    async def scrape(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        """GET /: the page for people."""
        return FileResponse(WEB / ("index.html" if self.writes else "similarity.html"))

    async def _body(self, request: Request) -> dict[str, Any]:
        """The body as an object, and a check of what every request needs."""
        if self.draining:
            raise HTTPException(
                503, "the server is shutting down; send the request to another one", {"retry-after": "5"}
            )
        raw, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            if size <= self.max_body:
                raw += part
            elif size > 8 * self.max_body:  # up to here it is read and dropped, so that the client hears the answer
                break
        if size > self.max_body:
            raise HTTPException(413, f"the body is larger than {self.max_body} bytes, the limit; send it in parts")
        body = openai.parse(bytes(raw))
        if body.get("model") is not None:
            self._named(body["model"])
        return body

    def _named(self, name: Any) -> None:
        if name != self.model:
            shown = f"{name}"[:80]
            raise NoSuchModel(f"there is no model '{shown}' here; this server has '{self.model}'")

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
