"""Limit the rate and the number of requests in flight at one endpoint: token buckets, departures, a window.

Everything here is pure: it takes monotonic seconds and returns seconds to wait. `queue.EndpointQueue` does
the waiting.

Rate: one token bucket per limit (`bucket`). A request takes its estimated units before it is sent
(`output_estimate`); `settle` corrects the estimate when the teacher reports the real count. Limits on
requests are admitted BURST_S ahead and kept when the requests depart (`departures`). What no limit states is
learned from refusals (`learned_rate`, `learned_burst`).

Concurrency: a congestion window (`window`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from harvester.api.error_body import retry_after_s
from harvester.config.teacher_section import LimitsSection, RateLimitsSection
from harvester.teacher.limiter.bucket import BURST_S, Bucket
from harvester.teacher.limiter.departures import Departures
from harvester.teacher.limiter.learned_burst import FIRST_BURST_S, LearnedBurst
from harvester.teacher.limiter.learned_rate import ENOUGH_REFUSALS, LearnedRate, Lesson
from harvester.teacher.limiter.limits import (
    DAY_S,
    HOUR_S,
    LEARNED_REQUESTS,
    REQUESTS_PER_MINUTE,
    Charge,
    LimitKey,
    Quantity,
    configured_limits,
)
from harvester.teacher.limiter.output_estimate import OutputEstimate
from harvester.teacher.limiter.rate_headers import HeaderPeriods, RateHeader, parse_rate_headers
from harvester.teacher.limiter.rate_waits import RateWaits
from harvester.teacher.limiter.refused_rows import LONGEST_NAMED_WAIT_S, RefusedRows
from harvester.teacher.limiter.sends import Entry, Reception, SendLog
from harvester.teacher.limiter.unrelated_refusals import LEAST_UNRELATED
from harvester.teacher.limiter.window import Window


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is admitted before `until` (monotonic seconds).

    `is_asked` says that the teacher asked for it; otherwise our circuit breaker did.
    """

    until: float = -math.inf
    reason: str = ""
    is_asked: bool = True


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """What becomes of a refused row.

    Attributes:
        wait_s: seconds until the row is tried again; the limiter may make it wait longer.
        is_row_at_fault: the row alone was refused again and again: no further try.
    """

    wait_s: float = 0.0
    is_row_at_fault: bool = False


class Limiter:
    """All limits of one endpoint: a bucket per limit, the window, and pauses.

    Args:
        limits: of the credential; `max_concurrency` is that of this endpoint.
        own: further limits of this endpoint alone.
        part: of the limits of the credential that this endpoint gets at first.

    Attributes:
        buckets: by limit; rates are in units per second.
        learned_rate: requests per second where the teacher states no limit.
        part: of the credential's limits, as the teacher's other addresses use the rest (`credential_parts`).
        share: part of every limit that this harvest may use, as others use the rest (`shared_limits`).
        rate_waits: how long requests waited for the rate, which is when a larger share would be used.
        output_estimate: how many tokens an answer has.
    """

    def __init__(
        self,
        limits: LimitsSection,
        now: float,
        *,
        own: RateLimitsSection | None = None,
        part: float = 1.0,
        deadline_s: float = math.inf,
        patience_s: float = math.inf,
    ) -> None:
        self.window = Window(limits.max_concurrency, deadline_s)
        self.buckets: dict[LimitKey, Bucket] = {}
        self.sends = SendLog()
        self.learned_burst = LearnedBurst()
        self.learned_rate = LearnedRate(self.sends, self.learned_burst, now)
        self.departures = Departures(now)
        self.rate_waits = RateWaits()
        self._rows = RefusedRows(patience_s)
        self._periods = HeaderPeriods()
        # Limits whose period was guessed, and wrongly.
        self._disproved: set[LimitKey] = set()
        self._guessed: dict[tuple[Quantity, float], LimitKey] = {}
        self.output_estimate = OutputEstimate()
        self.part = part
        self.share = 1.0
        self.pause_now = Pause()
        # Units per second, those of the credential times `part`; a limit that a header names never raises
        # these.
        self._configured: dict[LimitKey, float] = {}
        # What headers stated where that is less.
        self._stated: dict[LimitKey, float] = {}
        ours = {key: limit * part for key, limit in configured_limits(limits).items()}
        if own is not None:
            ours |= configured_limits(own, is_own=True)
        for key, limit in ours.items():
            self._configured[key] = limit / key.period_s
            is_daily = key.period_s == DAY_S
            self.buckets[key] = Bucket.daily(limit, now) if is_daily else Bucket(limit / key.period_s, now)

        if self._trusted_rate() < math.inf:
            self.departures.end_burst(now, self.learned_burst.seconds)

    @property
    def paused_until(self) -> float:
        """Monotonic seconds before which nothing is admitted; minus infinity when never paused."""
        return self.pause_now.until

    def wait_s(self, charge: Charge, now: float) -> float:
        """Return seconds until this charge may be admitted: 0 for now, infinity for after an answer."""
        wait = max(0.0, self.paused_until - now, self.learned_rate.probe_wait_s(now))
        if self.window.is_full:
            return math.inf
        self._apply_learned_rate(now)
        for key, bucket in self.buckets.items():
            # Limits on requests are kept at departure. Admission runs ahead, so that a slow commit of the
            # journal leaves no gap.
            ahead_s = BURST_S if key.quantity is Quantity.REQUESTS and key.period_s != DAY_S else 0.0
            wait = max(wait, bucket.wait_s(key.quantity.amount(charge), now) - ahead_s)
        # Those that were admitted before come first. A line of BURST_S is enough.
        rate, burst_s = self._pace(now)
        line_s = self.departures.wait_s(now, rate, burst_s) + self.departures.waiting / rate
        return max(wait, line_s - BURST_S)

    def is_rate_reason(self, wait_s: float, charge: Charge, now: float) -> bool:
        """Whether a wait that `wait_s` or `departure_wait_s` returned would be shorter with a larger share.

        A pause, the window and a limit per hour or day delay a request whatever its share of the rate.
        """
        if not 0 < wait_s < math.inf or self.paused_until > now or self.learned_rate.probe_wait_s(now) > 0:
            return False
        longer = (key for key in self.buckets if key.lasts_longer)
        return all(self.buckets[key].wait_s(key.quantity.amount(charge), now) <= 0 for key in longer)

    def enter(self, charge: Charge, now: float) -> Entry:
        """Take the charge and a place in the window. Call it only after `wait_s` returned 0."""
        self.window.enter()
        self.departures.admitted()
        for key, bucket in self.buckets.items():
            bucket.take(key.quantity.amount(charge))
        return Entry(now, self.window.in_flight)

    def departure_wait_s(self, now: float) -> float:
        """Return seconds until the next admitted request may be sent: 0: now, infinity: after an answer."""
        if self._in_air >= int(self.window.size):  # it shrank after the admission
            return math.inf
        wait = max(0.0, self.paused_until - now, self.learned_rate.probe_wait_s(now))
        return max(wait, self.departures.wait_s(now, *self._pace(now)))

    def departed(self, entry: Entry, now: float) -> None:
        """Note that a request is being sent. Call it only after `departure_wait_s` returned 0."""
        self.departures.departed(now, self._pace(now)[0])
        self.window.departed()
        entry.at, entry.in_flight = now, self._in_air
        self.sends.add(entry)
        self.learned_rate.sent(entry)
        self.learned_burst.sent(now)

    @property
    def _in_air(self) -> int:
        """Requests that were sent and not answered."""
        return self.window.in_flight - self.departures.waiting

    def _pace(self, now: float) -> tuple[float, float]:
        """Requests per second that may depart, and seconds of that which may depart at once.

        Below a cap on requests in flight they depart one by one: a burst that is refused would look like it.
        """
        rate = self._request_rate(now)
        if self.window.spread_rate < rate:
            return self.window.spread_rate, 0.0
        return rate, self.learned_burst.seconds

    def _request_rate(self, now: float) -> float:
        """Requests per second that may be sent, infinity where nothing is known."""
        return min(self._trusted_rate(), self.learned_rate.current(now) or math.inf)

    def leave(self, entry: Entry) -> None:
        """Give the place in the window back; every `enter` needs exactly one `leave`."""
        self.window.leave()
        if not entry.has_departed:
            self.departures.withdrawn()

    def answered(self, key: bytes, entry: Entry, now: float, tokens: int) -> None:
        """Learn from an answer to the row `key`; its place in the window is still taken."""
        self._rows.forget(key)
        self._accepted(entry, now)
        self.window.answered(entry, now, tokens)

    def failed_otherwise(self, entry: Entry, now: float) -> None:
        """Note a failure that is no refusal: the request got through the limits."""
        self.window.stop_ramp()
        self._accepted(entry, now)

    def timed_out(self, entry: Entry, now: float) -> None:
        """Note that an answer did not come in time."""
        self._accepted(entry, now)
        self.window.timed_out(entry)

    def _accepted(self, entry: Entry, now: float) -> None:
        entry.outcome = Reception.ACCEPTED
        self.learned_rate.accepted(entry, now)

    def _disregard(self, entry: Entry) -> None:
        """Take a refusal out of all counts: it was about its row alone."""
        entry.outcome = Reception.DISREGARDED
        self.learned_rate.disregard(entry)

    def overloaded(self, entry: Entry, now: float) -> None:
        """Shrink the window if this refusal for overload (503, 529) is one of several in a row."""
        self.window.stop_ramp()
        self.sends.refused(entry, now)
        if self.sends.refused_in_a_row(now)[0] >= ENOUGH_REFUSALS:
            self.window.cut(entry, now, self._in_air)
        self._is_cap(entry, now)

    def refused(self, key: bytes, entry: Entry, named_wait_s: float | None, now: float) -> RefusedRow:
        """Learn from a refusal (429, or an overload with a wait) of the row `key`.

        Args:
            named_wait_s: the wait that the teacher asked for, None for none.
        """
        self.window.stop_ramp()
        others_accepted = self.sends.others_accepted(entry)
        self._rows.refused(key, now, others_accepted=others_accepted)
        if self._rows.is_at_fault(key, now):
            self._rows.forget(key)
            self._disregard(entry)
            return RefusedRow(is_row_at_fault=True)
        wait_s = self._rows.wait_s(key, named_wait_s)
        if self._rows.is_suspicious(key) and others_accepted:
            self._disregard(entry)
            return RefusedRow(wait_s)
        self.sends.refused(entry, now)
        if self._is_cap(entry, now):
            return RefusedRow(wait_s)
        lesson = self.learned_rate.refused(entry, now, self._trusted_rate())
        if lesson in (Lesson.RATE, Lesson.BURST):
            self._apply_learned_rate(now)
            rate, burst_s = self._pace(now)
            self.departures.end_burst(now + 1 / rate, burst_s)
            for limit in self._request_limits():
                self.buckets[limit].lower_to(0.0)
        everybody_waits = lesson is Lesson.ALL_REFUSED or (
            not others_accepted and named_wait_s is not None and named_wait_s > LONGEST_NAMED_WAIT_S
        )
        if named_wait_s and everybody_waits:
            self.pause(named_wait_s, now, "the teacher's Retry-After")
        return RefusedRow(wait_s)

    def _is_cap(self, entry: Entry, now: float) -> bool:
        """Shrink the window if refusals come from a number in flight on; then the rate is not the reason."""
        level = self.sends.refused_level(self.window.refused_from)
        if level is None:
            return False
        if self.window.keep_below(level):
            self.learned_rate.forget(now)
            self.sends.forget_levels(now)
        return level > int(self.window.size)

    def _request_limits(self) -> list[LimitKey]:
        return [key for key in self.buckets if key.quantity is Quantity.REQUESTS and key.period_s != DAY_S]

    def _trusted_rate(self) -> float:
        """Requests per second that the operator configured or the headers state, infinity for none."""
        rate = math.inf
        for key in self._request_limits():
            if not key.is_learned:
                rate = min(rate, self.buckets[key].rate)
        return rate

    def expected_charge(self, charge: Charge) -> Charge:
        """Return what to reserve: the requested maximum or, if less, what 95 % of the answers used so far."""
        tokens = self.output_estimate.tokens
        if tokens is None or tokens * charge.answers >= charge.output_tokens:
            return charge
        return replace(charge, output_tokens=math.ceil(tokens * charge.answers))

    def settle(self, reserved: Charge, actual: Charge, now: float) -> None:
        """Replace the estimate of an answered request by what the teacher counted."""
        if actual.output_tokens:
            self.output_estimate.answered(math.ceil(actual.output_tokens / actual.answers))
        for key, bucket in self.buckets.items():
            bucket.refill(now)
            bucket.take(key.quantity.amount(actual) - key.quantity.amount(reserved))

    def refund(self, charge: Charge, now: float) -> None:
        """Give a whole charge back: the request was never sent, or was refused before it counted."""
        for key, bucket in self.buckets.items():
            bucket.refill(now)
            bucket.take(-key.quantity.amount(charge))

    def learn_from_headers(self, headers: Mapping[str, str], now: float) -> None:
        """Take limits from a reply's headers. A configured limit stays the upper bound.

        A limit per hour or more sets no rate; when it is used up, it pauses until its reset, or for the wait
        that the same reply names. A period that does not stand in the headers is dropped for good once more
        was accepted than it would allow.
        """
        for parsed in parse_rate_headers(headers):
            header = self._periods.decide(parsed, now)
            if header is None or header.key in self._disproved:
                continue
            if header.key.period_s >= HOUR_S:
                if header.remaining is not None and header.remaining < 1 and header.reset_s:
                    named_s = retry_after_s(headers)
                    self.pause(header.reset_s if named_s is None else named_s, now, header.key.label)
                continue
            if not header.is_stated:
                guess = self._guessed.setdefault((header.key.quantity, header.limit), header.key)
                if guess != header.key:  # the same limit in two periods: neither is known
                    self._disprove(guess, now)
                if guess != header.key or self._is_disproved(header, now):
                    self._disprove(header.key, now)
                    continue
            self._stated[header.key] = header.rate
            self._set_bucket(header.key, self._rate_of(header.key), now)

    def _disprove(self, key: LimitKey, now: float) -> None:
        """Drop a limit whose period was guessed wrongly; what is configured stays."""
        self._disproved.add(key)
        self._stated.pop(key, None)
        if key in self._configured:
            self._set_bucket(key, self._configured[key], now)
        else:
            self.buckets.pop(key, None)

    def _is_disproved(self, header: RateHeader, now: float) -> bool:
        """Whether more requests were accepted in the period than the limit allows."""
        if header.key.quantity is not Quantity.REQUESTS:
            return False
        return self.sends.answered_since(now - header.key.period_s) > 1.1 * header.limit + 3

    def set_rate(self, key: LimitKey, rate: float | None, now: float) -> None:
        """Change a limit of the credential from now on, in units per second; None removes it.

        Args:
            rate: of the whole limit, of which this endpoint gets its part.
        """
        self._stated.pop(key, None)
        if rate is None:
            self._configured.pop(key, None)
            self.buckets.pop(key, None)
            return
        self._configured[key] = rate * self.part
        self._set_bucket(key, rate * self.part, now)

    def _rate_of(self, key: LimitKey) -> float:
        """Units per second of a limit that is configured, stated by headers, or both; else infinity."""
        return min(self._configured.get(key, math.inf), self._stated.get(key, math.inf))

    @property
    def credential_limits(self) -> dict[LimitKey, float]:
        """The limits of the credential, in units per second, all parts together."""
        return {key: rate / self.part for key, rate in self._configured.items() if not key.is_own}

    @property
    def own_limits(self) -> dict[LimitKey, float]:
        """What bounds this address alone, in units per second, under the key of the credential's limit."""
        own = {replace(key, is_own=False): rate for key, rate in self._configured.items() if key.is_own}
        for key, rate in self._stated.items():
            own[key] = min(rate, own.get(key, math.inf))
        return own

    def set_part(self, part: float, levels: Mapping[LimitKey, float], now: float) -> None:
        """Use this part of the credential's limits from now on.

        Args:
            levels: what each of their buckets holds then, as far as `part` has room for it.
        """
        ratio = part / self.part
        self.part = part
        before = self._trusted_rate()
        for key in self.credential_limits:
            rate = self._rate_of(key)
            self._configured[key] *= ratio
            bucket = self.buckets[key]
            bucket.refill(now)
            bucket.resize(self._rate_of(key) / rate, levels[key])
        after = self._trusted_rate()
        if after < math.inf:
            burst_s = self.learned_burst.seconds
            self.departures.scale(after / before, max(now, self.paused_until), burst_s)

    def set_share(self, share: float, now: float) -> None:
        """Use this part of every limit from now on."""
        ratio = share / self.share
        if ratio == 1:
            return
        self.share = share
        self.departures.scale(ratio, max(now, self.paused_until), self.learned_burst.seconds)
        for key, bucket in self.buckets.items():
            if not key.is_learned:
                bucket.scale(ratio, now)
        self.learned_rate.scale(ratio)
        self._apply_learned_rate(now)

    def adopt_rate(self, rate: float, limit: float, learned_at: float, now: float, *, is_new: bool) -> None:
        """Go on from what another harvest learned, or follow how its rate has grown since."""
        if is_new:
            self.learned_rate.adopt(rate, limit, learned_at, now)
        else:
            self.learned_rate.follow(rate, now)
        self._apply_learned_rate(now)

    def _set_bucket(self, key: LimitKey, rate: float, now: float) -> None:
        """Set the rate of a limit, in units per second: the whole one, or of LEARNED_REQUESTS our share."""
        if not key.is_learned:
            rate *= self.share
        bucket = self.buckets.get(key)
        if bucket is None:
            self.buckets[key] = Bucket(rate, now)
        elif bucket.rate != rate:
            bucket.set_rate(rate, now)

    def _apply_learned_rate(self, now: float) -> None:
        rate = self.learned_rate.current(now)
        if rate is not None:
            self._set_bucket(LEARNED_REQUESTS, rate, now)
        elif LEARNED_REQUESTS in self.buckets:
            del self.buckets[LEARNED_REQUESTS]

    def pause(self, seconds: float, now: float, reason: str, *, is_asked: bool = True) -> None:
        """Admit nothing for `seconds`; a shorter pause than the current one changes nothing.

        The window keeps its size. The buckets save nothing up, so what waited leaves one by one.

        Args:
            reason: for `waiting_reason`.
            is_asked: whether the teacher asked for it; see `Pause`.
        """
        until = now + seconds
        if until <= self.paused_until:
            return
        self.pause_now = Pause(until, reason, is_asked)
        self.end_bursts(now, until)

    def end_bursts(self, now: float, until: float) -> None:
        """Save nothing up before `until`, so that what waits then leaves one by one."""
        self.departures.end_burst(until, self.learned_burst.seconds)
        for bucket in self.buckets.values():
            bucket.freeze(now, until)

    def saved(self) -> dict[str, Any]:
        """Return what was learned, as JSON values, for `resume` in a later process."""
        learned = self.learned_rate.saved()
        if learned["rate"] is not None:
            learned["rate"] /= self.share
        return {
            **learned,
            "burst_s": self.learned_burst.seconds,
            "window": self.window.saved(),
        }

    def resume(self, saved: Mapping[str, Any], now: float, *, is_recent: bool) -> None:
        """Continue from what an earlier process learned, without a burst.

        Args:
            is_recent: whether the numbers in flight may still hold. A rate grows by itself where it no longer
                holds; it is kept however old it is.
        """
        self.learned_rate.resume(saved, now)
        self.learned_burst.resume(float(saved.get("burst_s") or FIRST_BURST_S))
        if is_recent:
            self.window.resume(saved.get("window") or {}, now)
        if self._request_rate(now) < math.inf:
            self.departures.end_burst(now, self.learned_burst.seconds)

    @property
    def requests_per_minute(self) -> float:
        """The limits per minute in force, infinity where none is known; a rate in another period is none."""
        keys = (REQUESTS_PER_MINUTE, replace(REQUESTS_PER_MINUTE, is_own=True), LEARNED_REQUESTS)
        return min((60 * self.buckets[key].rate for key in keys if key in self.buckets), default=math.inf)

    @property
    def learned(self) -> list[str]:
        """What was learned about this endpoint, as clauses for the operator; empty where nothing was."""
        learned, burst, window = self.learned_rate, self.learned_burst, self.window
        clauses = []
        if window.ceiling_note:
            clauses.append(f"{int(window.ceiling):,} in flight{window.ceiling_note}")
        if window.works_on is not None:
            clauses.append(f"the server works on {window.works_on:,} at once")
        if window.refused_from is not None:
            clauses.append(f"it refuses from {window.refused_from:,} in flight on")
        trusted = self._trusted_rate()
        rate = min(trusted, learned.rate or math.inf)
        if learned.rate is not None and learned.rate < trusted:
            clauses.append(f"it accepts about {60 * learned.rate / self.share:,.0f} requests/min")
        if rate < math.inf and burst.seconds < FIRST_BURST_S:
            clauses.append(f"no more than {max(1, round(burst.seconds * rate)):,} of them at a time")
        if learned.refused_for_s:
            clauses.append(f"after too many it refuses everything, last for {learned.refused_for_s:,.1f} s")
        if learned.unrelated >= LEAST_UNRELATED:
            clauses.append(f"it refuses {learned.unrelated:.1%} whatever the rate")
        return clauses

    def waiting_reason(self, charge: Charge, now: float) -> str:
        """Return the limit that delays this charge now, as in "tokens per minute, 41 s"; "" for none."""
        waits = {
            key.label: bucket.wait_s(key.quantity.amount(charge), now) for key, bucket in self.buckets.items()
        }
        waits["refused without a time"] = self.learned_rate.probe_wait_s(now)
        waits[self.pause_now.reason or "pause"] = max(0.0, self.paused_until - now)
        label = max(waits, key=lambda label: waits[label])
        if waits[label] > 0:
            return f"{label}, {waits[label]:.0f} s" if waits[label] >= 1 else label
        window = self.window
        return f"window of {int(window.size)} in flight{window.note}" if window.is_full else ""
