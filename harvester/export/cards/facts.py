"""Hold the facts that a data set's documents are written from: files, lineages, terms records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from harvester.terms.lineage import Lineage
from harvester.terms.obligations import licence_of
from harvester.terms.records import Registry, TermsRecord

# Licence ids that SPDX knows, by their lower-case form. Any other is written as a name, never as an SPDX id.
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


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One file of a data set: name relative to its folder, SHA-256, rows, bytes."""

    name: str
    sha256: str
    rows: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """A data set as it is published.

    Attributes:
        url: page of the data set; creator: who publishes it.
        licence: a Hub or SPDX id where the operator chose one; None: what the duties allow.
        lineages: as the shards carry them. records: the terms records they name.
        prompt_sources: where the prompts came from, with their licence, one line each.
        curation: how rows were chosen, one sentence each.
        columns: (name, Arrow type or "json", meaning) of the files; None: the columns of a corpus (`schema`).
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
    curation: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(shard.rows for shard in self.shards)

    @property
    def duties(self) -> tuple[str, ...]:
        """All duties, first those stored in the lineages, then those of the records, each once."""
        stored = [duty for lineage in self.lineages for duty in lineage.duties]
        return tuple(dict.fromkeys([*stored, *(duty for record in self.records for duty in record.duties)]))

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


def records_of(lineages: Sequence[Lineage], registry: Registry) -> tuple[TermsRecord, ...]:
    """Return the records that lineages name in `terms_id`, in order; unknown ids are left out."""
    names = [name.strip() for lineage in lineages for name in lineage.terms_id.split(",")]
    return tuple(registry.records[name] for name in dict.fromkeys(names) if name in registry.records)
