"""Try a higher rate for a short time, to see whether the rate is the reason for refusals. Pure.

A sequential test (SPRT; A. Wald, Sequential Analysis, 1945): if the rate is the reason, all that is added is
refused; otherwise the share refused stays the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from harvester.teacher.limiter.sends import SendLog

# The rate in a trial, over the rate before.
TRIAL_SPEED_UP = 1.3
# The logarithm of the likelihood ratio that decides; the fewest and the most sends; the least speed-up that
# shows anything.
TRIAL_DECIDES = 2.5
LEAST_TRIAL_SENDS = 8
TRIAL_SENDS = 60
MOST_TRIAL_SENDS = 400
LEAST_SPEED_UP = 1.1


class TrialVerdict(Enum):
    """What a trial has shown."""

    OPEN = "open"
    # Something else holds the requests back, so nothing can be shown.
    HELD_BACK = "held back"
    RATE_IS_REASON = "the rate is the reason"
    RATE_IS_NO_REASON = "the rate is not the reason"


@dataclass(slots=True)
class RateTrial:
    """Sends at a higher rate since `begun_at`.

    Attributes:
        rate: requests per second before, None where no limit was known.
        sent_per_s: what was sent per second before.
        share: of the requests that was refused before.
    """

    begun_at: float
    rate: float | None
    sent_per_s: float
    share: float
    _seen: int = 0

    def verdict(self, sends: SendLog, until: float, burst: int, part: float) -> TrialVerdict:
        """Say what the sends up to `until` show.

        Args:
            burst: how many were accepted before the first refusal. What was saved up in the teacher's bucket
                may hide a rate that is too high.
            part: our part of the limit. Others went on as before, so all together sped up less than ours.
        """
        if sends.count == self._seen:
            return TrialVerdict.OPEN
        self._seen = sends.count
        accepted, refused = sends.counts(self.begun_at, until)
        tried = accepted + refused
        if tried < LEAST_TRIAL_SENDS:
            return TrialVerdict.OPEN
        speed_up = min(TRIAL_SPEED_UP, tried / (until - self.begun_at) / self.sent_per_s)
        if speed_up < LEAST_SPEED_UP:
            return TrialVerdict.HELD_BACK if tried >= TRIAL_SENDS else TrialVerdict.OPEN
        speed_up = 1 + (speed_up - 1) * part
        share = 1 - (1 - self.share) / speed_up
        ratio = refused * math.log(share / self.share)
        ratio += accepted * math.log((1 - share) / (1 - self.share))
        added = (burst + 3) * speed_up / (speed_up - 1)
        enough = max(TRIAL_SENDS, min(MOST_TRIAL_SENDS, added))
        is_clear = ratio <= -TRIAL_DECIDES and tried >= min(added, MOST_TRIAL_SENDS)
        if is_clear or (ratio < 0 and tried >= enough):
            return TrialVerdict.RATE_IS_NO_REASON
        if ratio >= TRIAL_DECIDES or tried >= enough:
            return TrialVerdict.RATE_IS_REASON
        return TrialVerdict.OPEN
