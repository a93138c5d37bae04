"""Between many requests and the one session: a bounded line, a worker thread, a micro-batcher.

A session blocks while it answers, and most answer one call after another. So each runs on a thread of its own, or on
as many as it can compute together; the event loop stays free, and requests wait in a line that is bounded.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from wherry.errors import Diverged, Exhausted
from wherry.serve.pieces import Piece, pieces
from wherry.session import Sampling, Session
from wherry.task import Task


class Full(Exhausted):
    """The line is full; `retry_s` is when to come back."""

    def __init__(self, inside: int, places: int, retry_s: int) -> None:
        super().__init__(
            f"the server is busy: {inside} requests run or wait, and no more than {places} may.\n"
            f"Try again in {retry_s} s."
        )
        self.retry_s = retry_s


class Line:
    """At most `places` requests inside at once, running and waiting. Used from the event loop only."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.inside = 0
        self.request_s = 1.0  # moving mean of the time a request stays inside

    @property
    def wait_s(self) -> int:
        """Whole seconds until a place is likely to be free, 1 to 60."""
        return min(max(math.ceil(self.request_s / self.places), 1), 60)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Stand in the line. Raises Full when there is no place."""
        if self.inside >= self.places:
            raise Full(self.inside, self.places, self.wait_s)
        self.inside += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self.inside -= 1
            self.request_s += (time.perf_counter() - start - self.request_s) / 8


class Writer:
    """Generates text on worker threads and hands the pieces to the event loop.

    One thread, and so one answer after another, unless the session says by `parallel` that it computes more together.
    """

    def __init__(self, session: Session, task: Task) -> None:
        self.session = session
        self.tokenizer = task.tokenizer
        self.pool = ThreadPoolExecutor(getattr(session, "parallel", 1), thread_name_prefix="wherry-write")
        self.open: set[threading.Event] = set()

    async def write(
        self, tokens: Sequence[int], sampling: Sampling, stop: Sequence[str], continues: bool
    ) -> AsyncGenerator[Piece, None]:
        """Pieces as they come. Closing the iterator (or cancelling the task) frees the session at the next token."""
        loop, gone = asyncio.get_running_loop(), threading.Event()
        out: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        def work() -> None:
            last: Exception | None = None
            try:
                if not gone.is_set():
                    written = pieces(
                        self.session, self.tokenizer, tokens, sampling, stop, continues=continues, halted=gone.is_set
                    )
                    for piece in written:
                        loop.call_soon_threadsafe(out.put_nowait, piece)
            except Exception as error:  # raised again in the request that caused it, just below
                last = error
            loop.call_soon_threadsafe(out.put_nowait, last)

        self.open.add(gone)
        self.pool.submit(work)
        try:
            while (item := await out.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            gone.set()
            self.open.discard(gone)

    def halt(self) -> None:
        """End every answer at its next token."""
        for gone in self.open:
            gone.set()

    async def close(self) -> None:
        """Stop what still runs and wait for the thread."""
        self.halt()
        await asyncio.to_thread(self.pool.shutdown)


class Embedder:
    """Collects sentences of concurrent requests into one batch, for at most `wait_s`.

    While one batch runs the next one gathers by itself, so the wait only counts when the server is idle.
    """

    def __init__(self, session: Session, task: Task, most: int = 16, wait_s: float = 0.002) -> None:
        self.session, self.task, self.most, self.wait_s = session, task, most, wait_s
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="wherry-embed")
        self.queue: asyncio.Queue[tuple[list[int], asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self.batches = 0
        self.loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to collect; needs a running event loop."""
        self.queue = asyncio.Queue()
        self.loop_task = asyncio.create_task(self._run())

    async def embed(self, rows: Sequence[list[int]]) -> list[np.ndarray]:
        """One vector [width] per row of ids, in their order."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[np.ndarray]] = [loop.create_future() for _ in rows]
        try:
            for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):  # alike lengths: little padding
                self.queue.put_nowait((rows[i], futures[i]))
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            until = loop.time() + self.wait_s
            while len(batch) < self.most:
                if not self.queue.empty():
                    batch.append(self.queue.get_nowait())
                    continue
                try:
                    async with asyncio.timeout_at(until):
                        batch.append(await self.queue.get())
                except TimeoutError:
                    break
            batch = [item for item in batch if not item[1].done()]
            if not batch:
                continue
            try:
                vectors: Any = await loop.run_in_executor(self.pool, self._compute, [row for row, _ in batch])
            except Exception as error:  # raised again in every request of this batch
                vectors = [error] * len(batch)
            for (_, future), vector in zip(batch, vectors, strict=True):
                if future.done():
                    continue
                if isinstance(vector, Exception):
                    future.set_exception(vector)
                else:
                    future.set_result(vector)

    def _compute(self, rows: list[list[int]]) -> np.ndarray:
        self.batches += 1
        inputs = self.task.pad(rows)
        vectors = self.task.answer(self.session.predict(inputs), inputs)
        if not np.isfinite(vectors).all():
            raise Diverged("the model answered with NaN or infinity; check the artifact: wherry verify")
        return vectors

    async def close(self) -> None:
        """Stop collecting and wait for the thread."""
        if self.loop_task is not None:
            self.loop_task.cancel()
            await asyncio.gather(self.loop_task, return_exceptions=True)
        await asyncio.to_thread(self.pool.shutdown)
