"""Run the Python code of an answer together with tests, in a process of its own with limits.

The process has an empty environment and folder, no standard input, the time and the address space that it is
given, writes no file above 1 MiB, and starts no other process; where the system allows it, it has no network.
It runs as the same user: it is protection against mistakes of a model, not against an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile

_FENCED = re.compile(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PYTHON_NAMES = frozenset({"python", "py", "python3"})
# Most bytes of an error message that are read.
_MOST_OUTPUT = 4096

# Limits that the process sets on itself, then the code and its tests in one namespace. The word at the end
# proves that the tests ran to their end: code that exits early never writes it.
_PROGRAM = """
import ctypes, json, os, resource, sys
memory, seconds, code, tests, word = json.loads(sys.stdin.read())
own = os.fdopen(os.dup(1), "w")
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0); os.dup2(null, 1)
sys.stdin = open(0, closefd=False)
for limit, most in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0),
):
    hard = resource.getrlimit(limit)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
except Exception:
    pass
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
space = {"__name__": "answer"}
exec(compile(code, "answer", "exec"), space)
exec(compile(tests, "tests", "exec"), space)
own.write(word)
own.flush()
os._exit(0)
"""


def code_in(text: str) -> str:
    """Return the code of an answer: its fenced blocks of Python, else all fenced blocks, else all of it."""
    blocks = [(match.group(1).lower(), match.group(2)) for match in _FENCED.finditer(text)]
    python = [code for name, code in blocks if name in _PYTHON_NAMES]
    return "\n".join(python or [code for _, code in blocks]) or text


def run(code: str, tests: str, *, timeout_s: float, memory_bytes: int) -> str | None:
    """Run code, then tests.

    Returns:
        None if both ran to their end; else what happened, such as the last line of a traceback.
    """
    word = secrets.token_hex(16)
    request = json.dumps([memory_bytes, int(timeout_s) + 1, code, tests, word])
    with (
        tempfile.TemporaryDirectory(prefix="answer-") as folder,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(request.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return "too slow"
        except BrokenPipeError:
            process.wait()
        finally:
            _kill(process)
        output.seek(0)
        if output.read(_MOST_OUTPUT).decode(errors="replace") == word:
            return None
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _MOST_OUTPUT))
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "ended before its tests did"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
