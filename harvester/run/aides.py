"""What goes on beside a run while it lives: if it dies, that is told at once, and is no ending."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from harvester.errors import HarvesterError


@contextlib.asynccontextmanager
async def background_task(
    name: str, work: Coroutine[Any, Any, None], complain: Callable[[Exception], None]
) -> AsyncIterator[None]:
    """Have this done until the block ends; it never raises here, whatever it met.

    Args:
        name: what the complaint calls it.
        complain: hears that it stopped by itself with an error.
    """

    def ended(aide: asyncio.Task[None]) -> None:
        if not aide.cancelled() and (error := aide.exception()) is not None:
            complain(HarvesterError(f"stopped by {error or type(error).__name__}", place=name))

    aide = asyncio.create_task(work)
    aide.add_done_callback(ended)
    try:
        yield
    finally:
        aide.cancel()
        await asyncio.wait([aide])
