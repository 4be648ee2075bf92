"""Compute when a job may work: opening hours in a time zone, deadlines, durations. No I/O.

An opening is "[DAYS ]HH:MM-HH:MM ZONE", as in "22:00-07:00 Europe/Berlin" or "Mon-Fri,Sun 09:00-12:30 UTC";
the days are those on which it opens, and an end not after its start lies on the next day. Times are Unix
seconds; the edges are wall-clock times of the zone. Where a change of daylight saving time skips an edge, it
comes as much later as the clock was put forward; where an edge occurs twice, the first one counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
# Days to look ahead for the next opening: a weekly one comes within eight.
HORIZON_DAYS = 9
_OPENING = re.compile(
    r"(?:(?P<days>[A-Za-z,\- ]+?)\s+)?(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)\s+(?P<zone>\S+)\Z"
)
# Latest instant that has a date in every time zone.
LAST = datetime(9999, 12, 30, tzinfo=UTC).timestamp()
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Opening:
    """One span of wall-clock time on some days of the week (Monday is 0). Minutes count from midnight."""

    days: frozenset[int]
    start: int
    end: int
    zone: str

    def on(self, day: date) -> tuple[float, float] | None:
        """Return this day's span in Unix seconds, None when it does not open on it."""
        if day.weekday() not in self.days:
            return None
        last = day if self.end > self.start else day + timedelta(days=1)
        return self._instant(day, self.start), self._instant(last, self.end)

    def _instant(self, day: date, minutes: int) -> float:
        midnight = datetime.combine(day + timedelta(days=minutes // 1440), time(), ZoneInfo(self.zone))
        # Wall-clock arithmetic; fold=0 is the first of two, and a skipped time moves by the gap (PEP 495).
        return (midnight + timedelta(minutes=minutes % 1440)).timestamp()


def parse(text: str) -> Opening:
    """Parse an opening as written in a configuration.

    Raises:
        ValueError: it is not one; says what is expected.
    """
    match = _OPENING.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not an opening such as '22:00-07:00 Europe/Berlin'")
    start, end = _minutes(match["start"], text), _minutes(match["end"], text)
    if start == end or start == 1440:
        raise ValueError(f"{text!r} opens and closes at once; a whole day is 00:00-24:00")
    try:
        ZoneInfo(match["zone"])
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{match['zone']!r} is not a time zone such as Europe/Berlin or UTC") from None
    return Opening(_days(match["days"] or "Mon-Sun", text), start, end, match["zone"])


def _minutes(text: str, hours: str) -> int:
    hour, minute = (int(part) for part in text.split(":"))
    if minute > 59 or hour * 60 + minute > 1440:
        raise ValueError(f"{text} in {hours!r} is not a time of day")
    return hour * 60 + minute


def _days(text: str, hours: str) -> frozenset[int]:
    days: set[int] = set()
    for part in text.replace(" ", "").split(","):
        names = [name.capitalize()[:3] for name in part.split("-")]
        if len(names) > 2 or any(name not in DAYS for name in names):
            raise ValueError(f"{part!r} in {hours!r} is not a day or a range such as Mon-Fri")
        first, last = DAYS.index(names[0]), DAYS.index(names[-1])
        days.update((first + step) % 7 for step in range((last - first) % 7 + 1))
    return frozenset(days)


def spans(openings: Sequence[Opening], at: float) -> list[tuple[float, float]]:
    """Return all open spans from a day before `at` to the horizon, merged and in order."""
    unmerged: list[tuple[float, float]] = []
    for opening in openings:
        today = datetime.fromtimestamp(at, ZoneInfo(opening.zone)).date()
        for step in range(-2, HORIZON_DAYS):
            span = opening.on(today + timedelta(days=step))
            if span is not None and span[1] > span[0]:  # a change of the clock may swallow a short one
                unmerged.append(span)
    merged: list[tuple[float, float]] = []
    for start, end in sorted(unmerged):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True, slots=True)
class OpeningHours:
    """When a job may work; no openings mean always. `finish_by`: not after this, in Unix seconds."""

    openings: tuple[Opening, ...] = ()
    finish_by: float | None = None

    def is_open(self, at: float) -> bool:
        """Whether work is allowed now, the deadline aside."""
        return not self.openings or any(start <= at < end for start, end in spans(self.openings, at))

    def is_over(self, at: float) -> bool:
        """Return whether the deadline has passed."""
        return self.finish_by is not None and at >= self.finish_by

    def opens_at(self, at: float) -> float:
        """Return the next instant at which it is open; `at` itself when it is open then."""
        if self.is_open(at):
            return at
        return min(start for start, _ in spans(self.openings, at) if start > at)

    def opened_at(self, at: float) -> float | None:
        """Return when the opening around `at` began, a week before at most; None when it is closed."""
        if not self.openings:
            return None
        known = spans(self.openings, at - (HORIZON_DAYS - 2) * 86400)  # an opening may have days behind it
        return next((start for start, end in known if start <= at < end), None)

    def closes_at(self, at: float) -> float | None:
        """Return when the opening around `at` ends, or the deadline; None when neither is near."""
        closing = next((end for start, end in spans(self.openings, at) if start <= at < end), None)
        if closing is not None and closing - at > (HORIZON_DAYS - 2) * 86400:
            closing = None  # open around the clock
        ends = [end for end in (closing, self.finish_by) if end is not None]
        return min(ends, default=None)

    def after(self, at: float, work_s: float) -> float | None:
        """Return when `work_s` seconds of open time after `at` have passed; None if beyond a year."""
        if not self.openings:
            return at + work_s
        limit = at + 366 * 86400
        while at < limit:
            for start, end in spans(self.openings, at):
                begun = max(start, at)
                if end <= begun:
                    continue
                if work_s <= end - begun:
                    return begun + work_s
                work_s -= end - begun
                at = end
        return None

    def why_closed(self, at: float) -> str:
        """Return the reason in words; "" when open."""
        if self.is_over(at):
            return f"the deadline {local(self.finish_by or at, self.zone)} has passed"
        if self.is_open(at):
            return ""
        return f"outside the opening hours; opens {local(self.opens_at(at), self.zone)}"

    @property
    def zone(self) -> str:
        """Time zone for messages."""
        return self.openings[0].zone if self.openings else "UTC"


def local(at: float, zone: str = "UTC") -> str:
    """Format an instant in a time zone; one outside the calendar becomes the nearest inside it."""
    return f"{moment(at).astimezone(ZoneInfo(zone)):%a %Y-%m-%d %H:%M %Z}"


def here(at: float) -> str:
    """Format an instant as `local` does, in this machine's time zone."""
    return f"{moment(at).astimezone():%a %Y-%m-%d %H:%M %Z}"


def moment(at: float) -> datetime:
    """Convert Unix seconds to a time in UTC; one outside the calendar becomes the nearest inside it."""
    return datetime.fromtimestamp(min(max(at, 0.0), LAST), UTC)


def seconds(text: str) -> float:
    """Parse a duration such as `90`, `90s`, `30m`, `2h` or `1.5d`, in seconds.

    Raises:
        ValueError: it is not one; says what is expected.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text.strip())
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a duration such as 90s, 30m, 2h or 1.5d")
    return float(match[1]) * _UNITS_S[match[2]]


def instant(text: str) -> float:
    """Parse an ISO 8601 time with its offset, as in 2026-11-27T18:00+01:00, to Unix seconds.

    Raises:
        ValueError: not such a time, or one without an offset: it would mean another instant elsewhere.
    """
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is not a time such as 2026-11-27T18:00+01:00") from None
    if when.tzinfo is None:
        raise ValueError(f"{text!r} names no offset; write it as in 2026-11-27T18:00+01:00")
    return stamp(when)


def stamp(when: datetime) -> float:
    """Convert an aware time to Unix seconds.

    Raises:
        ValueError: it lies before 1970 or so late that other zones have no date for it.
    """
    seconds = (when - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()  # as far as datetime reaches
    if not 0 <= seconds <= LAST:
        raise ValueError(f"{when.isoformat()} is not a time between 1970 and 9999")
    return seconds
