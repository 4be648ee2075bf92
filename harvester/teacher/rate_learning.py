"""Learn a request rate, and how large a burst may be, from refusals (HTTP 429). Pure.

A teacher that names no limit has three unknowns: the rate it sustains, the burst it admits at once, and the
length of the window in which it counts. They are told apart like this:

- Some of the requests of a moment are refused, others accepted: the rate is too high. The rate falls to what
  was accepted, and a bisection between the rate that was accepted and the one that was refused finds the
  limit.
- We sent no faster than a rate that we trust (configured, or sustained for seconds), but several at once: the
  burst is too large, and the rate stays.
- Everything is refused for a while: the teacher counts in windows. Single probes find the end of the window;
  what was accepted, divided by the whole time including the wait, is the rate.
- Refusals go on at the same share although the rate was lowered: they don't depend on our rate. The old rate
  comes back, and only a larger share counts from then on. Among n sends chance scatters a share u by
  sqrt(u / n), so a surplus shows only after many, and meanwhile the rate grows (the bounds that hold are in
  `tests/harvester/teacher/test_simulated_servers.py`).

When the limit is found, the rate grows slowly at first and then ever faster, as CUBIC grows a congestion
window (RFC 9438): it stays near a limit that has not changed, and finds one that was raised. Where little is
sent, it grows more slowly, so that looking for more costs few refusals.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

# After refusals the rate is this share of what was accepted.
CUT_TO = 0.98
# A decision that some refusals mean the rate lowers it at least to this share.
LEAST_CUT = 0.95
# A rate that was sustained for SUSTAINED_S is lowered by one decision to no less than this share of itself.
SUSTAINED_S = 10.0
LEAST_SUSTAINED_CUT = 0.7
# Relative growth per second is GROWTH_PER_S + ACCELERATION * t**2, t seconds after a cut: 4 % in total after
# 3 s, twofold after 9 s. The clock of growth runs slower where fewer than these are sent in GROWTH_UNIT_S:
GROWTH_PER_S = 0.005
ACCELERATION = 0.003
GROWTH_UNIT_S = 3.2
SENDS_PER_UNIT = 300
SENDS_PER_FIRST_UNIT = 40
# The rate grows only while this share of it is sent, on an average over FLOW_S (as in RFC 7661).
FLOW_S = 3.0
USED_SHARE = 0.5
# The share refused is taken over the last second, or as long as LEAST_SENDS take.
HORIZON_S = 1.0
LEAST_SENDS = 40
LONGEST_HORIZON_S = 30.0
# The rate of sends is measured over this span, so that a ramp does not count as the rate.
RATE_SPAN_S = 0.25
# A single refusal lowers a rate that was found before to this share. Steps with fewer than CLEAN_SENDS
# between them belong together; more than MOST_STEPS of them call for a trial.
STEP_BACK = 0.98
CLEAN_SENDS = 100
MOST_STEPS = 2
# Single refusals lower the rate no further than to this share of what it was.
LEAST_STEPPED = 0.9
# So many refusals make a decision; with fewer, nothing is known yet.
ENOUGH_REFUSALS = 3
# In a trial so many requests are sent at this share of the lower rate: if refusals go on, the rate is not the
# reason.
TRIAL_SENDS = 40
TRIAL_RATE = 0.75
# Where a trial showed that there are none, decisions go without one until so many in a row did not help.
MOST_UNTRIED = 3
# Weight of the sends in trials before, so that also a small share that is refused whatever the rate shows.
TRIED_MEMORY = 0.75
# A trial with a larger share of refusals, after so many sends, ends at once: the rate is still too high.
LEAST_TRIAL_SENDS = 10
MOST_UNRELATED = 0.25
# A smaller share of unrelated refusals is none.
LEAST_UNRELATED = 0.005
# The bisection ends when the refused rate is this much above the accepted one.
BRACKET = 1.06
# Seconds of the rate that may be sent at once, at first and at least.
FIRST_BURST_S = 0.1
LEAST_BURST_S = 0.004
# Sends within this span are one clump.
CLUMP_S = 0.05
# The rate accepted before everything was refused is taken over at least so many requests.
LEAST_ACCEPTED = 20
# ... and over a span so many times as long as everything was refused.
LONG_SPAN = 10.0
# While everything is refused: the first pause between two probes, its growth while it is short, and how much
# longer the whole wait may get by one more.
FIRST_PROBE_S = 0.02
LATER_PROBE_SHARE = 0.4
LONGEST_PROBE_S = 60.0
# Everything refused for this long, and for this share of the time since the last such end: a window of time.
WINDOW_S = 0.3
WINDOW_SHARE = 0.1
# So many refusals speak for a limit on the number in flight, if of the last LEVEL_SENDS at most this share
# was accepted at that number or above, and at most this share was refused below it.
LEAST_REFUSED = 3
LEVEL_SENDS = 200
MIXED_SHARE = 0.1
# Sends this close to another one are compared with it.
NEAR_S = 1.0
# ... or, where there are none, the last few within this time.
FAR_S = 30.0
FEW_SENDS = 6
_LOG_SENDS = 20_000


class Reception(Enum):
    """What is known of one send."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    DISREGARDED = "disregarded"


@dataclass(slots=True, eq=False)
class Entry:
    """One admitted request: when it was sent, and how many were in flight then, itself included.

    Until it is sent, both hold for its admission.
    """

    at: float
    in_flight: int = 1
    has_departed: bool = False
    outcome: Reception = Reception.PENDING


class Lesson(Enum):
    """What a refusal taught."""

    NOTHING = "nothing"
    RATE = "rate"
    BURST = "burst"
    UNRELATED = "unrelated"
    ALL_REFUSED = "all refused"


class _Trial(NamedTuple):
    rate: float  # afterwards, if the rate was the reason
    restore: float | None  # afterwards, if it was not
    share: float  # refused before


class _Span(NamedTuple):
    sends: int
    refused: int
    seconds: float


class LearnedRate:
    """A learned rate and burst. Times are monotonic seconds.

    Attributes:
        rate: requests per second that we send at most, None until refusals set one.
        burst_s: seconds of a rate that may be sent at once.
        unrelated: share of requests that is refused whatever the rate.
        refused_for_s: how long everything was refused when the teacher's window of time was last used up, 0
            where that has not happened.
    """

    def __init__(self, now: float) -> None:
        self.rate: float | None = None
        self.burst_s = FIRST_BURST_S
        self.unrelated = 0.0
        self.refused_for_s = 0.0
        self._log: deque[Entry] = deque(maxlen=_LOG_SENDS)
        # Only sends after this count for the next decision.
        self._decided_at = -math.inf
        self._cut_at = now
        self._grown_at = now
        self._refusal_delay_s = 0.0
        # The lowest rate that met refusals of late, and the rate and share before the last decision.
        self._too_high = math.inf
        self._trial: _Trial | None = None
        # Sends and refusals in trials, the older ones weighing half as much each time.
        self._tried_sends = 0.0
        self._tried_refusals = 0.0
        self._is_searching = False
        self._untried = 0
        self._is_confirmed = False
        # The highest rate since the last decision by several refusals.
        self._peak = 0.0
        # Small steps down, one soon after the other: how many, sends meanwhile, and the rate before the
        # first.
        self._steps = 0
        self._sends_in_steps = 0
        self._rate_before_steps = math.inf
        # While everything is refused: since when, the last refused send, and the probe that is out.
        self._refused_since: float | None = None
        self._last_refused_at = -math.inf
        self._probe: Entry | None = None
        self._pause_s = FIRST_PROBE_S
        self._cycle_at: float | None = None
        # Only sends after this say something about a limit on the number in flight.
        self._level_at = -math.inf
        # Sends per second of late, and when that was.
        self._flow = 0.0
        self._flow_at = now

    # What happens

    def sent(self, entry: Entry) -> None:
        """Record a send."""
        if self._cycle_at is None:
            self._cycle_at = entry.at
        self._log.append(entry)
        self._flow = self._flow_now(entry.at) + 1 / FLOW_S
        self._flow_at = entry.at
        if self._refused_since is not None:
            self._probe = entry

    def accepted(self, entry: Entry, now: float) -> None:
        """Record that this request was answered, or at least not refused."""
        entry.outcome = Reception.ACCEPTED
        if self._refused_since is not None and entry.at >= self._last_refused_at:
            self._end_of_refusal(entry.at, now)

    def disregard(self, entry: Entry) -> None:
        """Take a refusal out of all counts: it was about its row alone."""
        entry.outcome = Reception.DISREGARDED
        if entry is self._probe:
            self._probe = None

    def others_accepted(self, entry: Entry) -> bool:
        """Whether requests that were sent at about the same time as this one were mostly accepted."""
        near = [other for other in self._recent(entry.at - NEAR_S) if other is not entry]
        if not near:  # little is sent: the last few others
            near = [other for other in self._recent(entry.at - FAR_S)[:FEW_SENDS] if other is not entry]
        outcomes = [other.outcome for other in near if other.at <= entry.at + NEAR_S]
        accepted, refused = outcomes.count(Reception.ACCEPTED), outcomes.count(Reception.REFUSED)
        return accepted > 0 and refused <= accepted

    def accepted_since(self, since: float) -> int:
        """How many of the requests sent after `since` are answered."""
        return sum(entry.outcome is Reception.ACCEPTED for entry in self._recent(since))

    def refused_in_a_row(self, entry: Entry) -> int:
        """Mark this request as refused; return how many of the last sends were refused in a row."""
        entry.outcome = Reception.REFUSED
        run = 0
        for other in reversed(self._log):
            if other.outcome is not Reception.REFUSED:
                break
            run += 1
        return run

    def refused(self, entry: Entry, now: float, trusted: float) -> Lesson:
        """Learn from a refusal.

        Args:
            trusted: the configured requests per second, infinity where none is.
        """
        entry.outcome = Reception.REFUSED
        self._refusal_delay_s += 0.3 * (now - entry.at - self._refusal_delay_s)
        if self._refused_since is not None:
            if entry.at >= self._last_refused_at:
                self._last_refused_at = entry.at
                if entry is self._probe:
                    self._probe = None
                    self._pause_s = self._next_pause_s(now)
            return Lesson.ALL_REFUSED
        if entry.at <= self._decided_at:
            return Lesson.NOTHING
        return Lesson.ALL_REFUSED if self._all_refused(now) else self._decide(entry, now, trusted)

    def forget_rate(self, now: float) -> None:
        """Forget the learned rate: the refusals so far had another reason, a number in flight."""
        self._level_at = now
        self._trial, self._is_searching, self._too_high = None, False, math.inf
        self._refused_since = self._probe = None
        self._set(None, now)

    def refused_at_level(self, entry: Entry) -> int | None:
        """Mark this request as refused; return the number in flight that seems to be the limit, or None.

        That is a number from which on nearly every request is refused, and below which hardly any. A limit on
        the rate refuses at the same numbers at which it accepts.
        """
        entry.outcome = Reception.REFUSED
        last = self._recent(self._level_at)[:LEVEL_SENDS]
        last.sort(key=lambda other: other.in_flight)
        total = sum(other.outcome is Reception.REFUSED for other in last)
        refused_below = 0
        for below, other in enumerate(last):
            if other.outcome is not Reception.REFUSED:
                continue
            refused_above = total - refused_below
            if (
                refused_above >= LEAST_REFUSED
                and refused_above >= (1 - MIXED_SHARE) * (len(last) - below)
                and below > refused_below / MIXED_SHARE
            ):
                return other.in_flight
            refused_below += 1
        return None

    # What follows from it

    @property
    def is_refused_wholly(self) -> bool:
        """Whether everything is refused now, so that only single probes are sent."""
        return self._refused_since is not None

    def probe_wait_s(self, now: float) -> float:
        """While everything is refused: seconds until the next probe may be sent."""
        if self._refused_since is None:
            return 0.0
        if self._probe is not None:
            # A probe that was not refused as quickly as the others is on its way to an answer.
            verdict_at = self._probe.at + 2 * self._refusal_delay_s + 0.02
            if now < verdict_at:
                return verdict_at - now
            self._end_of_refusal(self._probe.at, now)
            return 0.0
        return max(0.0, self._last_refused_at + self._pause_s - now)

    def current(self, now: float) -> float | None:
        """Let the rate grow up to `now` and return it."""
        if self.rate is None or now <= self._grown_at:
            return self.rate
        if self._trial is not None:
            self._judge_trial(self._trial, now)
            return self.rate
        if self._is_searching:
            self._search(now)
        if self._flow_now(now) < USED_SHARE * self.rate and self.rate > 1 / FLOW_S:
            # Something else holds the requests back, so nothing would show that the rate is too high.
            self._cut_at += now - self._grown_at
            self._grown_at = now
            return self.rate
        sends = SENDS_PER_UNIT if self._is_confirmed else SENDS_PER_FIRST_UNIT
        slower = GROWTH_UNIT_S / max(GROWTH_UNIT_S, sends / self.rate)
        since, until = (self._grown_at - self._cut_at) * slower, (now - self._cut_at) * slower
        # The integral of the growth per second from `since` to `until`.
        step = GROWTH_PER_S * (until - since) + ACCELERATION * (until**3 - since**3) / 3
        self.rate *= 1 + min(max(step, 0.0), 1.0)
        self._grown_at = now
        return self.rate

    def _flow_now(self, now: float) -> float:
        return self._flow * math.exp(-max(0.0, now - self._flow_at) / FLOW_S)

    def saved(self) -> dict[str, float | None]:
        """Return what was learned, as JSON values, for `resume` in a later process."""
        return {
            "rate": self.rate,
            "burst_s": self.burst_s,
            "unrelated": self.unrelated,
            "refused_for_s": self.refused_for_s,
        }

    def resume(self, saved: Mapping[str, Any], now: float) -> None:
        """Continue from what an earlier process learned."""
        self.burst_s = float(saved.get("burst_s") or self.burst_s)
        self.unrelated = float(saved.get("unrelated") or 0.0)
        self.refused_for_s = float(saved.get("refused_for_s") or 0.0)
        if saved.get("rate"):
            self._set(float(saved["rate"]), now)
            self._is_confirmed = True

    # Decisions

    def _set(self, rate: float | None, now: float) -> None:
        self.rate = rate
        self._decided_at = self._cut_at = self._grown_at = now

    def _decide(self, entry: Entry, now: float, trusted: float) -> Lesson:
        cap = min(trusted, self.rate or math.inf)
        horizon_s = max(HORIZON_S, min(LONGEST_HORIZON_S, LEAST_SENDS / (self.rate or math.inf)))
        span = self._span(max(self._decided_at, now - horizon_s), now)
        share = self._share(span)
        if self._trial is not None and (span.sends < LEAST_TRIAL_SENDS or share <= MOST_UNRELATED):
            return Lesson.NOTHING
        if span.refused < ENOUGH_REFUSALS or share <= 0:
            return self._step_back(now) if self.unrelated < LEAST_UNRELATED else Lesson.NOTHING
        sent_per_s = self._sent_per_s(now)
        clump = sum(entry.at - CLUMP_S < other.at <= entry.at for other in self._recent(entry.at - CLUMP_S))
        is_clump = clump > 1.5 * CLUMP_S * min(cap, sent_per_s) + 1.5
        if sent_per_s <= 1.05 * cap < math.inf and is_clump and self.burst_s > LEAST_BURST_S:
            self.burst_s /= 2
            self._decided_at = now
            return Lesson.BURST
        self._lower(sent_per_s, share, cap, now)
        return Lesson.RATE

    def _share(self, span: _Span) -> float:
        """Share of a span that was refused beyond the unrelated refusals, 0 where that may be chance."""
        expected = self.unrelated * span.sends
        if span.refused <= expected + 2.5 * math.sqrt(expected) + (1 if expected else 0):
            return 0.0
        return (span.refused / span.sends - self.unrelated) / (1 - self.unrelated)

    def _step_back(self, now: float) -> Lesson:
        """Lower a rate that was found before by a little; make a trial if that does not help."""
        if self.rate is None or not self._is_confirmed or self._trial is not None:
            return Lesson.NOTHING
        self._peak = max(self._peak, self.rate)
        if self.rate < LEAST_STEPPED * self._peak:
            return Lesson.NOTHING
        sends = self._span(self._decided_at, now).sends
        if sends >= CLEAN_SENDS or not self._steps:
            self._steps, self._sends_in_steps, self._rate_before_steps = 0, 0, self.rate
        self._too_high = min(self._too_high, self.rate)
        self._steps += 1
        self._sends_in_steps += sends
        if self._steps > MOST_STEPS:
            share = min(0.9, self._steps / self._sends_in_steps)
            self._steps = 0
            self._try_lower(LEAST_CUT * self.rate, self._rate_before_steps, share, now)
        else:
            self._set(STEP_BACK * self.rate, now)
        return Lesson.RATE

    def _lower(self, sent_per_s: float, share: float, cap: float, now: float) -> None:
        before = self.rate
        if self._trial is not None:  # even the lower rate was too high
            before = self._trial.restore
        sent_per_s = min(sent_per_s, cap)
        rate = sent_per_s * min(LEAST_CUT, CUT_TO * (1 - min(share, 0.9)))
        is_sustained = self.rate is not None and now - self._cut_at >= SUSTAINED_S and share < 0.5
        if self.rate is not None and is_sustained:
            rate = max(rate, LEAST_SUSTAINED_CUT * self.rate)
        self._too_high = sent_per_s
        self._peak = rate
        self._try_lower(rate, before, share, now)

    def _try_lower(self, rate: float, restore: float | None, share: float, now: float) -> None:
        """Send more slowly still for a moment: do the refusals end? Seldom again where they did end."""
        if (
            self._tried_sends >= TRIAL_SENDS
            and self.unrelated < LEAST_UNRELATED
            and self._untried < MOST_UNTRIED
        ):
            self._untried += 1
            self._trial, self._is_searching = None, True
            self._set(rate, now)
            return
        self._untried = 0
        self._trial = _Trial(rate, restore, share)
        self._set(TRIAL_RATE * rate, now)

    def _judge_trial(self, trial: _Trial, now: float) -> None:
        """After enough sends at the lower rate: was the rate the reason?"""
        span = self._span(self._decided_at, now)
        if span.sends < TRIAL_SENDS:
            return
        if span.refused > MOST_UNRELATED * span.sends:
            self._lower(self._sent_per_s(now), span.refused / span.sends, self.rate or math.inf, now)
            return
        self._trial = None
        self._tried_sends = TRIED_MEMORY * self._tried_sends + span.sends
        self._tried_refusals = TRIED_MEMORY * self._tried_refusals + span.refused
        share = self._tried_refusals / self._tried_sends
        self.unrelated = share if self._tried_refusals > 1 or self.unrelated else 0.0
        if self.unrelated and trial.share < 2 * self.unrelated + 0.05:
            self._too_high = math.inf
            self._set(trial.restore, now)
        else:
            self._is_searching = True
            self._set(trial.rate, now)

    def _search(self, now: float) -> None:
        """Raise a rate that is accepted half way towards the one that was refused, until they are close."""
        assert self.rate is not None
        span = self._span(self._decided_at, now)
        if span.sends < TRIAL_SENDS or (span.refused and self._share(span) > 0):
            return
        if span.sends / span.seconds < 0.8 * self.rate:
            return  # the rate was not tried
        if self._too_high > BRACKET * self.rate:
            self._set(math.sqrt(self.rate * self._too_high), now)
            return
        self._is_searching = False
        self._is_confirmed = True
        self._untried = 0

    def _all_refused(self, now: float) -> bool:
        """Whether the last sends were refused one after the other; then only probes are sent."""
        run = 0
        for entry in reversed(self._log):
            if entry.outcome is not Reception.REFUSED:
                break
            run += 1
            first_at = entry.at
        if run < ENOUGH_REFUSALS or self.unrelated**run > 1e-4:
            return False
        self._refused_since = first_at
        self._last_refused_at = self._log[-1].at
        self._probe = None
        self._pause_s = max(FIRST_PROBE_S, 0.5 / (self.rate or math.inf))
        return True

    def _next_pause_s(self, now: float) -> float:
        waited = now - (self._refused_since or now)
        return min(
            LONGEST_PROBE_S,
            max(FIRST_PROBE_S, 2 * self._pause_s if waited < 0.3 else LATER_PROBE_SHARE * waited),
        )

    def _end_of_refusal(self, accepted_at: float, now: float) -> None:
        """Set the rate to what was accepted over the whole time, from the last such end to this one."""
        since, last_refused = self._refused_since or now, self._last_refused_at
        self._refused_since = self._probe = None
        refused_s = accepted_at - since
        cycle_at = self._cycle_at if self._cycle_at is not None else since
        if refused_s >= WINDOW_S and refused_s >= WINDOW_SHARE * (accepted_at - cycle_at):
            self.refused_for_s = refused_s
            begun_at, self._cycle_at = cycle_at, accepted_at
            sent_per_s = 0.0
            accepted = self._accepted_between(begun_at, since)
        else:
            sent_per_s = self._sent_per_s(since) if self.rate is None else 0.0
            begun_at, accepted = self._begin_of(since, max(RATE_SPAN_S, LONG_SPAN * refused_s), cycle_at)
        if accepted == 0:  # refused from the start: that says nothing about the rate
            self._decided_at = now
            return
        shortest, longest = max(last_refused - begun_at, 0.05), max(accepted_at - begun_at, 0.05)
        rate = accepted / math.sqrt(shortest * longest)
        if self.rate is not None:
            rate = min(rate, self.rate)
        self._too_high = max(rate, accepted / shortest, sent_per_s)
        if self.rate is not None and begun_at != cycle_at:
            span = self._span(now - HORIZON_S, now)
            self._try_lower(CUT_TO * rate, self.rate, span.refused / span.sends, now)
            return
        self._trial = None
        self._is_searching = True
        self._set(CUT_TO * rate, now)

    def _accepted_between(self, since: float, until: float) -> int:
        return sum(
            entry.outcome is not Reception.REFUSED for entry in self._recent(since - 1e-9) if entry.at < until
        )

    def _begin_of(self, until: float, span_s: float, earliest: float) -> tuple[float, int]:
        """Begin of the span before `until` over which the accepted rate is taken, and the number accepted.

        Args:
            span_s: length of the span; longer if it holds fewer than LEAST_ACCEPTED, but not beyond the last
                decision.
            earliest: the span begins no earlier.
        """
        accepted, begun_at, in_run = 0, until, True
        for entry in reversed(self._log):
            if entry.outcome is Reception.REFUSED or (in_run and entry.at > until):
                continue
            in_run = False
            is_long = until - entry.at > span_s
            if entry.at < earliest or (
                is_long and (accepted >= LEAST_ACCEPTED or entry.at <= self._decided_at)
            ):
                break
            accepted, begun_at = accepted + 1, entry.at
        return begun_at, accepted

    # Counts

    def _recent(self, since: float) -> list[Entry]:
        """Sends after `since`, newest first."""
        found = []
        for entry in reversed(self._log):
            if entry.at <= since:
                break
            found.append(entry)
        return found

    def _span(self, since: float, now: float) -> _Span:
        """Sends after `since` that are old enough to have been refused if they were to be."""
        until = now - 0.9 * self._refusal_delay_s
        found = [
            entry for entry in self._recent(since) if entry.at <= until or entry.outcome is Reception.REFUSED
        ]
        if not found:
            return _Span(1, 0, HORIZON_S)
        refused = sum(entry.outcome is Reception.REFUSED for entry in found)
        return _Span(len(found), refused, max(1e-3, found[0].at - found[-1].at))

    def _sent_per_s(self, now: float) -> float:
        """Sends per second of late: over RATE_SPAN_S, or as long as a few sends took."""
        recent = self._recent(now - RATE_SPAN_S)
        if len(recent) < 10:
            recent = [entry for entry, _ in zip(reversed(self._log), range(10), strict=False)]
        span_s = max(now - recent[-1].at, 0.02)
        return len(recent) / span_s
