"""What the limiters must not forget when their process ends: levels, a learned rate, a pause.

Kept in the journal's `meta`, an endpoint a row, every two seconds and at the end. What was sent after the
last note is found among the attempts, so neither a restart nor a loop of crashes can double a rate or a day's
allowance. The time between two processes is taken from the wall clock; one that was set back gives nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from harvester.config.config import TeacherSection
from harvester.store.journal.checksums import signing
from harvester.store.journal.journal import Journal
from harvester.store.journal.writer import AsyncWriter
from harvester.system.clock import Clock
from harvester.teacher.queue import LOOK
from harvester.teacher.rate_headers import DAY_S
from harvester.teacher.rate_limiter import Charge, Limiter, amount

KEEP_EVERY_S = 2.0
_EVENTS = (
    "SELECT at_us / 1e6, input_tokens, output_tokens FROM answers WHERE endpoint = ?1 AND at_us > ?2"
    # Of those that never ended we know that they were requests, not what they would have used.
    " UNION ALL SELECT at_us / 1e6, 0, 0 FROM intents WHERE endpoint = ?1 AND at_us > ?2 ORDER BY 1"
)
_Event = tuple[float, int, int]


class LimiterState:
    """The limiters of one teacher and their notes in the journal."""

    def __init__(
        self, scribe: AsyncWriter, limiters: Mapping[str, Limiter], teacher: TeacherSection, clock: Clock
    ) -> None:
        self._scribe = scribe
        self._limiters = limiters
        self._model = teacher.model
        limits = teacher.limits.model_dump_json(exclude={"max_concurrency"})
        self._limits = hashlib.sha256(limits.encode()).hexdigest()[:16]
        self._clock = clock
        self._kept_at = -math.inf

    async def restore(self) -> None:
        """Bring the limiters to where the last process left them, and what has passed since."""
        now, wall = self._clock.now(), self._clock.wall()

        def read(journal: Journal) -> dict[str, tuple[dict[str, Any], list[_Event]]]:
            return {url: _read(journal, self._name(url), url, wall) for url in self._limiters}

        for url, (note, events) in (await self._scribe.call(read)).items():
            self._restore(self._limiters[url], note, events, now)

    async def keep(self, *, final: bool = False) -> None:
        """Note the levels if two seconds have passed, or at once."""
        now = self._clock.now()
        if not final and now - self._kept_at < KEEP_EVERY_S:
            return
        self._kept_at = now
        notes = [(self._name(url), self._note(limiter, now)) for url, limiter in self._limiters.items()]
        await self._scribe.call(lambda journal: _write(journal, notes))

    def _name(self, url: str) -> str:
        return f"levels:{url}|{self._model}"

    def _note(self, limiter: Limiter, now: float) -> str:
        for bucket in limiter.buckets.values():
            bucket.refill(now)
        pause_s = 0.0 if limiter.pause_reason == LOOK else max(0.0, limiter.paused_until - now)
        note = {
            "at": self._clock.wall(),
            "levels": {name: bucket.level for name, bucket in limiter.buckets.items()},
            "pause_s": pause_s,
            "pause_reason": limiter.pause_reason,
            "limits": self._limits,
            "rate": limiter.pace.rate,
            "typical_output": limiter.typical_output,
        }
        return orjson.dumps(note).decode()

    def _restore(
        self, limiter: Limiter, note: Mapping[str, Any], events: Iterable[_Event], now: float
    ) -> None:
        wall = self._clock.wall()
        at = float(note.get("at", wall - DAY_S))
        seen = list(events)
        for name, bucket in limiter.buckets.items():
            level, then = float(note.get("levels", {}).get(name, bucket.level)), at
            for when, tokens_in, tokens_out in seen:
                refilled = min(bucket.capacity, level + max(0.0, when - then) * bucket.rate)
                level, then = refilled - amount(name, Charge(tokens_in, tokens_out)), max(then, when)
            bucket.level = min(bucket.level, level + max(0.0, wall - then) * bucket.rate)
        if note.get("rate"):
            limiter.pace.resume(float(note["rate"]), now)
        if note.get("typical_output"):
            limiter.typical_output = float(note["typical_output"])
        # Whoever changes [teacher.limits] knows something new: the old pause may be void.
        left_s = float(note.get("pause_s", 0.0)) - max(0.0, wall - at)
        if left_s > 0 and note.get("limits") == self._limits:
            limiter.pause(left_s, now, str(note.get("pause_reason", "")))


def _read(journal: Journal, name: str, url: str, wall: float) -> tuple[dict[str, Any], list[_Event]]:
    with journal.reading() as connection:
        row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        note: dict[str, Any] = orjson.loads(row[0]) if row else {}
        since = float(note.get("at", wall - DAY_S))
        return note, connection.execute(_EVENTS, (url, round(since * 1e6))).fetchall()


def _write(journal: Journal, notes: list[tuple[str, str]]) -> None:
    with journal.writing() as connection, signing(connection, "meta"):
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", notes)
