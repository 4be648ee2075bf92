"""Import modules in a thread without holding up the other threads."""

from __future__ import annotations

import contextlib
import importlib.abc
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PAUSE_S = 0.001


class _Pause(importlib.abc.MetaPathFinder):
    """Find nothing, and sleep before each module that one thread imports."""

    def __init__(self, thread: int, hurry: threading.Event) -> None:
        self._thread = thread
        self._hurry = hurry

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if threading.get_ident() == self._thread:
            self._hurry.wait(PAUSE_S)
        return None


@contextlib.contextmanager
def paused_imports(hurry: threading.Event) -> Iterator[None]:
    """Sleep a millisecond before each module that this thread imports in the block, until `hurry` is set.

    Python switches threads every 5 ms at best. With a real-time priority (`chrt --rr`) a thread that waits
    for the interpreter gets it only when the other one sleeps: importing Arrow stopped an event loop for
    0.1 s, with the requests that it had to send.
    """
    pause = _Pause(threading.get_ident(), hurry)
    sys.meta_path.insert(0, pause)
    try:
        yield
    finally:
        sys.meta_path.remove(pause)
