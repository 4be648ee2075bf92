"""Read terms records: what a text permits, as read on a day, for one layer and one exact version.

Shipped records are in `data/terms/*.toml`; a user's folder overlays them. Only `load_registry` reads files;
the day is always passed in.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, TermsRefused
from harvester.system.hosts import LOOPBACK, plain_host, unexplained_words
from harvester.system.own_files import MAX_TOML_BYTES, read_bytes
from harvester.terms.obligations import require_known

SEVERITY = ("permit", "duties", "restrict", "unknown")
LAYERS = ("weights", "service", "router")
ESTABLISHED = ("primary", "third_party", "general")
GRACE = timedelta(days=90)
YEAR = timedelta(days=366)
# Begins the part of a shell pattern that is no plain text.
_WILDCARD = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TermsRecord:
    """One layer's terms, as read on a day.

    Attributes:
        layer: weights (the model's licence), service (who hosts it), router (who forwards to hosts).
        host, model: shell-style patterns, any of which may match; `except_model` takes back.
        verdict: permit, duties, restrict or unknown, for training on the answers.
        duties: see `obligations`; each is checked at training and export, or printed in the documents.
        conditions: thresholds that only the operator can judge; printed, never checked.
        student_line: a restriction that is lifted, as a duty, for students of this line only.
        evaluation: answers may be collected to evaluate models, although training is restricted.
        covers_weights: the service's terms cover its models too: no record of weights is needed.
        provider: the name under which a router knows this service.
        established: primary (text or a tracked copy of it read), third_party (someone's account of it),
            general (common knowledge).
        source: what was read, where it is not the text at `url` itself.
        seen: day of the copy that was read. changed: day on which the text was found to differ from it.
        review_after: stale from then on, or a year after `seen`; 90 days later it counts as unknown.
        superseded_by: record of a later version; this one counts only for rows already harvested.
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

    def applies_to_host(self, host: str) -> bool:
        """Return whether the record covers what that host serves."""
        name = plain_host(host)
        return any(_matches(name, pattern.lower()) for pattern in self.host)

    def applies_to_model(self, model: str) -> bool:
        """Return whether the record covers that model.

        Patterns match the name after the last slash; a pattern that has a slash matches the whole name.
        """
        lower = model.lower()
        name = lower.rsplit("/", 1)[-1]  # else `qwen3-8b/gpt-5` would begin like a Qwen

        def matches(patterns: Iterable[str]) -> bool:
            return any(_matches(lower if "/" in p else name, p.lower()) for p in patterns)

        return matches(self.model) and not matches(self.except_model)

    def unexplained_words(self, model: str) -> list[str]:
        """Return words of a model's name that this record does not explain: it may be a derivative."""
        return unexplained_words(model, self.model)

    @property
    def opens_training(self) -> bool:
        """Return whether the record permits training, with or without duties."""
        return self.verdict in {"permit", "duties"}

    @property
    def good_until(self) -> date:
        """Last day before a review is due: at most a year after `seen`, whatever the record says."""
        return self.review_after if self.mock else min(self.review_after, self.seen + YEAR)

    def is_stale(self, today: date) -> bool:
        """Return whether a review is due."""
        return today > self.good_until

    def in_force(self, today: date) -> bool:
        """Return whether the record counts: read, not long past its review, text not known to differ."""
        is_read = self.mock or self.seen <= today  # a day in the future means this clock was set back
        return is_read and self.changed is None and today <= self.good_until + GRACE

    def citation(self) -> str:
        """Return record, gist, source and day in one line."""
        second_hand = ", a second-hand reading" if self.established != "primary" else ""
        return f"{self.id}: {self.gist} ({self.url}, seen {self.seen}{second_hand})"


@dataclass(frozen=True, slots=True)
class Registry:
    """Hold all terms records by id, the shipped ones overlaid by a user's."""

    records: Mapping[str, TermsRecord]

    def find(self, record_id: str) -> TermsRecord | None:
        """Return the record of that id, None if there is none."""
        return self.records.get(record_id)


def load_registry(*overlays: Path) -> Registry:
    """Read the shipped records, overlaid by the TOML files of a user's folders; a missing folder is empty.

    An overlay may add records, renew the days of a reading, fill in what was unknown, and tighten. It may not
    loosen a reading, because that would override the gate.

    Raises:
        ConfigError: a file that holds no terms records; names it.
        TermsRefused: a record permits more than the one it replaces.
    """
    shipped = files("harvester_data").joinpath("terms")
    sources = sorted(
        (item.name, item.read_text(encoding="utf-8"))
        for item in shipped.iterdir()
        if item.name.endswith(".toml")
    )
    records = _merged({}, sources)
    for folder in overlays:  # later folders replace records of the same id
        texts = [(str(path), _text(path)) for path in sorted(folder.glob("*.toml"))]
        overlaid = _merged(records, texts)
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
        successor = records.get(above.superseded_by)
        why = "superseded by a missing record" if successor is None else loosened(below, successor)
    if why:
        raise TermsRefused(
            f"this folder loosens a reading ({why}): {below.citation()}",
            place=f"{folder}: record {below.id!r}",
            remedy="what a teacher allows you beyond its terms, or in newer ones, is a permission: "
            "`harvester terms record`",
        )


def loosened(below: TermsRecord, above: TermsRecord) -> str:
    """Return in which point `above` permits more than `below`; "" if in none.

    Unknown values may be filled in, and days may be renewed.
    """
    if set(below.host) - set(above.host) or set(below.model) - set(above.model):
        return "it covers fewer hosts or models"
    if set(above.except_model) - set(below.except_model) or above.layer != below.layer:
        return "it covers fewer models or another layer"
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
        return read_bytes(path, MAX_TOML_BYTES, follows_links=True).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"can't be read: {error}", place=str(path), remedy="save it as UTF-8 text, or remove it"
        ) from None


def _merged(records: Mapping[str, TermsRecord], sources: Iterable[tuple[str, str]]) -> dict[str, TermsRecord]:
    fresh: dict[str, TermsRecord] = {}
    for place, text in sources:
        for record in parse(text, place):
            if record.id in fresh:  # within one folder a second record would win silently
                raise ConfigError(
                    f"there are two records {record.id!r} in this folder",
                    place=place,
                    remedy="remove one, or give it an id of its own",
                )
            fresh[record.id] = record
    return {**records, **fresh}


@lru_cache(maxsize=256)  # a run reads the shipped files three times; parsing them takes 60 ms
def parse(text: str, place: str) -> tuple[TermsRecord, ...]:
    """Parse the records of one TOML file.

    Raises:
        ConfigError: names file, record and field.
    """
    try:
        rows = tomllib.loads(text)["record"]
    except (ValueError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"holds no terms records: {error}", place=place, remedy="see data/terms/README.md"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError("`record` must be a list of tables", place=place, remedy="write [[record]]")
    return tuple(_record(row, f"{place}: record {row.get('id', '?')!r}") for row in rows)


# Remedy of a record whose field is wrong.
_FIELDS = "correct the field; data/terms/README.md lists them"

_LISTS = ("host", "model", "except_model", "duties", "conditions")
_DATES = ("seen", "review_after", "effective", "changed")
_FLAGS = ("evaluation", "covers_weights", "mock")
_CHOICES = {"verdict": SEVERITY, "layer": LAYERS, "established": ESTABLISHED}


def _record(row: Mapping[str, Any], place: str) -> TermsRecord:
    row = {**row, **dict(row.get("match", {}))}
    row.pop("match", None)
    unknown = set(row) - {f.name for f in fields(TermsRecord)}
    if unknown:
        raise ConfigError(
            f"unknown fields {sorted(unknown)}", place=place, remedy="see data/terms/README.md for all fields"
        )
    for name, value in row.items():
        _check(name, value, place)
    lists = {name: _listed(row[name]) for name in _LISTS if name in row}
    try:
        record = TermsRecord(**{**row, **lists})
    except TypeError as error:
        message = str(error).replace("TermsRecord.__init__() ", "")
        raise ConfigError(message, place=place, remedy=_FIELDS) from None
    if record.mock and not (set(record.host) <= LOOPBACK and record.model == ("mock-teacher*",)):
        raise ConfigError(
            "a mock record may cover only mock-teacher* on loopback hosts", place=place, remedy=_FIELDS
        )
    if record.layer == "weights" and any(len(re.sub(r"[^a-z0-9]", "", m.lower())) < 3 for m in record.model):
        raise ConfigError(
            "a record of weights must name its models: a bare pattern would cover all",
            place=place,
            remedy='name them, as in model = ["mymodel-7b*"]',
        )
    for duty in record.duties:
        require_known(duty, place)
    return record


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check(name: str, value: Any, place: str) -> None:
    if name in _DATES:
        is_valid = isinstance(value, date) and not isinstance(value, datetime)
    elif name in _FLAGS:
        is_valid = isinstance(value, bool)
    elif name in _LISTS and isinstance(value, list):
        is_valid = all(isinstance(each, str) and each for each in value)
    else:
        is_valid = isinstance(value, str) and (bool(value) or name in {"provider", "superseded_by"})
    if not is_valid:
        raise ConfigError(f"{name} = {value!r} has the wrong type or is empty", place=place, remedy=_FIELDS)
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ConfigError(
            f"{name} {value!r} is not one of {', '.join(_CHOICES[name])}", place=place, remedy=_FIELDS
        )


def _matches(name: str, pattern: str) -> bool:
    """Return whether a name matches a shell pattern; most differ before its first wildcard.

    `fnmatchcase` compiles a regular expression for each pattern, 0.2 ms of every run for each of 200.
    """
    return name.startswith(_WILDCARD.split(pattern, maxsplit=1)[0]) and fnmatchcase(name, pattern)
