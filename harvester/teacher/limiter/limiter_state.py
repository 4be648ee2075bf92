"""Keep the limiters' state in the journal, so that a restart does not reset a rate or a day's allowance.

Saved every two seconds and at the end, one row per endpoint in the table `meta`: bucket levels, a pause, and
what was learned (rate, burst, share of unrelated refusals, how many requests the server works on at once or
refuses beyond). Attempts sent after the last save are taken from the journal and charged, so a loop of
crashes gains nothing either. The time between two processes comes from the wall clock; if it went back, it
counts as no time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from harvester.config.teacher_section import TeacherSection
from harvester.store.journal.journal import Journal
from harvester.store.journal.meta_values import read_value, write_values
from harvester.store.journal.writer import AsyncWriter
from harvester.system.clock import Clock
from harvester.teacher.limiter.limits import DAY_S, Charge
from harvester.teacher.limiter.rate_limiter import Limiter

SAVE_EVERY_S = 2.0
# Numbers in flight that were learned are restored after at most this time: a server may have been changed.
RECENT_S = 3600.0
_ATTEMPTS = (
    # The answers that one request brought have one time, to the microsecond.
    "SELECT at_us / 1e6, sum(input_tokens), sum(output_tokens) FROM answers"
    " WHERE endpoint = ?1 AND at_us > ?2 GROUP BY at_us"
    # Attempts without an outcome count as requests; the tokens they would have used are not known.
    " UNION ALL SELECT at_us / 1e6, 0, 0 FROM intents WHERE endpoint = ?1 AND at_us > ?2 GROUP BY at_us"
    " ORDER BY 1"
)
# Unix seconds, input tokens, output tokens.
_SentAttempt = tuple[float, int, int]


class LimiterState:
    """Saves and restores the limiters of one teacher.

    Args:
        limiters: by base URL.
    """

    def __init__(
        self, writer: AsyncWriter, limiters: Mapping[str, Limiter], teacher: TeacherSection, clock: Clock
    ) -> None:
        self._writer = writer
        self._limiters = limiters
        self._model = teacher.model
        limits = teacher.limits.model_dump_json(exclude={"max_concurrency"})
        self._limits_digest = hashlib.sha256(limits.encode()).hexdigest()[:16]
        self._clock = clock
        self._saved_at = -math.inf

    async def restore(self) -> None:
        """Set the limiters to where the last process left them, plus what refilled since."""
        now, wall = self._clock.now(), self._clock.wall()

        def read(journal: Journal) -> dict[str, tuple[dict[str, Any], list[_SentAttempt]]]:
            return {url: _read(journal, self._row_name(url), url, wall) for url in self._limiters}

        found = await self._writer.call(read)
        self._restore_parts({url: saved for url, (saved, _) in found.items()}, now)
        for url, (saved, attempts) in found.items():
            self._restore(self._limiters[url], saved, attempts, now)

    def _restore_parts(self, saved: Mapping[str, Mapping[str, Any]], now: float) -> None:
        """Set the parts of the credential's limits, if all were saved together and are the whole."""
        parts = {url: float(state.get("part", 0.0)) for url, state in saved.items()}
        if min(parts.values()) <= 0 or not math.isclose(sum(parts.values()), 1.0, abs_tol=1e-6):
            return
        for url, part in parts.items():
            limiter = self._limiters[url]
            # What they hold is lowered next.
            levels = {
                key: math.inf if key.period_s == DAY_S else limiter.buckets[key].level
                for key in limiter.credential_limits
            }
            limiter.set_part(part, levels, now)

    async def save(self, *, final: bool = False) -> None:
        """Save if two seconds have passed since the last time, or when `final`."""
        now = self._clock.now()
        if not final and now - self._saved_at < SAVE_EVERY_S:
            return
        self._saved_at = now
        states = {self._row_name(url): self._state(limiter, now) for url, limiter in self._limiters.items()}
        await self._writer.call(lambda journal: _write(journal, states))

    def _row_name(self, url: str) -> str:
        return f"levels:{url}|{self._model}"

    def _state(self, limiter: Limiter, now: float) -> dict[str, Any]:
        """Return the state as JSON values. Names of fields and buckets are part of the store's format."""
        for bucket in limiter.buckets.values():
            bucket.refill(now)
        pause = limiter.pause_now
        return {
            "at": self._clock.wall(),
            "levels": {key.label: bucket.level for key, bucket in limiter.buckets.items()},
            # A pause of our circuit breaker is not kept: the next process finds out by itself.
            "pause_s": max(0.0, pause.until - now) if pause.is_asked else 0.0,
            "pause_reason": pause.reason,
            "limits": self._limits_digest,
            "part": limiter.part,
            **limiter.saved(),
            "typical_output": limiter.output_estimate.tokens,
        }

    def _restore(
        self, limiter: Limiter, saved: Mapping[str, Any], attempts: Iterable[_SentAttempt], now: float
    ) -> None:
        wall = self._clock.wall()
        saved_at = float(saved.get("at", wall - DAY_S))
        sent = list(attempts)
        if not saved and not sent:  # nothing was ever sent from this store
            return
        for key, bucket in limiter.buckets.items():
            level, level_at = float(saved.get("levels", {}).get(key.label, bucket.level)), saved_at
            for sent_at, input_tokens, output_tokens in sent:
                level = min(bucket.capacity, level + max(0.0, sent_at - level_at) * bucket.rate)
                level -= key.quantity.amount(Charge(input_tokens, output_tokens))
                level_at = max(level_at, sent_at)
            bucket.lower_to(level + max(0.0, wall - level_at) * bucket.rate)
        limiter.resume(saved, now, is_recent=0 <= wall - saved_at < RECENT_S)
        if saved.get("typical_output"):
            limiter.output_estimate.tokens = float(saved["typical_output"])
        # Whoever changed [teacher.limits] knows something new, so the old pause may no longer hold.
        pause_s = float(saved.get("pause_s", 0.0)) - max(0.0, wall - saved_at)
        if pause_s > 0 and saved.get("limits") == self._limits_digest:
            limiter.pause(pause_s, now, str(saved.get("pause_reason", "")))


def _read(
    journal: Journal, row_name: str, url: str, wall: float
) -> tuple[dict[str, Any], list[_SentAttempt]]:
    """The saved state, empty where there is none, and the attempts sent since (at most a day back)."""
    with journal.reading() as connection:
        saved: dict[str, Any] = read_value(connection, row_name) or {}
        since = float(saved.get("at", wall - DAY_S))
        return saved, connection.execute(_ATTEMPTS, (url, round(since * 1e6))).fetchall()


def _write(journal: Journal, states: dict[str, dict[str, Any]]) -> None:
    with journal.writing() as connection:
        write_values(connection, states)
