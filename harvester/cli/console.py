"""What commands say and paint: JSON lines on stdout for machines, talk on stderr for people."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from harvester.errors import StoreError
from harvester.system.safe_text import one_line

PLAIN_EVERY_S = 30.0
LOGGED = (
    "run_id",
    "state",
    "waiting",
    "rows_total",
    "from_cache",
    "duplicates",
    "answers_stored",
    "dead",
    "requests_sent",
    "retries",
    "rate_limited",
    "possibly_billed",
    "errors",
    "input_tokens",
    "output_tokens",
    "cost_microusd",
    "in_flight",
    "window",
    "rates",
    "refused_share",
    "limits",
    "budget",
    "eta_s",
    "canary",
    "complaints",
    "rss_bytes",
    "loop_lag_s",
)
"""Fields of the status (data/FORMAT.md) that a progress record holds."""


def emit(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Print a command's result: one JSON line, or lines of text. A reader that left changes no exit code.

    Raises:
        StoreError: stdout takes nothing more: a full disk, a terminal that went away.
    """
    said = [json.dumps(data, default=str)] if as_json else map(one_line, lines)
    hand_over("".join(f"{line}\n" for line in said))


def hand_over(text: str) -> None:
    """Text that is a file's, on stdout as it is; raises as `emit`."""
    try:
        print(text, end="", flush=True)  # noqa: T201
    except OSError as error:
        if (told := lost(error)) is not None:
            raise told from None


def lost(error: OSError) -> StoreError | None:
    """What to say when stdout refuses, None where its reader left; what follows goes nowhere."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - what is still buffered goes there too
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # `harvester ... | head`: nothing is wrong here
        return None
    return StoreError(
        f"stdout can't be written: {error.strerror}",
        place="stdout",
        remedy="what was asked for is done, only its result is not shown; write it elsewhere",
    )


def talk(line: str) -> None:
    """A line for people, on stderr; a JSON record where logs were asked for. A closed stderr ends no run."""
    _write(json.dumps({"at": _now(), "event": "message", "message": line}) if _logging else one_line(line))


_logging = False


def log_as_json() -> None:
    """From now on everything on stderr is one JSON object a line: stderr is the process's, and so is this."""
    global _logging
    _logging = True


def _write(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        sys.stderr = open(  # noqa: SIM115, PTH123 - must outlive this call
            "/dev/null", "w", encoding="utf-8"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def painted(total: int, title: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress display fed with snapshots: bars on a terminal, else a line (or a record) every 30 s.

    A line comes at once, too, when something keeps the first request.
    """
    from harvester.cli import progress

    if not _logging and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with progress.live(title) as update:
            yield update
        return
    said_at, said_state = time.monotonic(), ""
    latest: Mapping[str, Any] = {}
    stuck = False

    def say() -> None:
        nonlocal said_at, said_state
        said_at, said_state = time.monotonic(), str(latest.get("state", ""))
        if _logging:
            _write(json.dumps({"at": _now(), "event": "progress", **{n: latest.get(n) for n in LOGGED}}))
        else:
            _write(one_line(f"{title}: {progress.sentence(latest, total)}"))

    def plain(snapshot: Mapping[str, Any]) -> None:
        nonlocal latest, stuck
        latest = snapshot
        fresh = not stuck and bool(latest.get("waiting")) and not latest.get("requests_sent")
        stuck = stuck or fresh  # what keeps the first request is told at once, and once
        turned = _logging and latest.get("state") != said_state
        if fresh or turned or time.monotonic() - said_at >= PLAIN_EVERY_S:
            say()

    try:
        yield plain
    finally:
        if latest:
            say()
