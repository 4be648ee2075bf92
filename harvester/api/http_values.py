"""Parse numbers and dates in HTTP header values. Pure; a value that can't be read gives None."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

# A longer text is no date; the parser of the standard library splits and joins it several times.
LONGEST_DATE = 200
# A longer value is no number or time: the search for parts would take time quadratic in its length.
LONGEST_VALUE = 200
# Numbers from here on are epoch times, in seconds or in milliseconds; smaller ones are seconds from now.
_EPOCH_S, _EPOCH_MS = 1e9, 1e12
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|d|h|m|s)")
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def is_epoch(number: float) -> bool:
    """Whether a number can be a time of the years 2001 to 2128, in seconds or milliseconds since 1970."""
    return _EPOCH_S <= number < 5 * _EPOCH_S or _EPOCH_MS <= number < 5 * _EPOCH_MS


def parse_number(text: str | None) -> float | None:
    """Return a decimal number, possibly negative or infinite; None for NaN and for anything else."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return None if math.isnan(value) else value


def parse_date(text: str | None) -> float | None:
    """Return Unix seconds of an HTTP date (RFC 9110 section 5.6.7); a date without a zone is taken as UTC."""
    if not text or len(text) > LONGEST_DATE:
        return None
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def quota_number(text: str | None) -> float | None:
    """Return a finite number from 0 up: `12000`, `1e4`, `12,000`, the first of `100, 100;w=60`; else None."""
    if text is None or len(text) > LONGEST_VALUE:
        return None
    plain = text.split(";")[0].strip()
    is_grouped = re.fullmatch(r"\d{1,3}(,\d{3})+", plain)
    value = parse_number(plain.replace(",", "") if is_grouped else plain.split(",")[0])
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def reset_seconds(text: str | None, date: str | None = None) -> float | None:
    """Return seconds from now: `6m0s`, `12ms`, `1h2m`, `41`, an epoch time (s or ms), ISO 8601; else None.

    Args:
        date: the reply's own Date header. Absolute times are taken relative to it; without it they give None.
    """
    if text is None:
        return None
    plain = text.strip().lower()
    if len(plain) > LONGEST_VALUE:
        return None
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
