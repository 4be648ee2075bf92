"""Run work in a thread of its own, and hand over its events and its result.

The caller may be a thread with a running event loop, as in a notebook: the work has another thread, and an
event loop of its own where it needs one. Nothing of the process is changed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - see _end_all
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

Event = TypeVar("Event")
Result = TypeVar("Result")

# Events that are kept for an iterator that is slow, or that has not begun.
EVENTS_KEPT = 1024


class StopRequests:
    """Requests, from any thread, that work shall end. The first lets it finish what is under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._listener: Callable[[], object] | None = None

    @property
    def count(self) -> int:
        """How often the end was asked for."""
        return self._count

    def ask(self) -> None:
        """Ask the work to end."""
        with self._lock:
            self._count += 1
            if self._listener is not None:
                self._listener()

    def ask_once(self) -> None:
        """Ask the work to end, unless somebody has: a second request may end it at once."""
        if not self._count:
            self.ask()

    @contextlib.contextmanager
    def heard_by(self, listener: Callable[[], object]) -> Iterator[None]:
        """Call `listener` for each request during the block, and at once for those that came before it."""
        with self._lock:
            for _ in range(self._count):
                listener()
            self._listener = listener
        try:
            yield
        finally:
            with self._lock:
                self._listener = None


class Running(Generic[Event, Result]):
    """Work that runs in a thread. Iterate over its events, or wait for its result.

        async for event in running: ...     # ends when the work ends, and raises the error that ended it
        result = await running              # in a coroutine
        result = running.result()           # anywhere else

    When the main thread of the program ends meanwhile, the work is asked to end, and the program waits for
    that; Ctrl-C then asks once more. `os._exit` and a signal without a handler end it as a kill does.

    Args:
        name: of the thread.
        work: gets a function to call with each event, and the requests to end.
        on_event: is called with each event, in the thread of the work. What it raises asks the work to end,
            and is raised where the result is asked for. It is not called again.
        ends_when_asked: whether the work heeds requests to end. Without that, it ends with the program.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Callable[[Event], None], StopRequests], Result],
        on_event: Callable[[Event], object] | None = None,
        *,
        ends_when_asked: bool = True,
    ) -> None:
        self._work = work
        self._on_event = on_event
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._requests = StopRequests()
        self._changed = threading.Condition()
        self._wakers: set[Callable[[], object]] = set()
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._is_over = False
        self._event_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        if ends_when_asked:
            _end_before_the_program(self)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._work(self._emit, self._requests))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error
        self._error = self._event_error or self._error
        _under_way.discard(self)
        with self._changed:
            self._is_over = True
            self._wake()

    def _emit(self, event: Event) -> None:
        if self._on_event is not None and self._event_error is None:
            try:
                self._on_event(event)
            except BaseException as error:  # noqa: BLE001 - raised once what is under way is done
                self._event_error = error
                self._requests.ask_once()
        with self._changed:
            self._events.append(event)
            self._wake()

    def _wake(self) -> None:
        """Wake all who wait; the lock is held."""
        self._changed.notify_all()
        for wake in self._wakers:
            wake()

    @property
    def is_over(self) -> bool:
        """Whether the work has ended."""
        return self._is_over

    @property
    def thread_is_alive(self) -> bool:
        """Whether this process has the thread of the work."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ask the work to end once what is under way is done; a second call ends a harvest at once."""
        self._requests.ask()

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result. Ctrl-C asks the work to end, waits for that, and is raised then.

        Args:
            timeout_s: seconds to wait at most; None waits for ever.

        Raises:
            TimeoutError: the work has not ended by then; it goes on.
            Exception: the error that ended the work.
        """
        try:
            self._wait(timeout_s)
        except KeyboardInterrupt:
            self.stop()
            try:
                self._wait(None)
            except KeyboardInterrupt:
                self.stop()
                self._wait(None)
            raise
        return self._outcome()

    def end(self) -> None:
        """Ask the work to end, unless that was asked for, and wait for it; Ctrl-C asks once more."""
        self._requests.ask_once()
        try:
            self._wait(None)  # Thread.join takes a thread for ended after Ctrl-C, in Python 3.11
        except KeyboardInterrupt:
            self.stop()
            self._wait(None)

    def _wait(self, timeout_s: float | None) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_over, timeout_s):
                raise TimeoutError(f"has not ended after {timeout_s} s")

    def _outcome(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._results[0]

    def __await__(self) -> Generator[object, None, Result]:
        return self._ended().__await__()

    async def _ended(self) -> Result:
        with self._woken() as changed:
            while not self._is_over:
                await changed.wait()
                changed.clear()
        return self._outcome()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events that nobody has taken yet, and those to come.

        Raises:
            Exception: the error that ended the work, after its last event.
        """
        with self._woken() as changed:
            while True:
                is_over = self._is_over  # set after the last event
                while self._events:
                    yield self._events.popleft()
                if is_over:
                    break
                await changed.wait()
                changed.clear()
        self._outcome()

    @contextlib.contextmanager
    def _woken(self) -> Iterator[asyncio.Event]:
        """Give an event of the running loop that is set at each change."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wakers.add(wake)
        try:
            yield changed
        finally:
            with self._changed:
                self._wakers.discard(wake)


# The work that is ended before the program ends.
_under_way: set[Running[Any, Any]] = set()
_registering = threading.Lock()
_is_registered = False


def _end_before_the_program(running: Running[Any, Any]) -> None:
    global _is_registered
    with _registering:
        if not _is_registered:
            threading._register_atexit(_end_all)  # type: ignore[attr-defined]
            _is_registered = True
    _under_way.add(running)


def _end_all() -> None:
    """End all work that is under way, when the main thread has ended.

    `atexit` would be too late: `concurrent.futures` starts no more calls in threads then, which the
    work needs for its end. What was registered last is called first, so that module must be imported before.
    """
    for running in list(_under_way):
        if running.thread_is_alive:  # it is not in a forked child
            running.end()
