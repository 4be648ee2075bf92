"""README.md of a data set and of an adapter, with the Hub's YAML head.

Keys: huggingface/hub-docs, datasetcard.md and modelcard.md. Values are JSON strings, which are YAML too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from harvester.export.cards.facts import DatasetFacts, StudentFacts, cell, slug
from harvester.terms.obligations import owed

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
READING = "This is a reading of published terms on the days named, not legal advice."


def size_category(rows: int) -> str:
    """The Hub's word for that many rows."""
    return next((word for limit, word in SIZES if rows < limit), "1B<n<10B")


def dataset_card(dataset: DatasetFacts) -> str:
    """README.md of a data set."""
    tags = ["synthetic", "distillation", "distil", *(["mock"] if dataset.is_mock else [])]
    head = {
        "pretty_name": dataset.name,
        **_licence(dataset.licence_id, dataset),
        **({"language": list(dataset.languages)} if dataset.languages else {}),
        "tags": tags,
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "size_categories": [size_category(dataset.rows)],
        "source_datasets": ["original"],
        "task_categories": ["text-generation"],
    }
    body = [
        f"# {cell(dataset.name)}",
        "",
        *_mock_warning(dataset),
        f"{dataset.rows:,} answers in {len(dataset.shards)} Parquet files, version {cell(dataset.version)}. "
        "All answers are synthetic: models wrote them.",
        "",
        *_taught(dataset),
        "## Prompts",
        "",
        *([f"- {cell(source)}" for source in dataset.prompt_sources] or ["- not described"]),
        "",
        *_owed(dataset),
        "## Files",
        "",
        "| file | rows | bytes | SHA-256 |",
        "|---|---|---|---|",
        *[f"| {cell(s.name)} | {s.rows:,} | {s.size:,} | `{cell(s.sha256)}` |" for s in dataset.shards],
    ]
    return _document(head, body)


def model_card(
    student: StudentFacts, scores: Sequence[tuple[str, str]] = (), facts: Sequence[tuple[str, str]] = ()
) -> str:
    """README.md of an adapter, or of whole weights it is folded into.

    Args:
        scores: what was measured, as (name, words). facts: how it was made, likewise.
    """
    dataset = student.dataset
    kind = "An adapter folded into" if student.merged else "A LoRA adapter on"
    head = {
        "base_model": student.base,
        "base_model_relation": "finetune" if student.merged else "adapter",
        "library_name": "transformers" if student.merged else "peft",
        "pipeline_tag": "text-generation",
        **_licence(student.licence_id, dataset),
        "datasets": [dataset.name],
        "tags": ["lora", "synthetic", "distillation", "distil", *(["mock"] if dataset.is_mock else [])],
    }
    body = [
        f"# {cell(student.name)}",
        "",
        *[f"**{cell(sentence)}**\n" for sentence in owed(dataset.duties, "display")],
        *_mock_warning(dataset),
        f"{kind} `{cell(student.base)}` (licence {cell(student.base_licence)}), trained on "
        f"{student.trained_on} on {dataset.rows:,} answers of the teachers below.",
        "",
        *(
            ["| | |", "|---|---|", *[f"| {cell(name)} | {cell(words)} |" for name, words in facts], ""]
            if facts
            else []
        ),
        *_taught(dataset),
        *_owed(dataset),
        *(
            ["## Measured", "", *[f"- {cell(name)}: {cell(words)}" for name, words in scores], ""]
            if scores
            else []
        ),
    ]
    return _document(head, body)


def _licence(licence: str, dataset: DatasetFacts) -> dict[str, str]:
    if licence != "other":
        return {"license": licence}
    named = "-and-".join(slug(r.licence.removeprefix("LicenseRef-")) for r in dataset.records[:3])
    return {"license": "other", "license_name": named or "teacher-terms", "license_link": "NOTICE"}


def _mock_warning(dataset: DatasetFacts) -> list[str]:
    said = "**Answers of the mock teacher, made by rules: of no use outside tests.**"
    return [said, ""] if dataset.is_mock else []


def _taught(dataset: DatasetFacts) -> list[str]:
    lines = ["## Who taught", "", "| model | host |", "|---|---|"]
    lines += [f"| {cell(model)} | {cell(host)} |" for model, host in dataset.teachers]
    lines += ["", "Terms as read:", ""]
    for r in dataset.records:
        second_hand = "" if r.established == "primary" else "; a second-hand reading"
        lines.append(
            f"- `{cell(r.id)}` ({r.verdict}): {cell(r.gist)}. {cell(r.url)}, seen {r.seen}{second_hand}"
        )
    hashes = dict.fromkeys(lineage.permission_sha256 for lineage in dataset.lineages)
    lines += [f"- recorded permission, SHA-256 `{cell(each)}`" for each in hashes if each]
    return [*lines, "", READING, ""]


def _owed(dataset: DatasetFacts) -> list[str]:
    if not dataset.duties:
        return []
    return ["## What is owed", "", *[f"- {cell(duty.replace(':', ': ', 1))}" for duty in dataset.duties], ""]


def _quoted(value: object) -> str:
    # JSON writes a character beyond the first plane as two escapes, which YAML reads as two characters.
    text = json.dumps(str(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _document(head: Mapping[str, object], body: Sequence[str]) -> str:
    lines = ["---"]
    for key, value in head.items():
        if isinstance(value, list):
            lines += [f"{key}:", *[f"- {_quoted(each)}" for each in value]]
        else:
            lines.append(f"{key}: {_quoted(value)}")
    return "\n".join([*lines, "---", *body]).rstrip() + "\n"
