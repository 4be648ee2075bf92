"""Test what commands print on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

PROGRAM = """
from trainer.console import print_message, progress_bar
with progress_bar("curve", "steps") as update:
    update(3, 7, "training 2 of 4, loss 1.250")
    print_message("said [while] it runs :smile:")
    update(4, 7, "[training] 2 of 4, loss 1.125, " + "more figures " * 9)
print_message("said afterwards")
"""


def test_messages_stand_above_the_bar_and_a_long_detail_is_cut() -> None:
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=terminal, env=environment) as program:
        os.close(terminal)
        written = b""
        try:
            while part := os.read(main, 4096):
                written += part
        except OSError:  # the other end was closed
            pass
    os.close(main)
    assert program.returncode == 0
    assert (
        b"\r\x1b[2Ksaid [while] it runs :smile:\r\n" in written
    )  # in place of the bar, which is drawn anew below
    assert b"said afterwards" in written
    assert b"4/7" in written
    assert b"[training] 2 of 4" in written
    assert "…".encode() in written
    assert b"more figures " * 9 not in written
