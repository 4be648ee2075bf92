"""Run commands of the harvester as processes of their own, with configurations written for them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from typing import Any

from harvester.system.command_line import verb_command

# Exit codes of `harvester run` and `harvester judge` after which the answers are as complete as they will be:
# all rows done, and all done but more failed than [run] max_failed.
DONE = frozenset({0, 3})

# Variables of `harvester run` that hold for the harvests of a training, too: what bounds their cost and time.
_CEILINGS = tuple(
    verb_command.variable_name("harvester", "run", option)
    for option in ("max-usd", "max-tokens", "budget-per", "max-runtime", "finish-by", "grace")
)

# Number of the operation of prctl(2) that asks for a signal when the parent ends; <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1


def run_harvester(*words: object) -> tuple[int, dict[str, Any]]:
    """Run a command of the harvester to its end; what it prints on stderr is shown.

    Args:
        words: the command and its arguments; `--json` is added.

    Returns:
        The exit code as a shell shows it (128 + N after signal N), and the result that it printed as JSON;
        an empty one if it printed none.
    """
    command = [*program(), *map(str, words), "--json"]
    # A variable for another option would change what is made here, as HARVESTER_CURATE_OUT does.
    prefix = verb_command.variable_name("harvester", str(words[0]))
    environment = verb_command.without_variables(os.environ, [prefix], keep=_CEILINGS)
    # A session of its own keeps a Ctrl-C of the terminal from it. One signal is passed on below; a second one
    # would cancel answers that are paid for.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=end_with(os.getpid()),
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:  # a signal to this process: the harvest shall drain and end as well
            process.terminate()
            process.wait()
            raise
    code = process.returncode
    return code if code >= 0 else 128 - code, _last_object(output)


def program() -> list[str]:
    """Return the words that start the harvester, before those of a command."""
    return [sys.executable, "-m", "harvester"]


def end_with(parent: int) -> Callable[[], None] | None:
    """Return what a child calls before it starts its program, to get SIGTERM when its parent is killed.

    None where the system has no such signal: it is one of Linux (prctl(2), PR_SET_PDEATHSIG). It comes when
    the thread that started the child ends, so this thread has to wait for the child.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: the child does as little as it can

    def ask_for_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before the call
            os._exit(128 + signal.SIGTERM)

    return ask_for_signal


def ending_of(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return how a harvest ended and why, from the result that it printed; empty texts if it printed none."""
    return str(summary.get("ending", "")), str(summary.get("detail", ""))


def _last_object(output: str) -> dict[str, Any]:
    try:
        result = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return result if isinstance(result, dict) else {}


def toml_text(table: Mapping[str, Any]) -> str:
    """Return parsed TOML as text, one line a key of the root."""
    return "".join(f"{_quoted(key)} = {_toml(value)}\n" for key, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    return repr(value) if isinstance(value, (int, float)) else _quoted(str(value))


def _quoted(text: str) -> str:
    """Return a TOML string: that of JSON, with the one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
