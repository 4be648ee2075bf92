"""Run a command in a fork of the command server, for a program that starts it as a child of its own.

    python -IS tests/fork_client.py SOCKET MODULE ARGUMENTS...

Starts in a twentieth of the CPU time of `python -m MODULE ARGUMENTS`, passes on streams, environment, folder
and signals, and ends as the command does. See `tests.command_server` for the protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> int:
    """Return the exit status of the command, negative where a signal ended it."""
    path, module, *arguments = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is a process that gets them
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {
            "module": module,
            "arguments": arguments,
            "environment": dict(os.environ),
            "cwd": os.getcwd(),  # noqa: PTH109 - pathlib takes a third of the start
        }
        text = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [text], [0, 1, 2])
        connection.sendall(text[sent:])
        messages = connection.makefile("r")
        pid = json.loads(messages.readline())["pid"]

        def pass_on(number: int, _frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in PASSED_ON:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status: int = json.loads(messages.readline())["status"]
        return status


if __name__ == "__main__":
    status = main()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
