"""Write a student's documents from its rows' lineage: model card, NOTICE, bill of materials, EU summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from harvester.export.cards.curation import curation_lines
from harvester.export.cards.facts import DatasetFacts, ShardFacts, records_of
from harvester.export.cards.markdown import (
    cell,
    curation_section,
    document,
    duties_section,
    licence_keys,
    mock_warning,
    teachers_section,
)
from harvester.export.cards.notice import notice
from harvester.system.command_line.version import VERSION
from harvester.system.files import sha256_of
from harvester.terms.gate import load_registry
from harvester.terms.lineage import Lineage
from harvester.terms.obligations import duties_of_kind
from harvester.terms.places import terms_folders
from trainer.config import TrainConfig
from trainer.model import weights
from trainer.provenance import fingerprint
from trainer.provenance.cyclonedx import ml_bom
from trainer.provenance.eu_summary import eu_summary
from trainer.provenance.student_facts import StudentFacts, base_licence, base_name

BOM = "bom.cdx.json"
EU = "EU_SUMMARY.md"


def write(
    folder: Path,
    config: TrainConfig,
    lineages: Sequence[Lineage],
    facts: Sequence[tuple[str, str]],
    *,
    merged: bool = False,
) -> None:
    """Write README.md, NOTICE, bom.cdx.json and EU_SUMMARY.md into a folder that holds a student.

    Args:
        folder: holds the weights and `hash_tree.rows.jsonl` already.
        facts: rows of the card's table, as (name, text).
        merged: the folder holds merged weights, not an adapter.
    """
    rows = folder / fingerprint.ROWS_FILE
    learned = ShardFacts(rows.name, sha256_of(rows), _lines(rows), rows.stat().st_size)
    dataset = DatasetFacts(
        name=config.corpus.name,
        version="1.0.0",
        url="",
        creator="",
        published=datetime.now(UTC).date(),
        shards=(learned,),
        lineages=tuple(lineages),
        records=records_of(lineages, load_registry(*terms_folders(config.root, config.corpus.parent))),
        curation=curation_lines(config.corpus),
    )
    files = sorted(folder.glob("*.safetensors"))
    student = StudentFacts(
        name=config.name,
        version="1.0.0",
        base=base_name(config.base),
        base_licence=base_licence(config.base),
        trained_on=dataset.published,
        dataset=dataset,
        licence=config.out.licence or None,
        sha256=sha256_of(files[0]) if len(files) == 1 else "",
        base_sha256=weights.content_sha256(config.base),
        merged=merged,
        full=config.is_full,
    )
    bom = json.dumps(ml_bom(student, tool_version=VERSION), indent=2, ensure_ascii=False)
    texts = {
        "README.md": model_card(student, facts=facts),
        "NOTICE": notice(dataset, title=student.name),
        BOM: bom + "\n",
        EU: eu_summary(student),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def model_card(
    student: StudentFacts, scores: Sequence[tuple[str, str]] = (), facts: Sequence[tuple[str, str]] = ()
) -> str:
    """Return README.md of an adapter or of merged weights.

    Args:
        scores: measurements, as (name, text). facts: how the student was made, as (name, text).
    """
    dataset = student.dataset
    kind = "A LoRA adapter merged into" if student.merged else "A LoRA adapter on"
    if student.full:
        kind = "A full fine-tuning of"
    header = {
        "base_model": student.base,
        "base_model_relation": "finetune" if student.merged else "adapter",
        "library_name": "transformers" if student.merged else "peft",
        "pipeline_tag": "text-generation",
        **licence_keys(student.licence_id, dataset),
        "datasets": [dataset.name],
        "tags": [
            *([] if student.full else ["lora"]),
            "synthetic",
            "distillation",
            "distil",
            *(["mock"] if dataset.is_mock else []),
        ],
    }
    body = [
        f"# {cell(student.name)}",
        "",
        *[f"**{cell(sentence)}**\n" for sentence in duties_of_kind(dataset.duties, "display")],
        *mock_warning(dataset),
        f"{kind} `{cell(student.base)}` (licence {cell(student.base_licence)}), trained on "
        f"{student.trained_on} on {dataset.rows:,} answers of the teachers below.",
        "",
    ]
    if facts:
        body += ["| | |", "|---|---|", *[f"| {cell(name)} | {cell(text)} |" for name, text in facts], ""]
    body += [*teachers_section(dataset), *curation_section(dataset), *duties_section(dataset)]
    if scores:
        body += ["## Measured", "", *[f"- {cell(name)}: {cell(text)}" for name, text in scores], ""]
    return document(header, body)


def _lines(path: Path) -> int:
    with path.open("rb") as handle:
        return sum(1 for _ in handle)
