"""What is known of teachers' terms: records as read on a day, one for each layer of each exact version.

Records are rows of `data/terms/*.toml`; a user's folder overlays them. Only `load_registry` reads files;
everything else is pure and gets the day passed in.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from harvester.duties import checked
from harvester.errors import ConfigError

SEVERITY = ("permit", "duties", "restrict", "unknown")
LAYERS = ("weights", "service", "router")
ESTABLISHED = ("primary", "third_party", "general")
GRACE = timedelta(days=90)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TermsRecord:
    """One layer's terms, as read on a day.

    Attributes:
        layer: weights (the model's licence), service (who hosts it), router (who forwards to hosts).
        host, model: shell-style patterns, any of which may match; `except_model` takes back.
        verdict: permit, duties, restrict or unknown, for training on what the teacher answered.
        duties: see `duties`; each is evaluated at training and export, or printed on the papers.
        conditions: thresholds that only the operator can judge; printed, never evaluated.
        student_line: a restriction that is lifted, as a duty, for students of this line only.
        evaluation: answers may be collected to evaluate models, although training is restricted.
        covers_weights: a service's terms speak for its models too: no record of weights is needed.
        provider: the name under which a router knows this service.
        established: primary (text or a tracked copy of it read), third_party (someone's account of it),
            general (common knowledge).
        source: what was read, where it is not the text at `url` itself.
        seen: day of the copy that was read. changed: day on which the text was found to differ from it.
        review_after: stale from then on; 90 days later it counts as unknown.
        superseded_by: record of a later version; this one speaks only for rows already harvested.
    """

    id: str
    layer: str
    host: tuple[str, ...]
    model: tuple[str, ...]
    verdict: str
    gist: str
    url: str
    licence: str
    source: str
    seen: date
    review_after: date
    established: str
    except_model: tuple[str, ...] = ()
    duties: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    student_line: str = ""
    evaluation: bool = False
    covers_weights: bool = False
    provider: str = ""
    effective: date | None = None
    changed: date | None = None
    text_sha256: str = ""
    superseded_by: str = ""
    mock: bool = False

    def speaks_of_host(self, host: str) -> bool:
        """Whether the record is about what is served there."""
        return any(fnmatchcase(host.lower(), pattern.lower()) for pattern in self.host)

    def speaks_of_model(self, model: str) -> bool:
        """Whether the record is about that model; an owner before a slash may be left out of a pattern."""
        names = {model.lower(), model.lower().rsplit("/", 1)[-1]}

        def named(patterns: Iterable[str]) -> bool:
            return any(fnmatchcase(name, pattern.lower()) for name in names for pattern in patterns)

        return named(self.model) and not named(self.except_model)

    def speaks_of(self, host: str, model: str) -> bool:
        """Whether the record is about that model at that host."""
        return self.speaks_of_host(host) and self.speaks_of_model(model)

    def is_stale(self, today: date) -> bool:
        """Due for a review."""
        return today > self.review_after

    def in_force(self, today: date) -> bool:
        """Not long past its review, and its text not known to have changed."""
        return self.changed is None and today <= self.review_after + GRACE

    def cited(self) -> str:
        """Record, gist, source and day, in one line."""
        second_hand = ", a second-hand reading" if self.established != "primary" else ""
        return f"{self.id}: {self.gist} ({self.url}, seen {self.seen}{second_hand})"


@dataclass(frozen=True, slots=True)
class Registry:
    """All records, by id; a user's folder overlays the shipped ones."""

    records: Mapping[str, TermsRecord]

    def find(self, record_id: str) -> TermsRecord | None:
        """The record of that id."""
        return self.records.get(record_id)


def load_registry(*overlays: Path) -> Registry:
    """Shipped records, overlaid by the TOML files of the user's folders (a missing folder is empty).

    Raises:
        ConfigError: a file that is no registry; names it.
    """
    shipped = files("harvester_data").joinpath("terms")
    sources = sorted(
        (item.name, item.read_text(encoding="utf-8"))
        for item in shipped.iterdir()
        if item.name.endswith(".toml")
    )
    records = _merged({}, sources)
    for folder in overlays:  # later folders replace records of the same id
        own = [(str(path), _text(path)) for path in sorted(folder.glob("*.toml"))]
        records = _merged(records, own)
    return Registry(records)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't be read: {error}", place=str(path)) from None


def _merged(records: Mapping[str, TermsRecord], sources: Iterable[tuple[str, str]]) -> dict[str, TermsRecord]:
    fresh: dict[str, TermsRecord] = {}
    for place, text in sources:
        for record in parse(text, place):
            if record.id in fresh:  # within one folder a second record would win silently
                raise ConfigError(f"record {record.id!r} is written twice", place=place)
            fresh[record.id] = record
    return {**records, **fresh}


def parse(text: str, place: str) -> list[TermsRecord]:
    """The records of one TOML file.

    Raises:
        ConfigError: names file, record and field.
    """
    try:
        rows = tomllib.loads(text)["record"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(
            f"is no terms registry: {error}", place=place, remedy="see data/terms/README.md"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError("`record` has to be a list of tables: [[record]]", place=place)
    return [_record(row, f"{place}: record {row.get('id', '?')!r}") for row in rows]


_LISTS = ("host", "model", "except_model", "duties", "conditions")
_DATES = ("seen", "review_after", "effective", "changed")
_FLAGS = ("evaluation", "covers_weights", "mock")
_CHOICES = {"verdict": SEVERITY, "layer": LAYERS, "established": ESTABLISHED}


def _record(row: Mapping[str, Any], place: str) -> TermsRecord:
    row = {**row, **dict(row.get("match", {}))}
    row.pop("match", None)
    unknown = set(row) - {f.name for f in fields(TermsRecord)}
    if unknown:
        raise ConfigError(f"unknown fields {sorted(unknown)}", place=place)
    for name, value in row.items():
        _check(name, value, place)
    lists = {name: _listed(row[name]) for name in _LISTS if name in row}
    try:
        record = TermsRecord(**{**row, **lists})
    except TypeError as error:
        raise ConfigError(str(error).replace("TermsRecord.__init__() ", ""), place=place) from None
    if record.mock and not (set(record.host) <= LOOPBACK and record.model == ("mock-teacher*",)):
        raise ConfigError("a mock record speaks of mock-teacher* on loopback hosts only", place=place)
    for duty in record.duties:
        checked(duty, place)
    return record


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check(name: str, value: Any, place: str) -> None:
    if name in _DATES:
        good = isinstance(value, date) and not isinstance(value, datetime)
    elif name in _FLAGS:
        good = isinstance(value, bool)
    elif name in _LISTS and isinstance(value, list):
        good = all(isinstance(each, str) and each for each in value)
    else:
        good = isinstance(value, str) and (bool(value) or name in {"provider", "superseded_by"})
    if not good:
        raise ConfigError(f"{name} = {value!r} has the wrong type or is empty", place=place)
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(_CHOICES[name])}", place=place)
