"""Parse numbers and dates in HTTP header values. Pure; a value that can't be read gives None."""

from __future__ import annotations

import math
from datetime import UTC
from email.utils import parsedate_to_datetime

# A longer text is no date; the parser of the standard library splits and joins it several times.
LONGEST_DATE = 200


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
