"""Errors as HTTP answers in OpenAI's shape, and the layer around every request that lets none fall through."""

import logging
import time
import traceback
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wherry import errors

if TYPE_CHECKING:
    from wherry.serve.metrics import Metrics

LOG = logging.getLogger("wherry.serve")
# error class -> HTTP status and the API's word for it
STATUS: dict[type[errors.Error], tuple[int, str]] = {
    errors.BadInput: (400, "invalid_request_error"),
    errors.Unsupported: (400, "invalid_request_error"),
    errors.Refused: (403, "permission_error"),
    errors.Missing: (404, "invalid_request_error"),
    errors.Exhausted: (429, "rate_limit_error"),
    errors.Corrupt: (500, "server_error"),
    errors.Diverged: (500, "server_error"),
}
HEADERS = [
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


class NoSuchModel(errors.Missing):
    """The request names a model that is not served here."""

    param, word = "model", "model_not_found"


class ClientGone(Exception):
    """The client hung up: nobody hears the answer."""


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, body, headers) of an error. What is not ours is logged without its message, which may hold a prompt."""
    param, word, headers = getattr(error, "param", None), getattr(error, "word", None), {}
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
        kind = "invalid_request_error" if status < 500 else "server_error"
        headers = dict(error.headers or {})
    elif isinstance(error, errors.Error):
        status, kind = next((STATUS[known] for known in STATUS if isinstance(error, known)), (500, "server_error"))
        message = str(error)
        if status == 429:
            headers = {"retry-after": str(getattr(error, "retry_s", 1))}
    else:
        LOG.error("%s in a request\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        status, kind = 500, "server_error"
        message = f"the server failed inside ({type(error).__name__}); its log says where"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": word}}, headers


def worded(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body as the protocol of that path has it: OpenAI's object, or below /v2 the message alone."""
    return {"error": body["error"]["message"]} if path.startswith("/v2") else body


def error_answer(request: Request, error: Exception) -> JSONResponse:
    """An error of a route as its answer."""
    status, body, headers = describe(error)
    return JSONResponse(worded(request.url.path, body), status, headers)


def http_answer(request: Request, error: Exception) -> JSONResponse:
    """The same for what HTTP itself refuses, with a way out: no such path, not this method."""
    status = getattr(error, "status_code", 500)
    allowed = (getattr(error, "headers", None) or {}).get("Allow")
    path = request.url.path[:80]
    if status == 404:
        error = HTTPException(404, f"there is nothing at {path}; the API is below /v1 and /v2, the page is at /")
    elif status == 405:
        error = HTTPException(405, f"{path} does not take {request.method}; use {allowed}", {"Allow": str(allowed)})
    return error_answer(request, error)


class Watch:
    """ASGI layer around every request: headers, counters, and an answer for errors that nobody expected."""

    def __init__(self, app: ASGIApp, metrics: "Metrics", model: str) -> None:
        self.app, self.metrics, self.model = app, metrics, model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except ClientGone:
            status = 499
        except Exception as error:
            code, body, headers = describe(error)
            if not status:
                await JSONResponse(worded(scope["path"], body), code, headers)(scope, receive, sent)
        finally:
            known = "endpoint" in scope and set(scope.get("path_params", {}).values()) <= {self.model}
            route = scope["path"] if known else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
