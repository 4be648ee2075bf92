"""Call a function in a child process with a limit on its time and its memory.

For work on text from outside that may take minutes or gigabytes: an exponential regular expression, or a
document of millions of empty lists. The caller waits at most `timeout_s`; then the child is killed, and the
next call starts another. A child that outlives its parent ends by itself: its input ends, and each call has
a timer.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO

_LENGTH = struct.Struct(">Q")
# A child may use this many seconds more than its caller waits; then its own timer kills it.
_SPARE_S = 5.0
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from harvester.system.limited_child import serve; serve({memory})"
)
# Set in a child: a function that calls another one with limits runs it at once there.
is_child = False


class LimitedChild:
    """A child process for calls with limits; started at the first call. Safe to share between threads.

    Args:
        memory_bytes: most address space of the child.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0

    def call(self, function: str, *args: Any, timeout_s: float) -> Any:
        """Return `function(*args)`, computed in the child; one call at a time.

        Args:
            function: `module:name`.

        Raises:
            TimeoutError: it took longer; the wait for earlier calls of other threads does not count.
            MemoryError: it needed more memory, or the child died.
            Exception: what the function raised.
        """
        if is_child:
            return _function(function)(*args)
        with self._lock:
            process = self._started()
            try:
                answer = _exchange(process, (function, args, timeout_s), timeout_s)
            except BaseException:
                self._end()
                raise
        is_result, value = answer
        if is_result:
            return value
        raise value

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._parent == os.getpid() and self._process.poll() is None:
            return self._process
        program = _PROGRAM.format(path=sys.path, memory=self._memory_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent
        )
        self._parent = os.getpid()
        atexit.register(self._end)
        return self._process

    def _end(self) -> None:
        atexit.unregister(self._end)
        process, self._process = self._process, None
        if process is None or self._parent != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not written yet
                    continue


def _exchange(process: subprocess.Popen[bytes], request: Any, timeout_s: float) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _write(process.stdin, request)
        until = time.monotonic() + timeout_s
        received = bytearray()
        wanted = _LENGTH.size
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while len(received) < wanted:
            left_ms = (until - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                raise MemoryError("the child process ended")
            received += piece
            if wanted == _LENGTH.size <= len(received):
                wanted += _LENGTH.unpack_from(received)[0]
        return pickle.loads(memoryview(received)[_LENGTH.size :])  # noqa: S301 - from our own process
    except BrokenPipeError:
        raise MemoryError("the child process ended") from None


def _write(pipe: BinaryIO | Any, value: Any) -> None:
    content = pickle.dumps(value)
    pipe.write(_LENGTH.pack(len(content)))
    pipe.write(content)
    pipe.flush()


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def serve(memory_bytes: int) -> None:
    """Answer calls from standard input until it ends (in the child)."""
    global is_child
    is_child = True
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while header := source.read(_LENGTH.size):
        function, args, timeout_s = pickle.loads(source.read(_LENGTH.unpack(header)[0]))  # noqa: S301 - our own
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _SPARE_S)  # SIGALRM ends the process
        try:
            answer: tuple[bool, Any] = (True, _function(function)(*args))
        except Exception as error:  # noqa: BLE001 - the caller gets it
            answer = (False, error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            _write(sink, answer)
        except (pickle.PicklingError, TypeError, AttributeError, MemoryError):
            _write(sink, (False, MemoryError("the result can't be passed on")))
