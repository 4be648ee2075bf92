"""Read a teacher's rate limits from the headers of a reply, in the forms that providers use. Pure.

OpenAI and compatible servers send `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` with resets like
`6m0s`. Anthropic sends `anthropic-ratelimit-requests-{limit,remaining,reset}` with ISO 8601 times. Others
send plain `ratelimit-*` with seconds or epoch times. A reset is the time until the limit is fully available
again; it is never a wait before the next request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from harvester.api.http_values import LONGEST_VALUE, quota_number, reset_seconds
from harvester.teacher.limiter.limits import DAY_S, HOUR_S, MINUTE_S, MONTH_S, SECOND_S, LimitKey, Quantity

# The periods of limits; one that follows from numbers is the nearest of these, if it is near enough.
PERIODS_S = (SECOND_S, 2.0, 5.0, 10.0, 30.0, MINUTE_S, HOUR_S, DAY_S, MONTH_S)
_NEAR = 1.6
# No server means a smaller limit than this: of a minute, it would hold the next request for most of a day.
LEAST_LIMIT = 1e-3
# A reset in whole seconds below this is too coarse to compute with.
LEAST_WHOLE_S = 5.0
# This many replies in a row must give the same computed period: where a reset is the end of a window and not
# the time until a bucket is full, they differ.
AGREEING_REPLIES = 3
# Words in the name of a header that say its period.
_PERIOD_WORDS = {
    **dict.fromkeys(("second", "1s", "persecond"), SECOND_S),
    **dict.fromkeys(("minute", "1m", "perminute"), MINUTE_S),
    **dict.fromkeys(("hour", "1h", "hourly", "perhour"), HOUR_S),
    **dict.fromkeys(("day", "1d", "24h", "daily", "perday"), DAY_S),
    **dict.fromkeys(("month", "monthly", "permonth"), MONTH_S),
}
_WINDOW = re.compile(r"[;,\s]w(?:indow)?=(\d+(?:\.\d+)?)")
_FACTS = frozenset({"limit", "remaining", "reset", "policy"})
_PREFIX = re.compile(r"(?:x-|anthropic-)?ratelimit-(.+)\Z")


@dataclass(frozen=True, slots=True)
class RateHeader:
    """One limit that the headers state: `limit` units per `key.period_s`, `remaining` units now.

    `is_stated` says that the period stands in a name or a value; else it follows from numbers or from habit.
    Where not even that is possible, `is_decided` is False and the period of `key` means nothing.
    `is_computed` says that it follows from the numbers of this reply alone: others may contradict it.
    """

    key: LimitKey
    limit: float
    remaining: float | None = None
    reset_s: float | None = None
    is_stated: bool = False
    is_decided: bool = True
    is_computed: bool = False

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.limit / self.key.period_s


def parse_rate_headers(headers: Mapping[str, str]) -> tuple[RateHeader, ...]:
    """Return the limits that these headers (lower-case names) state; what can't be understood is left out."""
    facts: dict[str, dict[str, str]] = {}
    for name, value in headers.items():
        if "ratelimit-" in name and (match := _PREFIX.match(name)):
            words = [word for word in match[1].split("-") if word not in {"", "usage_based"}]
            fact = next((word for word in words if word in _FACTS), None)
            if fact is not None:
                subject = "-".join(word for word in words if word != fact)
                facts.setdefault(subject, {})[fact] = value
    date = headers.get("date")
    if "ratelimit-policy" in headers and "" in facts:
        facts[""]["policy"] = headers["ratelimit-policy"]
    parsed = [_rate_header(subject, values, date) for subject, values in facts.items()]
    understood = [header for header in parsed if header is not None]
    stated = {(header.key.quantity, header.limit) for header in understood if header.is_stated}
    # The same limit may stand there a second time under a name without a period.
    return tuple(h for h in understood if h.is_stated or (h.key.quantity, h.limit) not in stated)


def _rate_header(subject: str, values: Mapping[str, str], date: str | None) -> RateHeader | None:
    limit = quota_number(values.get("limit"))
    quantity = _quantity(subject)
    if limit is None or limit < LEAST_LIMIT or quantity is None:
        return None
    remaining, reset_s = quota_number(values.get("remaining")), reset_seconds(values.get("reset"), date)
    period_s = _stated_period_s(subject, values)
    is_stated, is_computed = period_s is not None, False
    if period_s is None and not _is_coarse(values.get("reset"), reset_s):
        period_s = _period_of_numbers(limit, remaining, reset_s)
        is_computed = period_s is not None
    if period_s is None and subject != "":
        period_s = _period_by_habit(remaining, limit, reset_s)
    if period_s is None:
        return RateHeader(LimitKey(quantity, MINUTE_S), limit, remaining, reset_s, is_decided=False)
    return RateHeader(
        LimitKey(quantity, period_s),
        limit,
        remaining,
        reset_s,
        is_stated=is_stated,
        is_computed=is_computed,
    )


def _stated_period_s(subject: str, values: Mapping[str, str]) -> float | None:
    """The period that the name says (`-day`, `-second`), or a `w=` in the value; None where neither does."""
    if len(subject) > LONGEST_VALUE:
        return None
    for word in re.split(r"[-_]", subject):
        if word in _PERIOD_WORDS:
            return _PERIOD_WORDS[word]
    match = _WINDOW.search(values.get("limit", "") + ";" + values.get("policy", ""))
    seconds = float(match[1]) if match else 0.0
    return seconds if 0 < seconds <= 2 * MONTH_S else None


def _is_coarse(text: str | None, reset_s: float | None) -> bool:
    """Whether a reset is a small number of whole seconds: rounded up, it may stand for much less."""
    return reset_s is not None and reset_s < LEAST_WHOLE_S and (text or "").strip().isdigit()


def _period_of_numbers(limit: float, remaining: float | None, reset_s: float | None) -> float | None:
    """The period of a bucket whose reset is the time until it is full: reset * limit / used."""
    if remaining is None or not reset_s or not 0 <= remaining < limit:
        return None
    seconds = reset_s * limit / (limit - remaining)
    if not 0 < seconds < math.inf:  # such numbers are too large or too small to divide
        return None
    nearest = min(PERIODS_S, key=lambda period: abs(math.log(period / seconds)))
    is_near = 1 / _NEAR < nearest / seconds < _NEAR
    return nearest if is_near and nearest <= DAY_S and nearest >= reset_s / _NEAR else None


def _period_by_habit(remaining: float | None, limit: float, reset_s: float | None) -> float | None:
    """The period of `-requests` and `-tokens` where numbers don't tell: a minute, or more for a long reset.

    A long reset with much remaining contradicts itself and decides nothing against a minute.
    """
    if reset_s is None or reset_s <= 2 * MINUTE_S or (remaining is not None and remaining > limit / 2):
        return MINUTE_S
    return next((period for period in (HOUR_S, DAY_S, MONTH_S) if period >= reset_s), MONTH_S)


class HeaderPeriods:
    """Finds the period of limits whose headers don't say it, by watching their resets.

    Such a reset counts down to the end of the window. One that stays at a second or less for several seconds,
    or that jumps back up to the same value, shows how long the window is. Until then nothing is decided.
    """

    def __init__(self) -> None:
        # By quantity: the limit, when it was first seen, and the largest reset since then.
        self._seen: dict[Quantity, tuple[float, float, float]] = {}
        # By quantity: the last computed period, and how many replies in a row gave it.
        self._computed: dict[Quantity, tuple[float, int]] = {}

    def decide(self, header: RateHeader, now: float) -> RateHeader | None:
        """Return the header with its period, None while that is open."""
        if header.is_computed and not self._agrees(header):
            return None
        if header.is_decided:
            return header
        if header.reset_s is None:
            return None
        limit, since, largest = self._seen.get(header.key.quantity, (header.limit, now, 0.0))
        if limit != header.limit:
            limit, since, largest = header.limit, now, 0.0
        largest = max(largest, header.reset_s)
        self._seen[header.key.quantity] = (limit, since, largest)
        if now - since < 2 * largest + 2 * SECOND_S:
            return None
        period_s = next((period for period in PERIODS_S if 1.05 * period >= largest), MONTH_S)
        return replace(header, key=LimitKey(header.key.quantity, period_s), is_decided=True)

    def _agrees(self, header: RateHeader) -> bool:
        """Whether several replies in a row gave this computed period."""
        period_s, times = self._computed.get(header.key.quantity, (0.0, 0))
        times = times + 1 if period_s == header.key.period_s else 1
        self._computed[header.key.quantity] = (header.key.period_s, times)
        return times >= AGREEING_REPLIES


def _quantity(subject: str) -> Quantity | None:
    """What a header such as `x-ratelimit-limit-input-tokens` counts; None for other subjects."""
    if (
        "request" in subject
        or subject in {"", "rpm", "rps", "rpd"}
        or set(subject.split("-")) <= _PERIOD_WORDS.keys()
    ):
        return Quantity.REQUESTS
    if "tokens" not in subject:
        return None
    if subject.startswith("input"):
        return Quantity.INPUT_TOKENS
    return Quantity.OUTPUT_TOKENS if subject.startswith("output") else Quantity.TOKENS
