"""Call a function in a child process with a limit on its time and its memory.

For work on text from outside that may take minutes or gigabytes: an exponential regular expression, or a
document of millions of empty lists. After `timeout_s` the child is killed, and the next call starts another.
Time in which the child could run but other processes had the cores does not count: how busy a machine is must
not decide what is said of a text. A child that outlives its parent ends by itself: its input ends, and each
call has a timer. Arguments and results are what JSON has, and bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

_LENGTH = struct.Struct(">Q")
# A caller waits at most this many times its timeout, however busy the machine is.
_MOST_WAITS = 10
# A child may use this many seconds more than its caller waits; then its own timer kills it.
_SPARE_S = 5.0
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from harvester.system.limited_child import serve; serve({memory})"
)
# Name of the only member of an object that stands for bytes.
_BLOB = "\x00bytes"
# Set in a child: a function that calls another one with limits runs it at once there.
is_child = False


class ChildError(Exception):
    """The function raised something in the child. `kind` is the name of its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


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

    @property
    def memory_gib(self) -> float:
        """Most address space of the child in GiB."""
        return self._memory_bytes / 2**30

    def call(self, function: str, *args: Any, timeout_s: float) -> Any:
        """Return `function(*args)`, computed in the child; one call at a time.

        Args:
            function: `module:name`.

        Raises:
            TimeoutError: it took longer; the waits for earlier calls of other threads and, on Linux, for a
                core do not count.
            MemoryError: it needed more memory, or the child died.
            ChildError: the function raised something.
        """
        if is_child:
            return _function(function)(*args)
        with self._lock:
            process = self._started()
            try:
                answer = _exchange(process, [function, list(args), timeout_s], timeout_s)
            except BaseException:
                self._end()
                raise
        kind, value = answer
        if kind == "MemoryError":
            raise MemoryError(value)
        if kind:
            raise ChildError(kind, value)
        return value

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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the child, and what it may have started
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not written yet
                    continue


# One child for text of a teacher, and one for files, which may be large.
for_text = LimitedChild(1 << 30)
for_files = LimitedChild(16 << 30)


def _exchange(process: subprocess.Popen[bytes], request: Any, timeout_s: float) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _write(process.stdin, request)
        began, queued_s = time.monotonic(), _queued_s(process.pid)
        received = bytearray()
        wanted = _LENGTH.size
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while len(received) < wanted:
            left_s = timeout_s - (time.monotonic() - began)
            if left_s <= 0:
                left_s += min(_queued_s(process.pid) - queued_s, (_MOST_WAITS - 1) * timeout_s)
            if left_s <= 0:
                raise TimeoutError
            if not poll.poll(math.ceil(left_s * 1000)):
                continue
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                raise MemoryError("the child process ended")
            received += piece
            if wanted == _LENGTH.size <= len(received):
                wanted += _LENGTH.unpack_from(received)[0]
        return _unpacked(memoryview(received)[_LENGTH.size :])
    except BrokenPipeError:
        raise MemoryError("the child process ended") from None


def _queued_s(pid: int) -> float:
    """Return the seconds in which a process could run but had no core; 0 where the kernel does not tell.

    Source: the second number of `/proc/PID/schedstat` (Linux, Documentation/scheduler/sched-stats.rst).
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _write(pipe: BinaryIO | Any, value: Any) -> None:
    content = _packed(value)
    pipe.write(_LENGTH.pack(sum(map(len, content))))
    for piece in content:
        pipe.write(piece)
    pipe.flush()


def _packed(value: Any) -> list[bytes]:
    """JSON in which bytes are numbers of blobs, then the blobs, each after its length."""
    blobs: list[bytes] = []
    text = json.dumps(_plain(value, blobs)).encode()
    return [piece for blob in (text, *blobs) for piece in (_LENGTH.pack(len(blob)), blob)]


def _plain(item: Any, blobs: list[bytes]) -> Any:
    """Return a value with bytes replaced by their numbers in `blobs`.

    No closure: one that calls itself is a reference cycle, and would keep the blobs until a collection.
    """
    if isinstance(item, bytes):
        blobs.append(item)
        return {_BLOB: len(blobs) - 1}
    if isinstance(item, dict):
        return {name: _plain(member, blobs) for name, member in item.items()}
    return [_plain(member, blobs) for member in item] if isinstance(item, list) else item


def _unpacked(content: memoryview) -> Any:
    blobs: list[bytes] = []
    while content:
        end = _LENGTH.size + _LENGTH.unpack_from(content)[0]
        blobs.append(bytes(content[_LENGTH.size : end]))
        content = content[end:]

    def whole(item: dict[str, Any]) -> Any:
        return blobs[item[_BLOB] + 1] if _BLOB in item else item

    return json.loads(blobs[0], object_hook=whole)


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def serve(memory_bytes: int) -> None:
    """Answer calls from standard input until it ends (in the child)."""
    global is_child
    is_child = True
    limits = (memory_bytes, *resource.getrlimit(resource.RLIMIT_AS))
    most = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = _private_pipes()
    while header := source.read(_LENGTH.size):
        function, args, timeout_s = _unpacked(memoryview(source.read(_LENGTH.unpack(header)[0])))
        signal.setitimer(signal.ITIMER_REAL, _MOST_WAITS * timeout_s + _SPARE_S)  # SIGALRM ends the process
        try:
            answer = ["", _function(function)(*args)]
        except Exception as error:  # noqa: BLE001 - the caller gets it
            answer = [type(error).__name__, str(error)[:2000]]
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(sink, answer)


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipes of the calls, and put /dev/null in their place: a function may print, or read."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    os.close(null)
    return source, sink
