"""Provide time and sleep as a value, so that tests can replace them."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic time, wall-clock time and waiting."""

    def now(self) -> float:
        """Monotonic seconds; every wait and every rate is computed from it."""

    def wall(self) -> float:
        """Unix seconds, for records and schedules only: it may jump."""

    async def sleep(self, seconds: float) -> None:
        """Sleep for that many seconds."""

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Return when the event is set or that much time has passed; infinity waits for the event."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Unix seconds."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Yield to the event loop for that long."""
        await asyncio.sleep(seconds)

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for the event, at most that long."""
        try:
            async with asyncio.timeout(None if math.isinf(seconds) else seconds):
                await event.wait()
        except TimeoutError:
            pass
