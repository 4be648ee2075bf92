"""What a teacher's headers tell of its limits, in all the forms they are written in. Pure.

OpenAI and its kin write `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` with resets like `6m0s`;
Anthropic `anthropic-ratelimit-requests-{limit,remaining,reset}` with ISO 8601; others `ratelimit-*` plain,
with seconds or epoch times. A reset is the time to a full allowance, never a wait before the next request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MINUTE_S = 60.0
DAY_S = 86_400.0
LONGEST_MINUTE_RESET_S = 120.0
"""A reset further away than this belongs to a daily allowance."""
_FACTS = frozenset({"limit", "remaining", "reset"})
_PREFIX = re.compile(r"(?:x-|anthropic-)?ratelimit-(.+)\Z")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|d|h|m|s)")
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}
_EPOCH_MS, _EPOCH_S = 1e12, 1e9


@dataclass(frozen=True, slots=True)
class RateHeader:
    """One allowance: `name` as in the limiter's buckets, `rate` in units per second."""

    name: str
    limit: float
    span_s: float
    remaining: float | None = None
    reset_s: float | None = None

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.limit / self.span_s


def parse_rate_headers(headers: Mapping[str, str]) -> tuple[RateHeader, ...]:
    """The allowances that these headers (lower-case names) name; nonsense is left out."""
    facts: dict[str, dict[str, str]] = {}
    for name, value in headers.items():
        if "ratelimit-" in name and (match := _PREFIX.match(name)):
            words = [word for word in match[1].split("-") if word not in {"", "usage_based"}]
            fact = next((word for word in words if word in _FACTS), None)
            if fact is not None:
                subject = "-".join(word for word in words if word != fact) or "requests"
                facts.setdefault(subject, {})[fact] = value
    found = (_told(subject, values, headers.get("date")) for subject, values in facts.items())
    return tuple(one for one in found if one is not None)


def _told(subject: str, values: Mapping[str, str], date: str | None) -> RateHeader | None:
    limit = number(values.get("limit"))
    unit = "requests" if subject.startswith("requests") else "tokens" if "tokens" in subject else ""
    if limit is None or limit <= 0 or not unit:
        return None
    reset_s = span_of(values.get("reset"), date)
    is_day = subject.endswith(("-day", "-daily")) or (
        not subject.endswith("-minute") and reset_s is not None and reset_s > LONGEST_MINUTE_RESET_S
    )
    side = next((side for side in ("input ", "output ") if subject.startswith(side.strip())), "")
    return RateHeader(
        name=f"{side}{unit} per {'day' if is_day else 'minute'}",
        limit=limit,
        span_s=DAY_S if is_day else MINUTE_S,
        remaining=number(values.get("remaining")),
        reset_s=reset_s,
    )


def number(text: str | None) -> float | None:
    """A finite number from 0 up: `12000`, `1e4`, `12,000`, the first of `100, 100;w=60`; else None."""
    if text is None:
        return None
    plain = text.split(";")[0].strip()
    first = plain.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", plain) else plain.split(",")[0]
    try:
        value = float(first)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def span_of(text: str | None, date: str | None = None) -> float | None:
    """Seconds from now: `6m0s`, `12ms`, `1h2m`, `41`, an epoch time (s or ms), ISO 8601; else None.

    Args:
        date: the reply's own Date header; absolute times are taken relative to it, None without it.
    """
    if text is None:
        return None
    plain = text.strip().lower()
    parts = _PART.findall(plain)
    if parts and "".join(value + unit for value, unit in parts) == plain:
        return sum(float(value) * _UNITS_S[unit] for value, unit in parts)
    seconds = number(plain)
    if seconds is not None and seconds < _EPOCH_S:
        return seconds
    at = seconds / 1000 if seconds is not None and seconds >= _EPOCH_MS else seconds
    now = _date(date)
    if at is None:
        try:
            moment = datetime.fromisoformat(text.strip())
            at = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    return None if now is None else max(0.0, at - now)


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (TypeError, ValueError, OverflowError):
        return None
