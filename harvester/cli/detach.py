"""Start `harvester run` in a process that outlives the terminal (`--detach`).

The process runs in a scope of systemd where a manager answers, else in a session of its own. Its output goes
to a file without a name, and from its first status on, when it holds the store, to a log beside the store: so
only one process writes the log. The starting command shows this output until the run has passed its first
checks; if it ends before, the starting command ends with its message and its exit code.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harvester.cli.console import message
from harvester.errors import RunState, StoreError
from harvester.system.command_line.shell_words import shell_word
from harvester.system.command_line.verb_command import variable_name

# Holds the path of the log in the environment of the detached process, which renames the log when it is full.
LOG_VARIABLE = "_HARVESTER_LOG"

# Ends the file that the process writes at first, and names the place in the log where it goes on. Messages
# hold no control characters.
_GOES_ON = re.compile(rb"\0(\d+)\n")

# At most so many bytes; then the log is renamed to NAME.1, in place of an earlier one.
MAX_LOG_BYTES = 8 << 20

# Seconds between two looks at the process that starts.
POLL_S = 0.05

# Seconds that a run gets, after it holds the store, for its first answer: a key that the teacher refuses is
# then reported by the starting command.
FIRST_ANSWER_S = 3.0

# Seconds for an answer of systemd.
SYSTEMD_S = 5.0


@dataclass(frozen=True, slots=True)
class Detached:
    """A run that was started. `unit` is its scope in systemd, "" without one.

    `exit_code` is None while it goes on; a run may end while it is watched, by a failure or as it had little
    to do.
    """

    pid: int
    store: Path
    log: Path
    unit: str
    notes: tuple[str, ...]
    exit_code: int | None

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return {
            "pid": self.pid,
            "store": str(self.store),
            "log": str(self.log),
            "unit": self.unit,
            "exit_code": self.exit_code,
        }

    def lines(self) -> list[str]:
        """For people."""
        store = shell_word(self.store)
        if self.exit_code is not None:
            return [f"the run has ended already, with exit code {self.exit_code}; log: {self.log}"]
        scope = f", scope {self.unit}" if self.unit else ""
        return [
            f"detached: pid {self.pid}{scope}; log: {self.log}",
            f"look:     harvester attach {store}   (or: harvester status {store})",
            f"stop:     harvester stop {store}",
            *(f"note: {note}" for note in self.notes),
        ]


def log_of(store: Path) -> Path:
    """Return the log of the detached runs of a store: beside it, as it may not exist yet."""
    return store.with_name(f"{store.name}.log")


def start(words: Sequence[str], store: Path) -> Detached:
    """Start `harvester` with these arguments; return when the run holds the store, or has ended.

    Raises:
        StoreError: the log can't be written.
        KeyboardInterrupt, SystemExit: a signal came before that; the run is ended.
    """
    log = log_of(store)
    prefix, unit, notes = _scope(store)
    environment = {name: value for name, value in os.environ.items() if name != _DETACH}
    began = time.time()
    with _first_file(log) as file:
        output = _Output(file, log)
        process = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", "harvester", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**environment, LOG_VARIABLE: str(log.resolve())},
            start_new_session=True,
        )
        is_interrupted = True
        try:
            code = _wait_until_it_holds(process, store, began, output)
            is_interrupted = False
        finally:
            output.close()
            if is_interrupted:
                process.terminate()
                process.wait()
                message("the run that was starting is ended")
    if code is None:
        process.returncode = 0  # it goes on: without this, Python would warn that nobody waits for it
    elif code < 0:
        code = 128 - code
    return Detached(process.pid, store, log, unit, notes, code)


_DETACH = variable_name("harvester", "run", "detach")


def _first_file(log: Path) -> BinaryIO:
    """Return a file without a name, for what the run says before it holds the store.

    Raises:
        StoreError: the log that it writes then can't be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the run makes it, once it holds the store
            os.close(_opened(log, create=False))
        return tempfile.TemporaryFile(dir=log.parent)
    except OSError as error:
        raise StoreError(
            f"the log of the run can't be written: {error.strerror}",
            place=str(log),
            remedy="make its folder writable, or run without --detach",
        ) from None


def _opened(log: Path, *, create: bool = True) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.open(log, flags, 0o600)


def _wait_until_it_holds(
    process: subprocess.Popen[bytes], store: Path, began: float, output: _Output
) -> int | None:
    """Show the output until the run has begun; return its exit code if it ended instead."""
    holds_since: float | None = None
    while True:
        code = process.poll()
        if code is None and _has_begun(store, process.pid, began):
            holds_since = holds_since or time.monotonic()
            if _is_at_work(store) or time.monotonic() - holds_since > FIRST_ANSWER_S:
                output.show()
                return None
        output.show()
        if code is not None:
            return code
        time.sleep(POLL_S)


def _has_begun(store: Path, pid: int, began: float) -> bool:
    """Whether the heartbeat is that of this process: it holds the store and passed its first checks."""
    from harvester.observe.status import read_status

    status = read_status(store)
    return status.get("pid") == pid and float(status.get("started_at", 0.0)) >= began - 1


def _is_at_work(store: Path) -> bool:
    from harvester.run.control import client

    live = client.ask(store, "status", patience_s=1.0) or {}
    return live.get("state") == RunState.ON_HOLD or any(
        live.get(name) for name in ("answers_stored", "waiting")
    )


class _Output:
    """Prints what a run says: from its first file, and from the log once it goes on there.

    The place in the file is kept here, as that of the file itself moves when the run writes.
    """

    def __init__(self, first: BinaryIO, log: Path) -> None:
        self._number = os.dup(first.fileno())
        self._log = log
        self._is_first = True
        self._place = 0

    def show(self) -> None:
        """Print what was written since; the rest of a line waits for its end."""
        text = self._rest()
        if self._is_first and (mark := _GOES_ON.search(text)):
            self._print(text[: mark.start()])
            self._place += len(text)
            self._follow_log(int(mark[1]))
            text = self._rest()
        whole = text[: text.rfind(b"\n") + 1]
        self._print(whole)
        self._place += len(whole)

    def _follow_log(self, place: int) -> None:
        with contextlib.suppress(OSError):  # somebody removed it
            number = os.open(self._log, os.O_RDONLY | os.O_NOFOLLOW)
            self.close()
            self._number, self._is_first, self._place = number, False, place

    def _rest(self) -> bytes:
        return os.pread(self._number, max(0, os.fstat(self._number).st_size - self._place), self._place)

    @staticmethod
    def _print(text: bytes) -> None:
        for line in text.decode("utf-8", errors="replace").splitlines():
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Close the file."""
        os.close(self._number)


def _scope(store: Path) -> tuple[list[str], str, tuple[str, ...]]:
    """Return the command that runs another in a scope of systemd, the scope's name, and notes.

    The user's manager first, then for root that of the system; nothing where neither answers.
    """
    if shutil.which("systemd-run") is None or shutil.which("systemctl") is None:
        return [], "", ()
    for kind in (["--user"], ["--system"]):
        if kind == ["--system"] and os.geteuid() != 0:
            break
        if not _answers(kind):
            continue
        unit = f"harvester-{os.getpid()}-{int(time.time())}.scope"
        described = f"--description=harvester run into {store.resolve()}"
        command = ["systemd-run", *kind, "--scope", "--quiet", "--collect", f"--unit={unit}", described]
        return [*command, "--no-ask-password", "--"], unit, _linger_note(kind)
    return [], "", ()


def _answers(kind: Sequence[str]) -> bool:
    state = _output(["systemctl", *kind, "is-system-running"])
    return state in {"running", "degraded", "starting"}


def _linger_note(kind: Sequence[str]) -> tuple[str, ...]:
    if (
        kind != ["--user"]
        or _output(["loginctl", "show-user", str(os.getuid()), "-p", "Linger"]) != "Linger=no"
    ):
        return ()
    return ("systemd ends it when you have logged out everywhere, unless you run `loginctl enable-linger`",)


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SYSTEMD_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _rename_if_full(log: Path) -> bool:
    try:
        is_full = log.stat().st_size > MAX_LOG_BYTES
    except FileNotFoundError:
        return False
    if is_full:
        log.replace(log.with_name(f"{log.name}.1"))
    return is_full


class OwnLog:
    """The log that stdout and stderr of a detached run go to; it is renamed when it is full.

    Until `bound` is called first they go to the file of `_first_file`, in which the starting command reads.
    """

    def __init__(self) -> None:
        path = os.environ.pop(LOG_VARIABLE, "")  # so that no child takes it for its own
        self._path = Path(path) if path else None
        self._is_in_first_file = True

    def bound(self) -> None:
        """Begin a new file if this one is full, or the first. The run holds the store."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):  # the run goes on with the file that it has
            if not (_rename_if_full(self._path) or self._is_in_first_file):
                return
            file = _opened(self._path)
            try:
                if self._is_in_first_file:
                    _copy_first_file(file)
                    self._is_in_first_file = False
                for number in (1, 2):
                    os.dup2(file, number)
            finally:
                os.close(file)


def _copy_first_file(log: int) -> None:
    """Copy what stderr wrote to the log, and tell the starting command where the log goes on."""
    text = os.pread(2, os.fstat(2).st_size, 0)
    with open(log, "ab", closefd=False) as file:  # writes all of it, also in parts
        file.write(text)
    os.write(2, b"\0%d\n" % os.fstat(log).st_size)


def words_of(context: Any) -> list[str]:
    """Return the arguments of the command that runs, without --detach and --json; variables are inherited."""
    words = list(context.command_path.split()[1:2]) or ["run"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        source = context.get_parameter_source(parameter.name)
        if source is None or source.name != "COMMANDLINE" or parameter.name in ("detach", "as_json"):
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif parameter.is_flag:
            words.append(max(parameter.opts, key=len))
        else:
            words.append(f"{max(parameter.opts, key=len)}={getattr(value, 'value', value)}")
    return words
