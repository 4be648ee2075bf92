"""Limit the memory that the bodies of all replies take together, by reading them one after another.

A reply may have 32 MiB, and hundreds may arrive at once. While all bodies together are below the limit they
are read at the same time. Above it the others wait until those that were read are stored, and then only the
oldest one is read on: so one always gets to its end. A body counts until it is stored, or given up.
"""

from __future__ import annotations

import asyncio

LIMIT_BYTES = 64 * 1024 * 1024


class BodyMemory:
    """Memory shared by the bodies of one client."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        # Bytes of bodies that are complete, and not stored yet.
        self.complete_bytes = 0
        # Bodies that are being read, oldest first.
        self.reading: dict[BodyShare, None] = {}
        # Those of them that wait for memory, and for each the event that wakes it.
        self.waiting: dict[BodyShare, asyncio.Event] = {}

    def share(self) -> BodyShare:
        """Begin to read a body."""
        share = BodyShare(self)
        self.reading[share] = None
        return share

    def may_exceed(self, share: BodyShare) -> bool:
        """Whether this body may be read on above the limit: nothing else will give memory back."""
        return not self.complete_bytes and next(iter(self.reading)) is share

    def wake_oldest(self) -> None:
        """Let the oldest body look again, or all while there is memory."""
        if not self.waiting:
            return
        for share in self.waiting if self.used_bytes < self.limit_bytes else [next(iter(self.reading), None)]:
            if share in self.waiting:
                self.waiting[share].set()


class BodyShare:
    """The memory of one body. It must be released once, after its last use."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._bytes = 0

    async def grow(self, more_bytes: int) -> None:
        """Add to the count of bytes; wait while all bodies take too much and this is not the oldest."""
        memory = self._memory
        self._bytes += more_bytes
        memory.used_bytes += more_bytes
        if memory.used_bytes < memory.limit_bytes:
            return
        event = memory.waiting[self] = asyncio.Event()
        try:
            while memory.used_bytes >= memory.limit_bytes and not memory.may_exceed(self):
                event.clear()
                await event.wait()
        finally:
            del memory.waiting[self]

    def end_reading(self) -> None:
        """Note that the body is complete; it still takes its memory. Safe to call twice."""
        if self in self._memory.reading:
            del self._memory.reading[self]
            self._memory.complete_bytes += self._bytes
            self._memory.wake_oldest()

    def release(self) -> None:
        """Give the memory back. Safe to call twice."""
        self.end_reading()
        self._memory.used_bytes -= self._bytes
        self._memory.complete_bytes -= self._bytes
        self._bytes = 0
        self._memory.wake_oldest()
