"""Test that bash and zsh complete commands, options and values, by typing into them."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, shell: str, home: Path) -> None:
        programs = home / "bin"
        programs.mkdir(exist_ok=True)
        for name in ("harvester", "trainer"):
            script = programs / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n')
            script.chmod(0o755)
        environment = {
            "HOME": str(home),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TERM": "vt100",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execvpe(shell, [shell, "-i"], environment)
        self._shown = ""

    def type(self, keys: str, until: str) -> None:
        """Type, and wait until the terminal shows what is wanted."""
        os.write(self._terminal, keys.encode())
        limit = time.monotonic() + 240
        while (match := re.search(until, self._shown)) is None:
            assert time.monotonic() < limit, self._shown
            if select.select([self._terminal], [], [], 1)[0]:
                text = os.read(self._terminal, 1 << 16).decode(errors="replace")
                self._shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x00\x07]", "", text)
        self._shown = self._shown[match.end() :]

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._terminal)
        os.waitpid(self._pid, 0)


@contextlib.contextmanager
def terminal(shell: str, home: Path) -> Iterator[Terminal]:
    opened = Terminal(shell, home)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_at_the_first_tab(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / f".{shell}rc").write_text("PS1='ready> '\nPROMPT='ready> '\n", encoding="utf-8")
    with terminal(shell, tmp_path) as first:
        first.type("", "ready> ")
        for program in ("harvester", "trainer"):
            first.type(f"{program} --install-completion\n", "completion installed in")
            first.type("", "ready> ")
    with terminal(shell, tmp_path) as second:  # a new one, as the message says
        second.type("", "ready> ")
        second.type("harvester ru\t", "harvester run ")
        second.type("--max-r\t", "-runtime ")
        second.type("\x15trainer dis\t", "distil ")
        second.type("--from ev\t", "evaluate ")
