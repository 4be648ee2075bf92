"""The facts all papers are written from: shards, their lineages, the records they name, the student."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from harvester.terms.lineage import Lineage
from harvester.terms.obligations import licence_of
from harvester.terms.records import Registry, TermsRecord

SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0",
        "MIT",
        "CC-BY-4.0",
        "CC-BY-SA-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-SA-4.0",
        "CC0-1.0",
    )
}
"""Licence ids known to be SPDX's; any other is written as a name, never as an id that may not exist."""


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """A sealed file: name relative to the data set's folder, SHA-256, rows, bytes."""

    name: str
    sha256: str
    rows: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """Rows as published.

    Attributes:
        url: page of the data set; creator: who publishes it.
        licence: a Hub or SPDX id where the operator chose one; None: what the duties leave.
        lineages: as the shards carry them. records: the terms records they name.
        prompt_sources: where the prompts came from, with their licence, one line each.
        columns: (name, Arrow type or "json", meaning) of the files; None: those of a corpus (`schema`).
    """

    name: str
    version: str
    url: str
    creator: str
    published: date
    shards: tuple[ShardFacts, ...]
    lineages: tuple[Lineage, ...]
    records: tuple[TermsRecord, ...]
    licence: str | None = None
    prompt_sources: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    columns: tuple[tuple[str, str, str], ...] | None = None

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def duties(self) -> tuple[str, ...]:
        """All duties, those of the lineages and of the records, each once."""
        written = [duty for lineage in self.lineages for duty in lineage.duties]
        return tuple(dict.fromkeys([*written, *(duty for r in self.records for duty in r.duties)]))

    @property
    def teachers(self) -> tuple[tuple[str, str], ...]:
        """(model, host) of every teacher, in order, each once."""
        return tuple(
            dict.fromkeys(
                (lineage.model or "unknown", lineage.host or "unknown") for lineage in self.lineages
            )
        )

    @property
    def is_mock(self) -> bool:
        """Whether any row is the mock teacher's."""
        return any(lineage.mock for lineage in self.lineages)

    @property
    def licence_id(self) -> str:
        """Hub id of the licence; "other" where no single one fits."""
        return licence_of(self.duties, self.licence)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFacts:
    """A model that learned from a data set.

    Attributes:
        base: name of the base model; base_licence: Hub or SPDX id. base_sha256, sha256: of config and
            weights, and of the adapter, "" where unknown.
        licence: as for `Dataset`. merged: whole weights, the adapter folded in.
    """

    name: str
    version: str
    base: str
    base_licence: str
    trained_on: date
    dataset: DatasetFacts
    licence: str | None = None
    sha256: str = ""
    base_sha256: str = ""
    merged: bool = False

    @property
    def licence_id(self) -> str:
        """Hub id of the licence: the operator's, what the duties force, else the base's."""
        duties = self.dataset.duties
        return licence_of(duties, self.licence or (None if _binds(duties) else self.base_licence))


def _binds(duties: Sequence[str]) -> bool:
    return any(duty == "noncommercial" or duty.startswith("card_licence:") for duty in duties)


def records_of(lineages: Sequence[Lineage], registry: Registry) -> tuple[TermsRecord, ...]:
    """The records that lineages name (`terms_id`, comma-separated), in order; unknown ids are left out."""
    named = [name.strip() for lineage in lineages for name in lineage.terms_id.split(",")]
    return tuple(registry.records[name] for name in dict.fromkeys(named) if name in registry.records)


def slug(text: str) -> str:
    """Small letters, digits, dots and dashes, as the Hub wants a `license_name`."""
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-.") or "unnamed"


def cell(text: str) -> str:
    """Text that can't break out of a line or a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
