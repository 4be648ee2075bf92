"""Write the documents that travel with published rows: card, NOTICE, and the terms records in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import orjson

from harvester.export.cards.curation import curation_lines
from harvester.export.cards.dataset_card import dataset_card
from harvester.export.cards.facts import DatasetFacts, ShardFacts, records_of
from harvester.export.cards.notice import notice
from harvester.terms.lineage import Lineage
from harvester.terms.places import terms_folders
from harvester.terms.records import load_registry

TERMS_NAME = "terms.json"


def write_papers(
    store: Path, name: str, shards: Sequence[ShardFacts], lineages: Sequence[Lineage], *beside: Path
) -> dict[str, bytes]:
    """Return the documents of a store or corpus, by name.

    Args:
        name: of the data set.
        beside: folders from which own terms records are looked for.

    Raises:
        StoreError: the journal can't be read. ConfigError: a terms record can't be used.
    """
    records = records_of(lineages, load_registry(*terms_folders(*beside)))
    dataset = DatasetFacts(
        name=name,
        version="1.0.0",
        url="",
        creator="",
        published=datetime.now(UTC).date(),
        shards=tuple(shards),
        lineages=tuple(lineages),
        records=records,
        curation=curation_lines(store),
    )
    return {
        "README.md": dataset_card(dataset).encode(),
        "NOTICE": notice(dataset, title=name).encode(),
        TERMS_NAME: orjson.dumps([asdict(record) for record in records], option=orjson.OPT_INDENT_2) + b"\n",
    }
