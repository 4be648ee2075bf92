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
from dataclasses import dataclass
from datetime import UTC, datetime

from harvester.api.http_values import parse_date, parse_number
from harvester.teacher.limits import DAY_S, MINUTE_S, LimitKey, Quantity

# A reset further away than this belongs to a daily limit.
LONGEST_MINUTE_RESET_S = 120.0
_FACTS = frozenset({"limit", "remaining", "reset"})
_PREFIX = re.compile(r"(?:x-|anthropic-)?ratelimit-(.+)\Z")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|d|h|m|s)")
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}
# Numbers from here on are epoch times, in seconds or in milliseconds; smaller ones are seconds from now.
_EPOCH_S, _EPOCH_MS = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class RateHeader:
    """One limit that the headers state: `limit` units per `key.period_s`, `remaining` units now."""

    key: LimitKey
    limit: float
    remaining: float | None = None
    reset_s: float | None = None

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.limit / self.key.period_s


def parse_rate_headers(headers: Mapping[str, str]) -> tuple[RateHeader, ...]:
    """The limits that these headers (lower-case names) state; what can't be understood is left out."""
    facts: dict[str, dict[str, str]] = {}
    for name, value in headers.items():
        if "ratelimit-" in name and (match := _PREFIX.match(name)):
            words = [word for word in match[1].split("-") if word not in {"", "usage_based"}]
            fact = next((word for word in words if word in _FACTS), None)
            if fact is not None:
                subject = "-".join(word for word in words if word != fact) or "requests"
                facts.setdefault(subject, {})[fact] = value
    date = headers.get("date")
    parsed = (_rate_header(subject, values, date) for subject, values in facts.items())
    return tuple(header for header in parsed if header is not None)


def _rate_header(subject: str, values: Mapping[str, str], date: str | None) -> RateHeader | None:
    limit = quota_number(values.get("limit"))
    quantity = _quantity(subject)
    if limit is None or limit <= 0 or quantity is None:
        return None
    reset_s = reset_seconds(values.get("reset"), date)
    is_daily = subject.endswith(("-day", "-daily")) or (
        not subject.endswith("-minute") and reset_s is not None and reset_s > LONGEST_MINUTE_RESET_S
    )
    return RateHeader(
        key=LimitKey(quantity, DAY_S if is_daily else MINUTE_S),
        limit=limit,
        remaining=quota_number(values.get("remaining")),
        reset_s=reset_s,
    )


def _quantity(subject: str) -> Quantity | None:
    """What a header such as `x-ratelimit-limit-input-tokens` counts; None for other subjects."""
    if subject.startswith("requests"):
        return Quantity.REQUESTS
    if "tokens" not in subject:
        return None
    if subject.startswith("input"):
        return Quantity.INPUT_TOKENS
    return Quantity.OUTPUT_TOKENS if subject.startswith("output") else Quantity.TOKENS


def quota_number(text: str | None) -> float | None:
    """A finite number from 0 up: `12000`, `1e4`, `12,000`, the first of `100, 100;w=60`; else None."""
    if text is None:
        return None
    plain = text.split(";")[0].strip()
    is_grouped = re.fullmatch(r"\d{1,3}(,\d{3})+", plain)
    value = parse_number(plain.replace(",", "") if is_grouped else plain.split(",")[0])
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def reset_seconds(text: str | None, date: str | None = None) -> float | None:
    """Seconds from now: `6m0s`, `12ms`, `1h2m`, `41`, an epoch time (s or ms), ISO 8601; else None.

    Args:
        date: the reply's own Date header. Absolute times are taken relative to it; without it they give None.
    """
    if text is None:
        return None
    plain = text.strip().lower()
    parts = _PART.findall(plain)
    if parts and "".join(value + unit for value, unit in parts) == plain:
        return sum(float(value) * _UNITS_S[unit] for value, unit in parts)
    seconds = quota_number(plain)
    if seconds is not None and seconds < _EPOCH_S:
        return seconds
    reset_at = seconds / 1000 if seconds is not None and seconds >= _EPOCH_MS else seconds
    if reset_at is None:
        reset_at = _iso_time(text)
    now = parse_date(date)
    return None if now is None or reset_at is None else max(0.0, reset_at - now)


def _iso_time(text: str) -> float | None:
    """Unix seconds of an ISO 8601 time; one without a zone is taken as UTC."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
