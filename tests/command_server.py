"""Run commands of the package in processes that are forked from one that has imported everything.

Importing the harvester takes a second or two of CPU time, and the suite runs hundreds of its commands. This
server imports it once. Each command still gets a process of its own: its own PID, signals, files,
environment and exit status. What differs from `python -m harvester` is only where its imports come from, so
tests about the interpreter's start (LD_PRELOAD, limits on memory, terminals, systemd) start one with
`subprocess` instead.

Protocol: a client connects to the Unix socket, sends one JSON line with the descriptors of stdin, stdout and
stderr attached, and reads JSON lines: first `{"pid": n}`, then `{"status": n}` when the process has ended.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import harvester
from harvester.cli import malloc
from harvester.system.command_line.unused_imports import skip_unused_imports

# Before Arrow is imported, as `harvester run` does it.
malloc.use_one_arena()
skip_unused_imports()

# Modules that load torch: three seconds, for what hardly any command needs.
RARELY_USED = "harvester.mock_teacher.neural."


def main() -> None:
    """Serve until stdin ends; in a forked child, run the command and end as an interpreter does."""
    for module in pkgutil.walk_packages(harvester.__path__, "harvester."):
        if not module.name.endswith("__main__") and not module.name.startswith(RARELY_USED):
            importlib.import_module(module.name)
    _load_the_rest()
    gc.freeze()  # a collection in a child then does not touch, and so copy, what it shares with this process
    request = _serve(sys.argv[1])
    if request is not None:
        _become(request)
        _end(_run(request))


def _load_the_rest() -> None:
    """Load libraries and parse records that each command would load and parse at its first use."""
    import jsonschema  # noqa: F401
    import pyarrow as pa

    from harvester.terms.records import load_registry

    pa.array([""])  # the first array looks for pandas
    load_registry()


def _serve(path: str) -> dict[str, Any] | None:
    """Fork a child for each request. Returns the request in the child, None in the server when stdin ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request, descriptors = _receive(connection)
                pid = os.fork()
                if pid == 0:
                    for place, descriptor in enumerate(descriptors):
                        os.dup2(descriptor, place)
                    selector.close()
                    os.closerange(3, 4096)
                    return request
                for descriptor in descriptors:
                    os.close(descriptor)
                _send(connection, {"pid": pid})
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            elif key.fileobj == 0:
                if not os.read(0, 1):
                    return None
            else:
                pid, connection = key.data
                _, status = os.waitpid(pid, 0)
                selector.unregister(key.fileobj)
                os.close(key.fd)
                _send(connection, {"status": os.waitstatus_to_exitcode(status)})
                connection.close()


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    descriptors = array.array("i")
    text, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(3 * descriptors.itemsize))
    for _, _, content in ancillary:
        descriptors.frombytes(content)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    return json.loads(text), descriptors.tolist()


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # the client no longer waits for it
        connection.close()


def _become(request: dict[str, Any]) -> None:
    """Make this child what `python -m MODULE ARGUMENTS` would be, and run it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    malloc.use_one_arena()
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    # A pipe or a file is buffered in blocks, a terminal by lines, as the interpreter would open them.
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    from harvester.system import failpoints

    importlib.reload(failpoints)  # it reads the environment when it is imported


def _run(request: dict[str, Any]) -> int:
    """Run the module as `__main__` and return the exit code of the interpreter."""
    sys.argv = [request["module"], *request["arguments"]]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """End as an interpreter does, but leave the memory to the kernel: clearing it would copy all of it."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
