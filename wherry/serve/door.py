"""Door: what every served model has, whatever its task: health, its name, facts, metrics, a bound on bodies, a line."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from wherry.artifact import Artifact
from wherry.report import Report
from wherry.serve.events import until_gone
from wherry.serve.facts import facts
from wherry.serve.failure import NoSuchModel
from wherry.serve.metrics import Metrics
from wherry.serve.work import Line

WEB = Path(__file__).parent / "web"
T = TypeVar("T")


class Door:
    """What the routes share: the session, the line before it, and the counters. `page` is a file of web/."""

    page = "answer.html"

    def __init__(
        self, session: Any, artifact: Artifact, report: Report | None, queue: int, max_body: int, context: int
    ) -> None:
        self.session, self.task, self.model, self.format = session, artifact.task, artifact.name, artifact.format
        self.max_body = max_body
        self.created = int(artifact.main.stat().st_mtime)
        self.known = facts(session, artifact, report, context)
        self.line = Line(queue)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="wherry-answer")
        self.metrics = Metrics({"model": self.model, "format": artifact.format, **session.facts})
        self.metrics.queue.set_function(lambda: self.line.inside)
        self.metrics.places.set(queue)
        self.started = self.draining = False

    def routes(self) -> list[Route | Mount]:
        """The routes of every model."""
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.models, methods=["GET"]),
            Route("/v1/wherry/facts", self.facts, methods=["GET"]),
            Route("/health/live", self.live, methods=["GET"]),
            Route("/health/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.scrape, methods=["GET"]),
            Route("/", self.home, methods=["GET"]),
            Mount("/web", StaticFiles(directory=WEB)),
        ]

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Ready while inside; afterwards the worker threads are gone."""
        await self.open()
        self.started = True
        yield
        self.started = False
        await self.close()

    async def open(self) -> None:
        """Before the first request."""

    async def close(self) -> None:
        """After the last one."""
        await asyncio.to_thread(self.pool.shutdown)

    def halt(self) -> None:
        """End what can be ended early; a single call of a session cannot."""

    async def work(self, request: Request, call: Callable[..., T], *given: Any) -> T:
        """`call(*given)` on the worker thread, in the line; given up when the client hangs up before it begins."""
        with self.line.place():
            return await until_gone(request, asyncio.get_running_loop().run_in_executor(self.pool, call, *given))

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/NAME."""
        model = {"id": self.model, "object": "model", "created": self.created, "owned_by": "wherry"}
        if "name" in request.path_params:
            self.named(request.path_params["name"])
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def facts(self, request: Request) -> Response:
        """GET /v1/wherry/facts."""
        return JSONResponse(self.known)

    async def live(self, request: Request) -> Response:
        """GET /health/live: the process answers."""
        return JSONResponse({"status": "live"})

    @property
    def open_now(self) -> bool:
        """Whether requests are taken."""
        return self.started and not self.draining

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: requests are taken."""
        if self.open_now:
            return JSONResponse({"status": "ready", "model": self.model})
        return JSONResponse({"status": "draining" if self.draining else "loading"}, 503)

    async def scrape(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def home(self, request: Request) -> Response:
        """GET /: the page for people."""
        return FileResponse(WEB / self.page)

    async def raw(self, request: Request) -> bytes:
        """The body, refused beyond `max_body` bytes and while the server drains."""
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
        return bytes(raw)

    def named(self, name: Any) -> None:
        """Raises NoSuchModel for another name than the served model's."""
        if name != self.model:
            shown = f"{name}"[:80]
            raise NoSuchModel(f"there is no model '{shown}' here; this server has '{self.model}'")
