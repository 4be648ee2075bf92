"""What goes with a student: card, NOTICE, bill of materials, the EU item, from its rows' lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from harvester.export.cards.cyclonedx import ml_bom
from harvester.export.cards.dataset_card import model_card
from harvester.export.cards.eu_summary import eu_summary
from harvester.export.cards.facts import DatasetFacts, ShardFacts, StudentFacts, records_of
from harvester.export.cards.notice import notice
from harvester.terms.gate import load_registry
from harvester.terms.lineage import Lineage
from trainer import __version__
from trainer.config import TrainConfig
from trainer.model import weights
from trainer.provenance import fingerprint

BOM = "bom.cdx.json"
EU = "EU_SUMMARY.md"
_HUB_CACHE = re.compile(r"models--(.+)")


def write(
    folder: Path,
    config: TrainConfig,
    lineages: Sequence[Lineage],
    facts: Sequence[tuple[str, str]],
    *,
    merged: bool = False,
) -> None:
    """Write README.md, NOTICE, bom.cdx.json and EU_SUMMARY.md beside weights and the list of learned rows.

    Args:
        folder: holds the weights and `hash_tree.rows.jsonl` already.
        facts: rows of the card's table, as (name, words).
        merged: whole weights, not an adapter.
    """
    rows = folder / fingerprint.ROWS
    learned = ShardFacts(rows.name, fingerprint.sha256_of(rows), _lines(rows), rows.stat().st_size)
    dataset = DatasetFacts(
        name=config.corpus.name,
        version="1.0.0",
        url="",
        creator="",
        published=datetime.now(UTC).date(),
        shards=(learned,),
        lineages=tuple(lineages),
        records=records_of(lineages, load_registry(config.root / "terms")),
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
        sha256=fingerprint.sha256_of(files[0]) if len(files) == 1 else "",
        base_sha256=weights.base_sha256(config.base),
        merged=merged,
    )
    bom = json.dumps(ml_bom(student, tool_version=__version__), indent=2, ensure_ascii=False)
    texts = {
        "README.md": model_card(student, facts=facts),
        "NOTICE": notice(dataset, title=student.name),
        BOM: bom + "\n",
        EU: eu_summary(student),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def base_name(folder: Path) -> str:
    """What a base's folder calls it: `owner/name` in a Hub cache, else the folder's own name."""
    cached = next((found for part in folder.parts if (found := _HUB_CACHE.fullmatch(part))), None)
    return cached[1].replace("--", "/", 1) if cached else folder.name


def base_licence(folder: Path) -> str:
    """The licence on the base's own card; "other" where none is said."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "other"
    head = text.split("---", 2)[1] if text.startswith("---") else ""
    found = re.search(r"^license:\s*[\"']?([A-Za-z0-9.+-]+)", head, flags=re.MULTILINE)
    return found[1] if found else "other"


def _lines(path: Path) -> int:
    with path.open("rb") as handle:
        return sum(1 for _ in handle)
