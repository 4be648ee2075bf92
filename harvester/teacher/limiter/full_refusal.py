"""Find the end of a time in which a teacher refuses everything, by single probes. Pure.

A teacher that counts in windows of time refuses everything once a window is used up, until the next begins.
So while everything is refused only single requests are sent, first soon after one another, then after ever
longer waits, in proportion to the time that has passed.
"""

from __future__ import annotations

import math

from harvester.teacher.limiter.sends import Entry

# The first pause between two probes, while the whole wait is short; later the share of the whole wait so far.
FIRST_PROBE_S = 0.02
SHORT_WAIT_S = 0.3
LATER_PROBE_SHARE = 0.4
LONGEST_PROBE_S = 60.0


class FullRefusal:
    """A time in which everything is refused. Times are monotonic seconds.

    Attributes:
        since: when the first of the refused requests was sent, None while not everything is refused.
        last_refused_at: when the last refused request was sent.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.last_refused_at = -math.inf
        self._probe: Entry | None = None
        self._pause_s = FIRST_PROBE_S

    def begin(self, since: float, last_refused_at: float, first_pause_s: float) -> None:
        """Send only single probes from now on.

        Args:
            first_pause_s: before the first of them; at least FIRST_PROBE_S.
        """
        self.since, self.last_refused_at = since, last_refused_at
        self._probe = None
        self._pause_s = max(FIRST_PROBE_S, first_pause_s)

    def end(self) -> None:
        """Note that not everything is refused any more."""
        self.since = self._probe = None

    def sent(self, entry: Entry) -> None:
        """Note a send; while everything is refused it is a probe."""
        if self.since is not None:
            self._probe = entry

    def refused(self, entry: Entry, now: float) -> None:
        """Note one more refusal."""
        if entry.at < self.last_refused_at:
            return
        self.last_refused_at = entry.at
        if entry is self._probe and self.since is not None:
            self._probe = None
            waited_s = now - self.since
            later_s = LATER_PROBE_SHARE * waited_s
            self._pause_s = 2 * self._pause_s if waited_s < SHORT_WAIT_S else later_s
            self._pause_s = min(LONGEST_PROBE_S, max(FIRST_PROBE_S, self._pause_s))

    def disregard(self, entry: Entry) -> None:
        """Note that this refusal was about its row alone: another probe is needed."""
        if entry is self._probe:
            self._probe = None

    def accepted_probe(self, now: float, refusal_delay_s: float) -> Entry | None:
        """Return the probe that was not refused as quickly as the others: an answer to it is on its way."""
        if self._probe is not None and now >= self._verdict_at(self._probe, refusal_delay_s):
            return self._probe
        return None

    def wait_s(self, now: float, refusal_delay_s: float) -> float:
        """Return seconds until the next probe may be sent, 0 where not everything is refused."""
        if self.since is None:
            return 0.0
        if self._probe is not None:
            return max(0.0, self._verdict_at(self._probe, refusal_delay_s) - now)
        return max(0.0, self.last_refused_at + self._pause_s - now)

    @staticmethod
    def _verdict_at(probe: Entry, refusal_delay_s: float) -> float:
        return probe.at + 2 * refusal_delay_s + 0.02
