"""Split a body into lines without holding the interpreter for all of it. Pure.

A body of 32 MiB may hold 16 million lines. One call of `bytes.splitlines` for all of them would block every
other thread, and with it the event loop, for half a second.
"""

from __future__ import annotations

from collections.abc import Iterator

# Bytes that are split at once: a few milliseconds where every line has one byte.
PIECE = 256 << 10


def split_lines(raw: bytes) -> Iterator[bytes]:
    """Yield the lines of a body as `raw.splitlines()` returns them, in time proportional to its bytes."""
    start = newline = carriage_return = 0
    while start < len(raw):
        end = start + PIECE
        if 0 <= newline < end:  # -1: there is none after here
            newline = raw.find(b"\n", end)
        if 0 <= carriage_return < end:
            carriage_return = raw.find(b"\r", end)
        end = min((at for at in (newline, carriage_return) if at >= 0), default=len(raw) - 1) + 1
        if raw[end - 1 : end + 1] == b"\r\n":
            end += 1
        yield from raw[start:end].splitlines()
        start = end
