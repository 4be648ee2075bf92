"""Test the pool of workers: how many it starts, and that none starts for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from harvester.api.types import Prompt, Request
from harvester.run.workers import WorkerPool

WORKERS, ROWS = 20, 100


class CountingGroup(asyncio.TaskGroup):
    """A task group that counts its tasks."""

    started = 0

    def create_task(self, coro: Coroutine[Any, Any, Any], **settings: Any) -> asyncio.Task[Any]:
        self.started += 1
        return super().create_task(coro, **settings)


def request(number: int) -> Request:
    prompt = Prompt(f"p{number}", ({"role": "user", "content": str(number)},))
    return Request(bytes(32), prompt, {})


def test_no_worker_is_started_for_an_empty_queue_while_the_last_answers_come() -> None:
    """Each answer looks whether workers are missing; those that met the end of the queue are not."""
    served: list[str] = []

    async def run() -> int:
        async def serve(asked: Request) -> None:
            if len(served) >= ROWS - WORKERS // 2:  # one after the other, when all others have ended
                await all_taken.wait()
                async with one_by_one:
                    await asyncio.sleep(0.001)
            served.append(asked.prompt.id)
            pool.adjust()

        all_taken, one_by_one = asyncio.Event(), asyncio.Lock()
        pool = WorkerPool(WORKERS, lambda: WORKERS, serve, all_taken)
        async with CountingGroup() as group:
            pool.start(group)
            for number in range(ROWS):
                await pool.put(request(number))
            assert not all_taken.is_set()
            await pool.finish()
            assert all_taken.is_set()
        return group.started

    assert asyncio.run(run()) == WORKERS
    assert sorted(served) == sorted(f"p{number}" for number in range(ROWS))


def test_what_is_put_first_while_the_last_answers_come_is_served() -> None:
    served: list[str] = []

    async def run() -> None:
        async def serve(asked: Request) -> None:
            await asyncio.sleep(0)
            served.append(asked.prompt.id)
            if asked.prompt.id == "p0" and served.count("p0") == 1:
                await all_taken.wait()
                pool.put_first([request(number) for number in range(5)])
                pool.adjust()

        all_taken = asyncio.Event()
        pool = WorkerPool(WORKERS, lambda: WORKERS, serve, all_taken)
        async with asyncio.TaskGroup() as group:
            pool.start(group)
            await pool.put(request(0))
            await pool.finish()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert sorted(served) == ["p0", "p0", "p1", "p2", "p3", "p4"]
