"""Write README.md of a data set."""

from __future__ import annotations

from harvester.export.cards.facts import DatasetFacts
from harvester.export.cards.markdown import (
    cell,
    curation_section,
    document,
    duties_section,
    licence_keys,
    mock_warning,
    teachers_section,
)

# The Hub's `size_categories`: (upper limit in rows, name); above the last limit the largest name applies.
SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
LARGEST = "1B<n<10B"


def size_category(rows: int) -> str:
    """Return the Hub's size category for a number of rows."""
    return next((name for limit, name in SIZES if rows < limit), LARGEST)


def dataset_card(dataset: DatasetFacts) -> str:
    """Return the text of a data set's README.md."""
    header = {
        "pretty_name": dataset.name,
        **licence_keys(dataset.licence_id, dataset),
        **({"language": list(dataset.languages)} if dataset.languages else {}),
        "tags": ["synthetic", "distillation", "distil", *(["mock"] if dataset.is_mock else [])],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "size_categories": [size_category(dataset.rows)],
        "source_datasets": ["original"],
        "task_categories": ["text-generation"],
    }
    body = [
        f"# {cell(dataset.name)}",
        "",
        *mock_warning(dataset),
        f"{dataset.rows:,} answers in {len(dataset.shards):,} files, version {cell(dataset.version)}. "
        "All answers are synthetic: models wrote them.",
        "",
        *teachers_section(dataset),
        "## Prompts",
        "",
        *([f"- {cell(source)}" for source in dataset.prompt_sources] or ["- not described"]),
        "",
        *curation_section(dataset),
        *duties_section(dataset),
        "## Files",
        "",
        "| file | rows | bytes | SHA-256 |",
        "|---|---|---|---|",
        *[f"| {cell(s.name)} | {s.rows:,} | {s.size:,} | `{cell(s.sha256)}` |" for s in dataset.shards],
    ]
    return document(header, body)
