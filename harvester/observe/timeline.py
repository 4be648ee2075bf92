"""Rate, limits and vitals over the life of a store: trace.jsonl, a line now and then, read by the pages.

A view: losing it loses a picture, no answer. Points come every half second at first and every half minute in
the long run; a file that grew long is thinned when a run begins, so it stays readable in one go.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harvester.store import paths

FIRST_EVERY_S, LAST_EVERY_S = 0.5, 30.0
SHARE_OF_AGE = 1 / 400
"""A point each 400th of the run's age, within the two bounds above."""
MOST_LINES = 20_000

# name in the file -> name in the status snapshot; all are counts of the run so far, except the last line's
_COUNTS = {
    "sent": "requests_sent",
    "stored": "answers_stored",
    "cached": "from_cache",
    "dead": "dead",
    "limited": "rate_limited",
    "retries": "retries",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "microusd": "cost_microusd",
    "in_flight": "in_flight",
    "window": "window",
}


class Timeline:
    """Appends points of one run. A disk that refuses them ends no run."""

    def __init__(self, store: Path, run_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = store / paths.TIMELINE
        self._run_id = run_id
        self._clock = clock
        self._began = self._due = clock()
        _thin(self._path)

    def is_due(self) -> bool:
        """Whether it is time for another point."""
        return self._clock() >= self._due

    def note(self, told: Mapping[str, Any], vitals: Mapping[str, Any]) -> None:
        """Append a point made of a status snapshot and the process's vitals."""
        now = self._clock()
        self._due = now + min(LAST_EVERY_S, max(FIRST_EVERY_S, (now - self._began) * SHARE_OF_AGE))
        limits = told.get("limits") or {}
        point = {
            "at": round(time.time(), 3),
            "run_id": self._run_id,
            **{name: told.get(source, 0) for name, source in _COUNTS.items()},
            "requests_per_minute": limits.get("requests_per_minute"),
            "tokens_per_minute": limits.get("tokens_per_minute"),
            "waiting": told.get("waiting") or "",
            "errors": dict(told.get("errors") or {}),
            **vitals,
        }
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point, separators=(",", ":")) + "\n")


def read_timeline(store: Path) -> list[dict[str, Any]]:
    """All points, oldest first; a torn last line and lines that are none are left out."""
    try:
        lines = (store / paths.TIMELINE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    points = []
    for line in lines:
        with contextlib.suppress(ValueError):
            point = json.loads(line)
            if isinstance(point, dict) and isinstance(point.get("at"), int | float):
                points.append(point)
    return points


def _thin(path: Path) -> None:
    """Leave every other line of a long file out. Counts are cumulative, so nothing but detail is lost."""
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # torn by a kill: the next point must not join it
            lines.pop()
        elif len(lines) <= MOST_LINES:
            return
        while len(lines) > MOST_LINES:
            lines = lines[::2]
        hidden = path.with_name(f".{path.name}.tmp")
        hidden.write_text("".join(lines), encoding="utf-8")
        hidden.replace(path)
