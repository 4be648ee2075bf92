"""Learn from refusals (HTTP 429) how many requests per second a teacher accepts. Pure.

The law behind it: a limit grants an allowance at its rate. Between two moments at which the allowance is used
up, as many requests are accepted as were granted meanwhile. That holds for token buckets of any size and for
fixed and sliding windows, so it needs no guess of burst or window length.

- A refusal is a moment at which the allowance may be used up. Whether more are refused than usual is decided
  by a cumulative sum over the sends (`refusal_surplus`).
- Then the rate becomes a little less than what was accepted per second since the allowance was last used up,
  corrected by what the last few refusals prove: between the first and the last of them the allowance stayed
  empty, so what was accepted there is the rate, give or take one request.
- After that the rate grows: the faster the less is known, and slowly where much is known. Long after a
  decision it grows ever faster, as CUBIC grows a congestion window (RFC 9438), to find a limit that was
  raised.
- A few refusals among many accepted requests may not depend on the rate at all. Where it is not known yet, or
  where a limit that was found seems to fall, a short trial at a higher rate decides that (`rate_trial`). If
  the share refused stays the same, it counts as normal from then on (`unrelated_refusals`).
- Where everything is refused for a while, single probes find the end of that (`full_refusal`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from harvester.teacher.limiter.full_refusal import FullRefusal
from harvester.teacher.limiter.learned_burst import LearnedBurst
from harvester.teacher.limiter.rate_trial import TRIAL_SPEED_UP, RateTrial, TrialVerdict
from harvester.teacher.limiter.refusal_surplus import RefusalSurplus
from harvester.teacher.limiter.send_flow import FLOW_S, SendFlow
from harvester.teacher.limiter.sends import Entry, SendLog
from harvester.teacher.limiter.unrelated_refusals import UnrelatedRefusals

# After a decision the rate is this share of what was found.
CUT_TO = 0.97
# Lowest learned rate, in requests per second.
LEAST_RATE = 1 / 3600
# An estimate from fewer accepted requests waits for more, up to MOST_AWAITED sends.
ENOUGH_ACCEPTED = 4
ENOUGH_MOMENTS = 2
DISPROVED = 0.8
MOST_AWAITED = 12
# What was accepted since the allowance was last used up is taken over this time and this many sends at most,
# or LOOKBACK_WAITS times as long as everything was refused.
LOOKBACK_S = 10.0
LOOKBACK_SENDS = 300
LOOKBACK_WAITS = 3.0
MOST_MOMENTS = 50
# How many accepted requests an estimate counts for that the operator configured or an earlier process found.
TRUSTED_SUPPORT = 50.0
# Growth of the rate per send is GROWTH / n**2 after an estimate from n accepted requests, at most as given:
# its error of 1 / n is made up for within n sends.
GROWTH = 1 / 3
FIRST_GROWTH = 1.0
SWEEP = 4.0
MOST_GROWTH = 1 / 6
# Growth of the rate per second is GROWTH_PER_S + ACCELERATION * t**2, t seconds after a decision: 4 % in
# total after 3 s, twofold after 9 s. The clock of this growth runs slower where fewer than SENDS_PER_UNIT are
# sent in GROWTH_UNIT_S, and where unrelated refusals hide a surplus.
GROWTH_PER_S = 0.005
ACCELERATION = 0.003
GROWTH_UNIT_S = 3.2
SENDS_PER_UNIT = 300
# ... or this many, until two estimates in a row agreed to within AGREEMENT.
SENDS_PER_FIRST_UNIT = 60
AGREEMENT = 0.15
UNRELATED_SLOWDOWN = 10.0
# The rate grows only while this share of it is sent (as in RFC 7661).
USED_SHARE = 0.5
# A surplus is unexpected at less than this share of the limit that was found from at least this many accepted
# requests, or if the limit would fall to less than this share.
EXPECTED_SHARE = 0.995
FALLEN = 0.985
PRECISE_SUPPORT = 20
# A surplus of at least this share, among at least this many sends, needs no trial: the rate is the reason.
DENSE_SHARE = 0.2
DENSE_SENDS = 10
# The least share that is taken as refused before a trial.
LEAST_TRIAL_SHARE = 0.01
# Growth of the rate per send where a trial showed that the rate was not the reason.
GROWTH_AFTER_TRIAL = 1 / 60
# Below this share of the limit found, refusals count as unrelated where there are such.
QUIET_SHARE = 0.985
# Everything is refused when this many sends in a row are, and chance would do that less often than given.
ENOUGH_REFUSALS = 3
LEAST_CHANCE = 1e-4
# Everything refused for this long, and for this share of the time since the last such end: a window of time.
WINDOW_S = 0.3
WINDOW_SHARE = 0.1
PERIOD_MEMORY = 0.9
# What the first such time shows counts for this many accepted requests.
FIRST_SUPPORT = 4.0
# A clump of sends: this many times as many within CLUMP_S as the rate would send, and one or two.
CLUMP_S = 0.05
CLUMP = 1.5
# A rate of sends within this factor of the trusted one is no faster.
NO_FASTER = 1.05
# Refusals are put down to standstills while at most this share of the last sends was refused.
MOST_AFTER_STANDSTILLS = 0.2


class Lesson(Enum):
    """What a refusal taught."""

    NOTHING = "nothing"
    RATE = "rate"
    BURST = "burst"
    ALL_REFUSED = "all refused"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Accepted requests per second, and how many accepted requests that was counted from."""

    per_s: float
    support: float


class LearnedRate:
    """A rate learned from refusals. Times are monotonic seconds.

    Attributes:
        rate: requests per second that we send at most, None where nothing shows a limit.
        learned_at: when a rate was last found, here or by another harvest; minus infinity for never.
        is_own: whether it was found here.
        refused_for_s: how long everything was refused when the teacher's window of time was last used up, 0
            where that has not happened.
    """

    def __init__(self, sends: SendLog, burst: LearnedBurst, now: float) -> None:
        self.rate: float | None = None
        self.refused_for_s = 0.0
        self.learned_at = -math.inf
        self.is_own = False
        # Our part of the limit, as other harvests use the rest.
        self._part = 1.0
        self._sends = sends
        self._burst = burst
        self._full = FullRefusal()
        self._surplus = RefusalSurplus()
        self._trial: RateTrial | None = None
        # What the last decision found, and the last moments at which the allowance was used up.
        self._limit: Estimate | None = None
        # About how long the teacher's window of time is, 0 where none was seen.
        self._period_s = 0.0
        self._used_up: deque[float] = deque(maxlen=MOST_MOMENTS)
        # Refusals of earlier sends teach nothing more.
        self._decided_at = -math.inf
        self._cut_at = self._grown_at = now
        self._growth_per_send = 0.0
        self._unexpected = 0
        # How many were accepted before the first refusal.
        self._burst_seen: int | None = None
        self._is_first_window = True
        self._is_confirmed = False
        # Whether a configured rate has not been contradicted yet.
        self._is_trusted = False
        # Requests per second that were trusted when everything began to be refused.
        self._cap = math.inf
        # Whether something showed that the rate is limited.
        self._is_known = False
        # Until when the rate was so low that refusals were unrelated, and the share of those.
        self._quiet_until = -math.inf
        self._unrelated = UnrelatedRefusals()
        # When the last time in which everything was refused ended; at first, when the first request was sent.
        self._cycle_at: float | None = None
        self._flow = SendFlow(now)

    @property
    def unrelated(self) -> float:
        """Share of requests that is refused whatever the rate."""
        return self._unrelated.share

    # What happens

    def sent(self, entry: Entry) -> None:
        """Record a send."""
        if self._cycle_at is None:
            self._cycle_at = entry.at
        self._flow.sent(entry.at)
        self._full.sent(entry)

    def accepted(self, entry: Entry, now: float) -> None:
        """Record that this request was answered, or at least not refused."""
        if self._full.since is not None and entry.at >= self._full.last_refused_at:
            self._end_of_refusal(entry.at, now)

    def disregard(self, entry: Entry) -> None:
        """Learn nothing from a refusal that was about its row alone."""
        self._full.disregard(entry)

    def refused(self, entry: Entry, now: float, trusted: float) -> Lesson:
        """Learn from a refusal that is in the log already.

        Args:
            trusted: requests per second that are configured or stated, infinity where none are.
        """
        if self._full.since is not None:
            self._full.refused(entry, now)
            return Lesson.ALL_REFUSED
        if entry.at <= self._decided_at:
            return Lesson.NOTHING
        if self._burst_seen is None:
            self._burst_seen = entry.number - 1
        self._surplus.add(entry, self.unrelated)
        if self._is_all_refused(now, trusted):
            return Lesson.ALL_REFUSED
        if self._trial is not None:
            self._judge_trial(self._trial, now)
            return Lesson.RATE if self._trial is None else Lesson.NOTHING
        if not self._surplus.is_found(self.unrelated):
            return Lesson.NOTHING
        return self._decide(entry, now, trusted)

    def forget(self, now: float) -> None:
        """Forget the limit: the refusals so far had another reason, such as the number in flight."""
        self._full.end()
        self._surplus.reset()
        self._trial = self._limit = None
        self._used_up.clear()
        self._unexpected, self._is_known = 0, False
        self._set(self.rate, now)
        self._growth_per_send = GROWTH_AFTER_TRIAL

    # What follows from it

    def probe_wait_s(self, now: float) -> float:
        """Return seconds until the next probe may be sent while everything is refused."""
        probe = self._full.accepted_probe(now, self._sends.refusal_delay_s)
        if probe is not None:
            self._end_of_refusal(probe.at, now)
        return self._full.wait_s(now, self._sends.refusal_delay_s)

    def current(self, now: float) -> float | None:
        """Let the rate grow up to `now` and return it."""
        if self.rate is None or now <= self._grown_at:
            return self.rate
        if self._trial is not None:
            self._judge_trial(self._trial, now)
            self._grown_at = now
            return self.rate
        flow = self._flow.per_s(now)
        if flow < USED_SHARE * self.rate and self.rate > 1 / FLOW_S:
            # Something else holds the requests back, so nothing would show that the rate is too high.
            self._cut_at += now - self._grown_at
            self._grown_at = now
            return self.rate
        sends = float(SENDS_PER_UNIT if self._is_confirmed else SENDS_PER_FIRST_UNIT)
        sends *= 1 + UNRELATED_SLOWDOWN * self.unrelated
        slower = GROWTH_UNIT_S / max(GROWTH_UNIT_S, sends * self._part / self.rate, self._period_s)
        since, until = (self._grown_at - self._cut_at) * slower, (now - self._cut_at) * slower
        # The integral of the growth per second from `since` to `until`.
        step = GROWTH_PER_S * (until - since) + ACCELERATION * (until**3 - since**3) / 3
        limit = self._limit
        if limit is None or not self._is_confirmed or self.rate < (1 + SWEEP / limit.support) * limit.per_s:
            step += self._growth_per_send * min(self.rate, flow) * (now - self._grown_at)
        self.rate *= 1 + min(max(step, 0.0), 1.0)
        self._grown_at = now
        if self._limit is None or self.rate < QUIET_SHARE * self._limit.per_s:
            self._quiet_until = now
        return self.rate

    def saved(self) -> dict[str, float | None]:
        """Return what was learned, as JSON values, for `resume` in a later process."""
        return {"rate": self.rate, "unrelated": self.unrelated, "refused_for_s": self.refused_for_s}

    def resume(self, saved: Mapping[str, Any], now: float) -> None:
        """Continue from what an earlier process learned."""
        self._unrelated.share = float(saved.get("unrelated") or 0.0)
        self.refused_for_s = float(saved.get("refused_for_s") or 0.0)
        if saved.get("rate"):
            rate = float(saved["rate"])
            self._set(rate, now)
            self._limit = Estimate(rate, TRUSTED_SUPPORT)

    def scale(self, ratio: float) -> None:
        """Multiply the rate and the limit that was found: our part of it has changed.

        What was accepted before shows nothing any more, and a trial can't be judged.
        """
        self._part *= ratio
        if self._trial is not None:
            self.rate, self._trial = self._trial.rate, None
        if self.rate is not None:
            self.rate = max(self.rate * ratio, LEAST_RATE)
        if self._limit is not None:
            self._limit = Estimate(self._limit.per_s * ratio, self._limit.support)
        self._cap *= ratio
        self._used_up.clear()

    def lesson(self) -> tuple[float, float]:
        """Return the rate now, and the limit that was found, in requests per second of all harvests together.

        0 for unknown.
        """
        rate = self.rate if self._trial is None else self._trial.rate
        limit = 0.0 if self._limit is None else self._limit.per_s
        return (rate or 0.0) / self._part, limit / self._part

    def adopt(self, rate: float, limit: float, learned_at: float, now: float) -> None:
        """Go on from what another harvest has found.

        Args:
            rate, limit: as `lesson` returns them.
            learned_at: when it found the limit: the allowance was used up then, for all.
        """
        self._trial = None
        self._limit = Estimate(limit * self._part, TRUSTED_SUPPORT)
        self._is_known = True
        self._used_up.append(learned_at)
        self._surplus.reset()
        self._set(rate * self._part, now)
        self.learned_at, self.is_own = learned_at, False

    def follow(self, rate: float, now: float) -> None:
        """Take over how the rate of the harvest has grown whose limit was adopted."""
        if self._trial is None and not self.is_own:
            self.rate, self._grown_at = max(rate * self._part, LEAST_RATE), now

    # Counts

    def _earned(self, until: float, trusted: float) -> Estimate | None:
        """Accepted per second since the allowance was last used up, or a rate that is trusted; else None."""
        if not self._used_up:
            if self._limit is not None:
                return self._limit
            if trusted < math.inf:
                return Estimate(trusted, TRUSTED_SUPPORT)
            since = max(self._decided_at, until - LOOKBACK_S)
            accepted, _ = self._sends.counts(since, until)
            if self._decided_at == -math.inf or accepted < PRECISE_SUPPORT:
                return None
            return Estimate(accepted / (until - since), accepted)
        lookback_s = max(
            LOOKBACK_S,
            until - self._sends.begin_of(max(PRECISE_SUPPORT, int(LOOKBACK_SENDS * self._part)), until),
            LOOKBACK_WAITS * self._period_s,
        )
        earliest = until - lookback_s / 2**self._unexpected
        since = next((at for at in self._used_up if at >= earliest), max(self._used_up[-1], earliest))
        # A few requests, or a part of a window of time, show no rate.
        since = min(since, self._sends.begin_of(PRECISE_SUPPORT, until), until - self._period_s)
        accepted, _ = self._sends.counts(since, until)
        return Estimate(max(accepted, 0.5) / max(until - since, 1e-3), accepted)

    def _found(self, accepted: int, seconds: float, earned: Estimate | None, *, is_mixed: bool) -> Estimate:
        """The limit, in sends per second, from what was accepted while the allowance was used up.

        Args:
            earned: what was accepted over a longer time. It counts as far as the short time does not disprove
                it.
            is_mixed: whether refusals and accepted requests alternated in the short time. Otherwise it shows
                no rate: a window of time may have ended.
        """
        passed = 1 - self.unrelated
        if earned is None:
            return Estimate((accepted + 0.5) / seconds / passed, max(1.0, accepted))
        doubt = 1 + (2 * math.sqrt(accepted) if self.unrelated else 0.0)
        low, high = (accepted - doubt) / seconds, (accepted + doubt) / seconds
        is_mixed = is_mixed and seconds >= self._period_s
        if is_mixed and high < DISPROVED * earned.per_s:
            return Estimate(high / passed, max(1.0, accepted))
        if is_mixed and low > earned.per_s:
            return Estimate(low / passed, max(1.0, accepted))
        return Estimate(earned.per_s / passed, max(accepted, earned.support, 1.0))

    # Decisions

    def _set(self, rate: float | None, now: float) -> None:
        self.rate = None if rate is None else max(rate, LEAST_RATE)
        self._decided_at = self._cut_at = self._grown_at = self._quiet_until = now
        self._growth_per_send = 0.0

    def _decide(self, entry: Entry, now: float, trusted: float) -> Lesson:
        if self._is_after_standstill(entry.at, self._surplus.since, min(trusted, self.rate or math.inf), now):
            return Lesson.BURST
        since = self._surplus.since
        accepted, refused = self._sends.counts(since, entry.at)
        sends = accepted + refused
        earned = self._earned(entry.at, trusted)
        seconds = max(entry.at - since, 1e-3)
        is_mixed = accepted >= ENOUGH_ACCEPTED and self._sends.moments(since) >= ENOUGH_MOMENTS
        is_disproved = earned is None or (accepted + 1) / seconds < DISPROVED * earned.per_s
        if is_disproved and not is_mixed and sends < MOST_AWAITED:
            return Lesson.NOTHING
        is_dense = refused >= DENSE_SHARE * sends
        if is_dense and sends < DENSE_SENDS and not self._is_known:
            return Lesson.NOTHING
        found = self._found(accepted, seconds, earned, is_mixed=is_mixed)
        if not is_dense and (not self._is_known or self._is_unexpected(found)):
            self._begin_trial(now)
            return Lesson.NOTHING
        self._count_quiet()
        self._learn(found, entry.at, now)
        self._is_known = True
        return Lesson.RATE

    def _is_unexpected(self, found: Estimate) -> bool:
        """Whether this contradicts a limit that was found before."""
        limit = self._limit
        if limit is None or self.rate is None or limit.support < PRECISE_SUPPORT:
            return False
        return self.rate < EXPECTED_SHARE * limit.per_s or found.per_s < FALLEN * limit.per_s

    def _is_after_standstill(self, at: float, since: float, cap: float, now: float) -> bool:
        """Whether refusals come of a standstill, although the rate is right; then they are done with.

        After a standstill of ours many leave together; then the burst is halved. After one of the teacher's
        many are looked at together, and the refusals come late.

        Args:
            at: when the refused request was sent that gave cause to ask.
            since: when the first one was sent.
            cap: requests per second that are trusted, infinity where none are.
        """
        if cap == math.inf:
            return False
        begun_at = min(at - 1.0, self._sends.begin_of(20, at))
        accepted, refused = self._sends.counts(begun_at, at)
        if accepted + refused > NO_FASTER * cap * (at - begun_at) + 1:
            return False
        is_clump = self._is_clump(at, cap) and self._burst.refused()
        if not is_clump:
            accepted, refused = self._sends.counts(now - LOOKBACK_S, now)
            is_rare = refused <= MOST_AFTER_STANDSTILLS * (accepted + refused)
            if not (is_rare and self._sends.has_late(since, at)):
                return False
        self._surplus.reset()
        self._decided_at = now
        return True

    def _is_clump(self, at: float, cap: float) -> bool:
        """Whether many were sent together up to this moment."""
        clump = sum(1 for other in self._sends.newest_first(at - CLUMP_S) if other.at <= at)
        return clump > CLUMP * CLUMP_S * cap + CLUMP

    def _learn(self, found: Estimate, used_up_at: float, now: float) -> None:
        """Set the rate from what was found."""
        self._unexpected = self._unexpected + 1 if self._is_unexpected(found) else 0
        change = 0.0 if self._limit is None else abs(found.per_s / self._limit.per_s - 1)
        self._is_confirmed = self._limit is not None and change < AGREEMENT
        self._limit = found
        self._used_up.append(used_up_at)
        self._surplus.reset()
        self.learned_at, self.is_own = now, True
        self._set(CUT_TO * min(found.per_s, self.rate or math.inf), now)
        growth = GROWTH if self._is_confirmed else FIRST_GROWTH
        self._growth_per_send = min(MOST_GROWTH, growth / found.support**2)

    def _count_quiet(self) -> None:
        """Take the refusals while the rate was low into the share of unrelated ones, where there are such."""
        if not self.unrelated or self._quiet_until <= self._cut_at:
            return
        accepted, refused = self._sends.counts(self._cut_at, self._quiet_until)
        self._unrelated.count(accepted + refused, refused)

    # Trials

    def _begin_trial(self, now: float) -> None:
        begun_at = min(now - 0.25, self._sends.begin_of(20, now))
        recent = sum(self._sends.counts(begun_at, now))
        sent_per_s = min(max(recent, 1) / (now - begun_at), self.rate or math.inf)
        accepted, refused = self._sends.counts(max(self._decided_at, now - LOOKBACK_S), now)
        share = min(DENSE_SHARE, max(LEAST_TRIAL_SHARE, refused / max(1, accepted + refused)))
        self._trial = RateTrial(now, self.rate, sent_per_s, share)
        self.rate = TRIAL_SPEED_UP * sent_per_s
        self._grown_at = now

    def _judge_trial(self, trial: RateTrial, now: float) -> None:
        """End the trial if it shows whether the rate is the reason."""
        until = now - self._sends.refusal_delay_s
        verdict = trial.verdict(self._sends, until, self._burst_seen or 0, self._part)
        if verdict is TrialVerdict.HELD_BACK:
            self._end_trial(trial, trial.rate, now)
        elif verdict is TrialVerdict.RATE_IS_NO_REASON:
            self._end_trial(trial, self.rate, now)
        elif verdict is TrialVerdict.RATE_IS_REASON:
            self._trial = None
            counted, _ = self._sends.counts(trial.begun_at, until)
            seconds = until - trial.begun_at
            self.rate = trial.rate or trial.sent_per_s
            low, high = (counted - 1) / seconds, (counted + 1) / seconds
            earned = self._earned(until, math.inf)
            per_s, support = max(counted, 0.5) / seconds, max(counted, 1.0)
            if earned is not None and (low <= earned.per_s <= high or seconds < self._period_s):
                per_s, support = earned.per_s, max(support, earned.support)
            self._learn(Estimate(per_s / (1 - self.unrelated), support), until, now)
            self._is_known = True

    def _end_trial(self, trial: RateTrial, rate: float | None, now: float) -> None:
        """The refusals do not depend on the rate."""
        accepted, refused = self._sends.counts(max(self._decided_at, now - LOOKBACK_S), now)
        self._trial, self._unexpected = None, 0
        self._surplus.reset()
        self._unrelated.count(accepted + refused, refused)
        if self._is_known and self._limit is not None and trial.rate is not None:  # as before
            self._set(trial.rate, now)
            return
        self._limit, self._is_known = None, False
        self._used_up.clear()
        self._set(rate, now)
        self._growth_per_send = GROWTH_AFTER_TRIAL

    # While everything is refused

    def _is_all_refused(self, now: float, trusted: float) -> bool:
        """Whether the last sends were refused one after the other; then only probes are sent."""
        run, first_at, last_at = self._sends.refused_in_a_row(now, self._decided_at)
        if run < ENOUGH_REFUSALS or self.unrelated**run > LEAST_CHANCE:
            return False
        self._full.begin(first_at, last_at, 0.5 / (self.rate or math.inf))
        self._cap = min(trusted, self.rate or math.inf)
        self._is_trusted = not self._used_up and trusted < math.inf
        if self._limit is None and self._is_trusted:
            self._limit = Estimate(trusted, TRUSTED_SUPPORT)
        return True

    def _end_of_refusal(self, accepted_at: float, now: float) -> None:
        """Set the rate to what was accepted over the whole time, from the last such end to this one."""
        since = self._full.since if self._full.since is not None else now
        last_refused = self._full.last_refused_at
        self._full.end()
        self._trial = None
        refused_s = accepted_at - since
        cycle_at = self._cycle_at if self._cycle_at is not None else since
        accepted, _ = self._sends.counts(cycle_at - 1e-9, since)
        if refused_s < WINDOW_S or refused_s < WINDOW_SHARE * (accepted_at - cycle_at):
            if self._is_after_standstill(last_refused, since, self._cap, now):
                return
            begun_at = min(self._surplus.since, since)
            counted, _ = self._sends.counts(begun_at, accepted_at)
            seconds = max(accepted_at - begun_at, 1e-3)
            self._learn(
                self._found(counted, seconds, self._earned(accepted_at, math.inf), is_mixed=False),
                accepted_at,
                now,
            )
            return
        self.refused_for_s, self._cycle_at = refused_s, accepted_at
        self._period_s = max(refused_s, PERIOD_MEMORY * self._period_s)
        is_first, self._is_first_window = self._is_first_window, False
        # Refused from the start says nothing about the rate, and once says less than a rate that is trusted.
        if accepted == 0 or (is_first and self._is_trusted):
            self._decided_at = now
            self._surplus.reset()
            return
        shortest, longest = max(last_refused - cycle_at, 0.05), max(accepted_at - cycle_at, 0.05)
        per_s = accepted / math.sqrt(shortest * longest)
        support = min(float(accepted), 2 * longest / max(longest - shortest, 1e-3))
        if is_first:  # the teacher's window had begun before, or its bucket was full
            support = min(support, FIRST_SUPPORT)
        self._learn(Estimate(per_s / (1 - self.unrelated), max(1.0, support)), accepted_at, now)
        self._unexpected = 0
