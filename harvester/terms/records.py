"""What is known of teachers' terms: records as read on a day, one for each layer of each exact version.

Records are rows of `data/terms/*.toml`; a user's folder overlays them. Only `load_registry` reads files;
everything else is pure and gets the day passed in.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, TermsRefused
from harvester.system.hosts import LOOPBACK, plain_host, strange_words
from harvester.terms.obligations import checked

SEVERITY = ("permit", "duties", "restrict", "unknown")
LAYERS = ("weights", "service", "router")
ESTABLISHED = ("primary", "third_party", "general")
GRACE = timedelta(days=90)
YEAR = timedelta(days=366)


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
        review_after: stale from then on, or a year after `seen`; 90 days later it counts as unknown.
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
        name = plain_host(host)
        return any(fnmatchcase(name, pattern.lower()) for pattern in self.host)

    def speaks_of_model(self, model: str) -> bool:
        """Whether the record is about that model: the name after the last slash, unless a pattern has one."""
        whole = model.lower()
        name = whole.rsplit("/", 1)[-1]  # else `qwen3-8b/gpt-5` would begin like a Qwen

        def named(patterns: Iterable[str]) -> bool:
            return any(fnmatchcase(whole if "/" in p else name, p.lower()) for p in patterns)

        return named(self.model) and not named(self.except_model)

    def speaks_of(self, host: str, model: str) -> bool:
        """Whether the record is about that model at that host."""
        return self.speaks_of_host(host) and self.speaks_of_model(model)

    def strange_in(self, model: str) -> list[str]:
        """Words in a model's name that this record does not explain: a derivative may bear them."""
        return strange_words(model, self.model)

    @property
    def opens_training(self) -> bool:
        """Whether it permits, with or without duties."""
        return self.verdict in {"permit", "duties"}

    @property
    def good_until(self) -> date:
        """Day of the review: no reading holds longer than a year, whatever it says of itself."""
        return self.review_after if self.mock else min(self.review_after, self.seen + YEAR)

    def is_stale(self, today: date) -> bool:
        """Due for a review."""
        return today > self.good_until

    def in_force(self, today: date) -> bool:
        """Read already, not long past its review, and its text not known to have changed."""
        is_read = self.mock or self.seen <= today  # else this machine's clock was set back
        return is_read and self.changed is None and today <= self.good_until + GRACE

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

    An overlay adds records, renews the days of a reading, fills in what was unknown and tightens; it can't
    loosen what was read, for that would be an override under another name.

    Raises:
        ConfigError: a file that is no registry; names it.
        TermsRefused: a record that permits more than the one of the same id below it.
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
        overlaid = _merged(records, own)
        for name, below in records.items():
            _forbid_loosening(below, overlaid[name], overlaid, str(folder))
        records = overlaid
    return Registry(records)


def _forbid_loosening(
    below: TermsRecord, above: TermsRecord, records: Mapping[str, TermsRecord], folder: str
) -> None:
    """Raise where a record of the same id permits more than the reading it replaces."""
    if above is below:
        return
    why = loosened(below, above)
    if not why and above.superseded_by and not below.superseded_by:
        heir = records.get(above.superseded_by)
        why = "superseded by a record that isn't there" if heir is None else loosened(below, heir)
    if why:
        raise TermsRefused(
            f"this folder loosens a reading ({why}): {below.cited()}",
            place=f"{folder}: record {below.id!r}",
            remedy="what a teacher allows you beyond its terms, or in newer ones, is a permission: "
            "`harvester terms record`",
        )


def loosened(below: TermsRecord, above: TermsRecord) -> str:
    """In which point a record permits more than another; '' where in none.

    What nobody had read may be filled in; days may be renewed.
    """
    if set(below.host) - set(above.host) or set(below.model) - set(above.model):
        return "it speaks of fewer hosts or models"
    if set(above.except_model) - set(below.except_model) or above.layer != below.layer:
        return "it speaks of fewer models or another layer"
    if below.verdict == "unknown":
        return ""
    if above.student_line != below.student_line or (below.mock and not above.mock and above.opens_training):
        return "student_line or mock differs"
    if SEVERITY.index(above.verdict) < SEVERITY.index(below.verdict):
        return f"{below.verdict} becomes {above.verdict}"
    if set(below.duties) - set(above.duties) or set(below.conditions) - set(above.conditions):
        return "duties or conditions are missing"
    for name in ("evaluation", "covers_weights"):
        if getattr(above, name) and not getattr(below, name):
            return f"{name} is opened"
    return ""


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
    if record.layer == "weights" and any(len(re.sub(r"[^a-z0-9]", "", m.lower())) < 3 for m in record.model):
        raise ConfigError("a record of weights names its models: a bare pattern speaks for all", place=place)
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
