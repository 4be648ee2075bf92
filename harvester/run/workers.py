"""The workers of a pass and the bounded queue before them: as many as may be in flight, now."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from harvester.api.types import Request
from harvester.errors import HarvesterError, PromptError


class WorkerPool:
    """Workers that take requests from one queue.

    Args:
        size: how many, and how long the queue is.
        serve: what a worker does with a request; it raises only what ends the pass.
    """

    def __init__(self, size: int, serve: Callable[[Request], Awaitable[None]]) -> None:
        self._size = size
        self._serve = serve
        self._queue: asyncio.Queue[Request | None] = asyncio.Queue(maxsize=size)
        self._workers: list[asyncio.Task[None]] = []
        self._group: asyncio.TaskGroup | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Hire them all, as tasks of this group."""
        self._group = group
        self.resize(self._size)

    def resize(self, size: int) -> None:
        """Have so many from now on; those beyond leave after what they are at."""
        self._size = size
        if self._group is None:
            return
        for number in range(size):
            if number == len(self._workers):
                self._workers.append(self._group.create_task(self._work(number)))
            elif self._workers[number].done():
                self._workers[number] = self._group.create_task(self._work(number))

    @property
    def queue_is_empty(self) -> bool:
        """Nobody waits for a worker."""
        return self._queue.empty()

    async def put(self, request: Request) -> None:
        """Queue a request; waits while the queue is full."""
        await self._queue.put(request)

    async def finish(self) -> None:
        """No more requests will come: return when the last worker has gone."""
        await self._queue.put(None)
        while at_work := [worker for worker in self._workers if not worker.done()]:
            await asyncio.wait(at_work)
        self._group = None

    async def dismiss(self) -> None:
        """Cancel all. Nobody takes from the queue any more, and whoever feeds it must not wait for room."""
        for worker in self._workers:
            worker.cancel()
        while True:
            await self._queue.get()

    async def _work(self, number: int) -> None:
        while number < self._size:
            request = await self._queue.get()
            if request is None:
                self._queue.put_nowait(None)  # the others end by it too
                return
            await self._serve(request)


def take(feed: Iterator[Request | None], most: int) -> tuple[list[Request], bool]:
    """Up to `most` requests, and whether the feed may bring more; None in it means "no more for now".

    Raises:
        HarvesterError: always one: whatever ends the feed, the pass must still keep what is on the wire.
    """
    chunk: list[Request] = []
    try:
        for request in feed:
            if request is None:
                return chunk, True
            chunk.append(request)
            if len(chunk) == most:
                return chunk, True
    except HarvesterError:
        raise
    except Exception as error:
        why = f"the prompts can't be read on: {type(error).__name__}: {error}"
        raise PromptError(why, remedy="what was answered is stored; please report this") from error
    return chunk, False
