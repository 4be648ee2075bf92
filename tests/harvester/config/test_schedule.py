"""Test opening hours over changes of the clock, and a run that keeps to them on a simulated clock."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.config import schedule
from harvester.config.schedule import OpeningHours, parse
from harvester.errors import Ending
from harvester.run.background import schedule_watch
from harvester.run.endings import Stop

BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = OpeningHours((parse("22:00-07:00 Europe/Berlin"),))


def at(text: str, *, fold: int = 0) -> float:
    """Unix seconds of a wall-clock time in Berlin."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold).timestamp()


@pytest.mark.parametrize(
    ("when", "is_open"),
    [
        ("2026-11-24T21:59:59", False),
        ("2026-11-24T22:00:00", True),
        ("2026-11-25T00:00:00", True),
        ("2026-11-25T06:59:59", True),
        ("2026-11-25T07:00:00", False),
        ("2026-11-25T12:00:00", False),
    ],
)
def test_a_night_spans_midnight_and_its_end_is_outside(when: str, is_open: bool) -> None:
    assert NIGHT.is_open(at(when)) is is_open


def test_days_are_those_on_which_it_opens() -> None:
    work = OpeningHours((parse("Mon-Thu,Sun 22:00-07:00 Europe/Berlin"),))
    assert work.is_open(at("2026-11-26T23:00"))  # Thursday
    assert work.is_open(at("2026-11-27T06:00"))  # into Friday
    assert not work.is_open(at("2026-11-27T23:00"))
    assert not work.is_open(at("2026-11-28T23:00"))
    assert work.opens_at(at("2026-11-27T12:00")) == at("2026-11-29T22:00")
    around = parse("Fri-Mon 00:00-24:00 UTC")
    assert around.days == {4, 5, 6, 0}


def test_the_night_of_the_change_to_summer_is_an_hour_shorter_and_to_winter_longer() -> None:
    spring, autumn = at("2026-03-28T22:00"), at("2026-10-24T22:00")
    assert NIGHT.closes_at(spring) == spring + 8 * 3600
    assert NIGHT.closes_at(autumn) == autumn + 10 * 3600


def test_an_edge_that_is_skipped_moves_by_the_gap_and_one_that_comes_twice_counts_once() -> None:
    early = OpeningHours((parse("02:30-05:00 Europe/Berlin"),))
    # 2026-03-29: 02:00 becomes 03:00, so 02:30 never is; it opens at 03:30 summer time.
    assert early.opens_at(at("2026-03-29T00:00")) == at("2026-03-29T03:30")
    until = OpeningHours((parse("00:00-02:30 Europe/Berlin"),))
    # 2026-10-25: 03:00 becomes 02:00; the first 02:30 closes, the second does not open it again.
    closes = at("2026-10-25T02:30", fold=0)
    assert until.closes_at(at("2026-10-25T01:00")) == closes
    assert not until.is_open(at("2026-10-25T02:15", fold=1))
    swallowed = OpeningHours((parse("02:00-03:00 Europe/Berlin"),))
    assert not swallowed.is_open(at("2026-03-29T03:00"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22:00-07:00",
        "22:00-22:00 UTC",
        "24:00-07:00 UTC",
        "25:00-07:00 UTC",
        "22:60-07:00 UTC",
        "22:00-07:00 Mars/Base",
        "Mon-Fry 22:00-07:00 UTC",
        "22:00 07:00 UTC",
        "22:00-24:01 UTC",
        "22:00-07:00 ../../etc/passwd",
    ],
)
def test_a_wrong_opening_is_explained(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|opens and closes"):
        parse(text)


def test_work_is_done_in_open_time_only() -> None:
    begin = at("2026-11-24T21:00")
    assert NIGHT.after(begin, 3600) == at("2026-11-24T23:00")
    assert NIGHT.after(begin, 10 * 3600) == at("2026-11-25T23:00")
    assert OpeningHours().after(begin, 60) == begin + 60
    assert NIGHT.after(begin, 400 * 9 * 3600) is None


moments = st.integers(min_value=1_700_000_000, max_value=1_900_000_000).map(float)
openings = st.builds(
    lambda days, start, length, zone: schedule.Opening(
        frozenset(days), start, (start + length) % 1440 or 1440, zone
    ),
    st.sets(st.integers(0, 6), min_size=1),
    st.integers(0, 1439),
    st.integers(60, 1380),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC", "Asia/Kolkata"]),
)


@given(st.lists(openings, min_size=1, max_size=3), moments)
def test_edges_are_edges(several: list[schedule.Opening], now: float) -> None:
    hours = OpeningHours(tuple(several))
    opens = hours.opens_at(now)
    assert opens >= now
    assert hours.is_open(opens)
    if opens > now:
        assert not hours.is_open((now + opens) / 2)
        assert hours.why_closed(now)
    closes = hours.closes_at(opens)
    if closes is not None:
        assert closes > opens
        assert not hours.is_open(closes)
        assert hours.is_open((opens + closes) / 2)
    done = hours.after(now, 1800.0)
    assert done is None or done >= now + 1800.0


class Hands:
    """A clock whose wall time jumps when told; waiting lets it pass at once."""

    def __init__(self, wall: float) -> None:
        self.wall_s = wall
        self.waited: list[float] = []
        self.jumps: dict[int, float] = {}

    def now(self) -> float:
        return sum(self.waited)

    def wall(self) -> float:
        return self.wall_s

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("never sleeps blindly")

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        self.waited.append(seconds)
        self.wall_s += seconds + self.jumps.pop(len(self.waited), 0.0)
        await asyncio.sleep(0)


class Job:
    """Stands for the pass: notes when it is held and let go."""

    def __init__(self, clock: Hands) -> None:
        self.clock = clock
        self.told: list[tuple[str, float]] = []

    def pause(self, source: str, reason: str) -> None:
        assert source == schedule_watch.SCHEDULE
        assert "opens" in reason
        self._tell("hold")

    def resume(self, source: str) -> None:
        self._tell("go")

    def _tell(self, what: str) -> None:
        if not self.told or self.told[-1][0] != what:
            self.told.append((what, self.clock.wall()))


async def kept(opening: OpeningHours, clock: Hands, *, wait: bool, until: float) -> tuple[Job, Stop]:
    job, stop = Job(clock), Stop()
    task = asyncio.create_task(schedule_watch.watch(opening, clock, stop, job, wait=wait))  # type: ignore[arg-type]
    while clock.wall() < until and not stop.event.is_set():
        await asyncio.sleep(0)
    task.cancel()
    return job, stop


def test_a_waiting_run_is_held_by_day_and_goes_on_by_night_over_a_change_of_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedule_watch, "LOOK_EVERY_S", 600.0)  # fewer looks, the same edges
    clock = Hands(at("2026-03-28T12:00"))
    job, stop = asyncio.run(kept(NIGHT, clock, wait=True, until=at("2026-03-30T12:00")))
    assert not stop.event.is_set()
    changes = [(what, datetime.fromtimestamp(when, BERLIN).replace(tzinfo=None)) for what, when in job.told]
    close = timedelta(seconds=1)
    for (what, when), (wanted, text) in zip(
        changes,
        [
            ("hold", "2026-03-28T12:00"),
            ("go", "2026-03-28T22:00"),
            ("hold", "2026-03-29T07:00"),
            ("go", "2026-03-29T22:00"),
            ("hold", "2026-03-30T07:00"),
        ],
        strict=True,
    ):
        assert what == wanted
        assert abs(when - datetime.fromisoformat(text)) <= close
    assert max(clock.waited) == 600.0


@pytest.mark.parametrize("jump_s", [9 * 3600.0, -5 * 3600.0, 86_400.0 * 2 + 9 * 3600])
def test_a_jump_of_the_wall_clock_is_noticed_at_the_next_look(jump_s: float) -> None:
    clock = Hands(at("2026-11-24T23:00"))
    clock.jumps[10] = jump_s  # ten half minutes later it is day, or still evening
    _, stop = asyncio.run(kept(NIGHT, clock, wait=False, until=at("2026-12-24T12:00")))
    assert stop.ending == Ending.HOURS
    assert clock.now() <= 11 * schedule_watch.LOOK_EVERY_S


def test_a_deadline_ends_also_a_run_that_waits() -> None:
    end = at("2026-11-25T03:00")
    clock = Hands(at("2026-11-24T20:00"))
    job, stop = asyncio.run(kept(OpeningHours(NIGHT.openings, end), clock, wait=True, until=end + 3600))
    assert [what for what, _ in job.told] == ["hold", "go"]
    assert stop.ending == Ending.DEADLINE
    assert 0 <= clock.wall() - end < 1


@pytest.mark.parametrize(("text", "wanted"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5d", 129_600)])
def test_durations(text: str, wanted: float) -> None:
    assert schedule.seconds(text) == wanted
    for far in ("9" * 400, "9" * 400 + "d", "٣s", "1e9"):
        with pytest.raises(ValueError, match="is not a duration"):
            schedule.seconds(far)


def test_an_instant_names_its_offset() -> None:
    assert schedule.instant("2026-11-27T18:00+01:00") == datetime(2026, 11, 27, 17, tzinfo=UTC).timestamp()
    assert schedule.instant("2026-11-27T17:00Z") == schedule.instant("2026-11-27T18:00+01:00")
    for text in ("2026-11-27T18:00", "Friday", ""):
        with pytest.raises(ValueError, match="2026-11-27T18:00"):
            schedule.instant(text)
    for text in ("0001-01-01T00:00+14:00", "9999-12-31T23:59-14:00", "1969-12-31T23:59+00:00"):
        with pytest.raises(ValueError, match="between 1970 and 9999"):
            schedule.instant(text)
    assert [schedule.local(far, "Asia/Tokyo")[4:8] for far in (-1e18, 1e18)] == ["1970", "9999"]


def test_an_opening_that_follows_another_without_a_gap_began_with_it() -> None:
    nights = (parse("Mon-Fri 19:00-07:00 Europe/Berlin"), parse("Sat-Sun 00:00-24:00 Europe/Berlin"))
    hours, zone = OpeningHours(nights), ZoneInfo("Europe/Berlin")

    def opened(day: int, hour: int) -> datetime | None:
        at = hours.opened_at(datetime(2027, 1, day, hour, tzinfo=zone).timestamp())
        return None if at is None else datetime.fromtimestamp(at, zone)

    assert opened(5, 19) == opened(6, 6) == datetime(2027, 1, 5, 19, tzinfo=zone)  # a Tuesday
    assert opened(8, 20) == opened(10, 23) == datetime(2027, 1, 8, 19, tzinfo=zone)
    assert opened(6, 7) is opened(11, 0) is None
    week = OpeningHours((parse("Mon-Sat 00:00-24:00 UTC"),))
    saturday, monday = (datetime(2027, 1, day, tzinfo=ZoneInfo("UTC")).timestamp() for day in (9, 4))
    assert week.opened_at(saturday + 86_399) == monday
    assert OpeningHours().opened_at(saturday) is None
