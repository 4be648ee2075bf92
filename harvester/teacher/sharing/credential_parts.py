"""Divide the limits of one credential among the addresses of a teacher by what each of them can use. Pure.

The parts are always 1 together, and so is what the buckets hold: a part that grows takes from those that
shrink. So all addresses together stay within the limits, and a slow address keeps from a fast one no more
than it uses. Where all could use more, the parts are by weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from harvester.teacher.limiter.rate_limiter import Limiter
from harvester.teacher.sharing.demand import Demand
from harvester.teacher.sharing.fair_shares import Want, divide

DIVIDE_EVERY_S = 0.5
# An address gets at least this part of its equal part, so that it can show that it can use more.
LEAST_PART = 0.1
# Parts that would change by less than this stay: each change ends what was saved up.
LEAST_CHANGE = 0.005
# An address whose requests don't wait for the rate gets this many times what it uses: the others are right
# beside it, and get what it leaves. One at its own limit waits now and then for so small a part; it wants no
# more than GROWTH times what it uses then, so that those that can use more don't lose theirs to it. Four
# addresses of unequal speed, simulated: 0.97 of the limit used with 1.05 and no bound, 1.00 with these.
HEADROOM = 1.02
GROWTH = 2.0


class CredentialParts:
    """The parts of one pass.

    Args:
        limiters: by base URL; more than one share what the credential allows.
        weights: by base URL.
    """

    def __init__(self, limiters: Mapping[str, Limiter], weights: Mapping[str, float], now: float) -> None:
        self._limiters = limiters
        self._weights = weights
        self._demands = {url: Demand(limiter, HEADROOM, now, GROWTH) for url, limiter in limiters.items()}
        self._divided_at = now

    def divide(self, now: float, absent: Collection[str] = ()) -> bool:
        """Divide anew if it is time; return whether a part changed.

        Args:
            absent: addresses that get nothing sent.
        """
        limits = self._limiters[next(iter(self._limiters))].credential_limits
        if len(self._limiters) < 2 or not limits or now - self._divided_at < DIVIDE_EVERY_S:
            return False
        self._divided_at = now
        wants = {}
        for url, limiter in self._limiters.items():
            demand = self._demands[url].fraction(limiter.part, now)
            most = min(
                (rate / limits[key] for key, rate in limiter.own_limits.items() if key in limits),
                default=math.inf,
            )
            least = LEAST_PART / len(self._limiters)
            wants[url] = Want(self._weights[url], least if url in absent else max(least, min(demand, most)))
        parts = divide(wants)
        if all(abs(parts[url] - limiter.part) < LEAST_CHANGE for url, limiter in self._limiters.items()):
            return False
        self._apply(parts, now)
        return True

    def _apply(self, parts: Mapping[str, float], now: float) -> None:
        """Set the parts; what the buckets of a limit hold together is divided like the limit."""
        limiters = list(self._limiters.values())
        held = dict.fromkeys(limiters[0].credential_limits, 0.0)
        for limiter in limiters:
            for key in held:
                limiter.buckets[key].refill(now)
                held[key] += limiter.buckets[key].level
        for url, limiter in self._limiters.items():
            limiter.set_part(parts[url], {key: level * parts[url] for key, level in held.items()}, now)
