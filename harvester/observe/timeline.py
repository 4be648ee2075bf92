"""Write and read trace.jsonl: rates, limits and process figures over the life of a store, for the charts.

Losing the file loses charts, no answer. Points are half a second apart at first and half a minute apart in a
long run. A file of more than `MOST_LINES` lines is thinned when a run begins, so it can be read in one go.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harvester.observe.metrics import trace_columns
from harvester.store import paths
from harvester.system import own_files

# The time between two points is this share of the run's age, within the two bounds.
SHARE_OF_AGE = 1 / 400
FIRST_EVERY_S, LAST_EVERY_S = 0.5, 30.0
MOST_LINES = 20_000

# Most bytes of the file that are read; the longest file that is written has some 2 MiB.
MAX_BYTES = 64 << 20
# Members of a point that are texts, and the one that holds numbers by name; all others are numbers or null.
_ERRORS = "errors"
_TEXTS = frozenset({"run_id", "waiting"})
# Larger numbers, and later times (the year 5138), are none of ours; JSON of Python knows NaN too.
_LARGEST, _LAST_AT = 1e18, 1e11


class TimelineWriter:
    """Append points of one run. Errors of the disk are ignored: losing a point must not end a run."""

    def __init__(self, store: Path, run_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = store / paths.TIMELINE
        self._run_id = run_id
        self._clock = clock
        self._began = self._due = clock()
        _thin(self._path)

    def is_due(self) -> bool:
        """Whether it is time for another point."""
        return self._clock() >= self._due

    def note(self, status: Mapping[str, Any], process: Mapping[str, Any]) -> None:
        """Append a point made of a status and of what `ProcessStats.read` returned."""
        now = self._clock()
        self._due = now + min(LAST_EVERY_S, max(FIRST_EVERY_S, (now - self._began) * SHARE_OF_AGE))
        limits = status.get("limits") or {}
        point = {
            "at": round(time.time(), 3),
            "run_id": self._run_id,
            **trace_columns(status),
            "requests_per_minute": limits.get("requests_per_minute"),
            "tokens_per_minute": limits.get("tokens_per_minute"),
            **process,
        }
        with contextlib.suppress(OSError):
            own_files.append(self._path, json.dumps(point, separators=(",", ":")).encode() + b"\n")


def read_timeline(store: Path) -> list[dict[str, Any]]:
    """Return all points, oldest first, without values that can't be theirs; the last line may be torn."""
    try:
        lines = own_files.read_text(store / paths.TIMELINE, MAX_BYTES).splitlines()
    except OSError:
        return []
    points = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            point = json.loads(line)
            if isinstance(point, dict) and _is_number(point.get("at")) and 0 <= point["at"] <= _LAST_AT:
                points.append({name: value for name, value in point.items() if _is_usable(name, value)})
    return points


def _is_usable(name: str, value: Any) -> bool:
    if name in _TEXTS:
        return isinstance(value, str)
    if name == _ERRORS:
        return isinstance(value, dict) and all(map(_is_number, value.values()))
    return value is None or _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _thin(path: Path) -> None:
    """Drop every other line of a long file. Counts are cumulative, so only detail is lost."""
    with contextlib.suppress(OSError):
        lines = own_files.read_text(path, MAX_BYTES).splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # torn by a kill: drop it
            lines.pop()
        elif len(lines) <= MOST_LINES:
            return
        while len(lines) > MOST_LINES:
            lines = lines[::2]
        with own_files.replacing(path) as file:
            file.write("".join(lines).encode())
