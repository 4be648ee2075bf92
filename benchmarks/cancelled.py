"""Count the healthy requests that are served after 4,000 cancelled ones.

    python benchmarks/cancelled.py [--cancelled 4000]

Cancelled in waves of 250, each request within its first 0.4 s against a server that answers after 0.5 to 1 s
(our own, as nginx can't delay the first request of a connection); then 64 are sent at once and have 10 s.
The bare clients for comparison: httpx over aiohttp, and httpx over its own pool, which loses a slot for a
request that is cancelled while it waits for one (encode/httpcore#1093).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import orjson
from bare import HEADERS, bare_httpx
from load_side import load_side
from one_pass import everything_on, questions

from harvester.api.http.client import Client
from harvester.api.request_builder import requests
from harvester.api.types import Request
from harvester.config.config import HarvestConfig

WAVE = 250
LATEST_S = 0.4
HEALTHY = 64
HEALTHY_S = 10.0
Send = Callable[[Request], Awaitable[int]]
Found = tuple[int, int, float]


async def outcome(send: Send, feed: Iterator[Request], cancelled: int) -> Found:
    """Requests that were cut short, healthy ones served, and seconds that these took."""
    chance = random.Random(1)
    cut = 0

    async def wave(size: int) -> None:
        nonlocal cut

        async def one(request: Request) -> None:
            nonlocal cut
            try:
                async with asyncio.timeout(chance.uniform(0.0, LATEST_S)):
                    await send(request)
            except TimeoutError:
                cut += 1

        await asyncio.gather(*(one(request) for request in itertools.islice(feed, size)))

    for done in range(0, cancelled, WAVE):
        await wave(min(WAVE, cancelled - done))
    begun = time.monotonic()
    tasks = [asyncio.create_task(_status(send, request)) for request in itertools.islice(feed, HEALTHY)]
    served, waiting = await asyncio.wait(tasks, timeout=HEALTHY_S)
    for task in waiting:
        task.cancel()
    return cut, sum(task.result() == 200 for task in served), time.monotonic() - begun


async def _status(send: Send, request: Request) -> int:
    try:
        return await send(request)
    except httpx.TransportError:
        return 0


async def ours(config: HarvestConfig, cancelled: int) -> Found:
    """The harvester's client."""
    async with Client(config.teacher, config.run, None) as client:

        async def send(request: Request) -> int:
            return (await client.send(request, config.teacher.base_url)).status

        return await outcome(send, requests(questions(), config), cancelled)


async def bare(
    client: AbstractAsyncContextManager[httpx.AsyncClient], config: HarvestConfig, cancelled: int
) -> Found:
    """A client of httpx."""
    url = f"{config.teacher.base_url}/chat/completions"
    async with client as opened:

        async def send(request: Request) -> int:
            return (await opened.post(url, content=orjson.dumps(request.body), headers=HEADERS)).status_code

        return await outcome(send, requests(questions(), config), cancelled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cancelled", type=int, default=4000)
    chosen = parser.parse_args()
    with load_side(slow=True, own=True) as load:
        config = everything_on(load.base_url, HEALTHY)
        print(f"{load.kind}; to reach: {HEALTHY} of {HEALTHY}")
        runs: tuple[tuple[str, Callable[[], Coroutine[Any, Any, Found]]], ...] = (
            ("harvester's client", lambda: ours(config, chosen.cancelled)),
            ("bare httpx over aiohttp", lambda: bare(bare_httpx(), config, chosen.cancelled)),
            ("bare httpx, own pool", lambda: bare(httpx.AsyncClient(timeout=60), config, chosen.cancelled)),
        )
        for name, run in runs:
            cut, served, took_s = asyncio.run(run())
            text = f"{cut} cancelled, then {served} of {HEALTHY} served in {took_s:.1f} s"
            print(f"  {name:24} {text}", flush=True)


if __name__ == "__main__":
    main()
