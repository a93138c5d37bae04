"""Answers that are streamed, and clients that hang up before the end."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from wherry.serve import openai
from wherry.serve.failure import ClientGone, describe
from wherry.serve.openai import TextRequest
from wherry.serve.pieces import Piece

T = TypeVar("T")
Head = tuple[str, int, str, bool]  # id, created, model, chat


class Events(StreamingResponse):
    """Server-sent events that free what makes them, however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[bytes, None]) -> None:
        super().__init__(content, headers={"x-accel-buffering": "no"})
        self.made_by = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.made_by.aclose()


async def events(
    head: Head, asked: TextRequest, read: int, first: Piece | None, stream: AsyncGenerator[Piece, None]
) -> AsyncGenerator[bytes, None]:
    """The bytes of a streamed answer. An error after the first token becomes an event: the status is sent already.

    Args:
        head: id, time, model, and whether it is a chat.
        asked: the request.
        read: tokens of the prompt.
        first: the piece that was awaited before the answer began, so that early errors have their status.
        stream: the pieces after it.
    """
    count, piece = 0, first
    async with aclosing(stream):
        if head[3]:
            yield openai.event(openai.chunk(*head, "", None, None))
        while piece is not None:
            count = piece.tokens
            counts = openai.usage(read, count) if asked.every else None
            if piece.text:
                yield openai.event(openai.chunk(*head, piece.text, None, counts))
            if piece.finish:
                yield openai.event(openai.chunk(*head, "", piece.finish, counts))
            try:
                piece = await anext(stream, None)
            except Exception as error:
                yield openai.event(describe(error)[1])
                return
    if asked.usage:
        yield openai.event(openai.chunk(*head, None, None, openai.usage(read, count)))
    yield openai.DONE


async def collect(stream: AsyncGenerator[Piece, None]) -> list[Piece]:
    """All pieces of an answer."""
    async with aclosing(stream):
        return [piece async for piece in stream]


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it when the client hangs up, and raise ClientGone."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        doing.cancel()
        watching.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)
