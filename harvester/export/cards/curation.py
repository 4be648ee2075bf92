"""Read how a corpus was curated, and say it on cards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harvester.store import paths
from harvester.store.journal.journal import Journal

# Written beside the shards of a curated corpus.
CURATION_NAME = "curation.json"


def curation_lines(folder: Path) -> tuple[str, ...]:
    """Return sentences on how the prompts and rows of a corpus were chosen; none where they were not.

    Raises:
        StoreError: the journal of a store can't be read.
    """
    lines = _screening_lines(folder)
    try:
        record = json.loads((folder / CURATION_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return tuple(lines)
    if not isinstance(record, dict):
        return tuple(lines)
    dropped = record.get("dropped")
    if isinstance(dropped, dict) and isinstance(record.get("kept"), int):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"
        lines.append(f"{record['kept']:,} rows were kept; dropped were: {counts}.")
    masked = record.get("masked")
    if isinstance(masked, int) and masked:
        lines.append(
            f"{masked:,} of the rows that were kept had private data masked, or were otherwise changed."
        )
    if isinstance(facts := record.get("decontamination"), dict):
        lines.append(decontamination_line(facts))
    judges = record.get("judges")
    if isinstance(judges, list):
        lines += [_judge_line(facts) for facts in judges if isinstance(facts, dict)]
    return tuple(lines)


def decontaminated_share(folder: Path) -> float | None:
    """Return the share of prompts without a split that a curation took for held out.

    Returns:
        None: the corpus was not decontaminated by a curation.
    """
    try:
        record = json.loads((folder / CURATION_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    facts = record.get("decontamination") if isinstance(record, dict) else None
    if not isinstance(facts, dict):
        return None
    share = facts.get("eval_share", 0.0)  # earlier versions knew no drawn split
    return float(share) if isinstance(share, int | float) else None


def _judge_line(facts: Mapping[str, Any]) -> str:
    """Return a sentence on who judged the answers, by which rubric."""
    kept = f"a score of at least {facts['at_least']:g}" if "at_least" in facts else " or ".join(facts["keep"])
    return (
        f"Judged by {facts['judge']} (rubric SHA-256 {str(facts['rubric_sha256'])[:12]}): kept were rows "
        f"with {kept}; {facts['judged']:,} answers had a verdict."
    )


def _screening_lines(store: Path) -> list[str]:
    """Say which prompts the runs of a store did not ask, by the settings of each run."""
    if not (store / paths.JOURNAL).exists():
        return []
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        texts = [text for (text,) in connection.execute("SELECT config_json FROM runs ORDER BY run")]
    runs: Counter[str] = Counter()
    for text in texts:
        config = json.loads(text)
        dedupe = (config.get("prompts") or {}).get("dedupe", "off")
        if dedupe != "off":
            runs[f"did not ask {'near ' if dedupe == 'near' else ''}duplicates of earlier prompts"] += 1
        if (section := config.get("decontaminate")) is not None:
            sets = [entry if isinstance(entry, str) else entry["path"] for entry in section["sets"]]
            against = ", ".join(["held-out prompts", *sets])
            runs[f"did not ask prompts for training that repeat {against}"] += 1
    return [f"{count:,} of {len(texts):,} runs {what}." for what, count in runs.items()]


def decontamination_line(facts: Mapping[str, Any]) -> str:
    """Return a sentence on what rows were compared with, and how many were dropped."""
    sets = ", ".join(
        dict.fromkeys(f"{entry['set']} (SHA-256 {entry['sha256'][:12]})" for entry in facts["sets"])
    )
    dropped = ", ".join(f"{count:,} {kind}" for kind, count in facts["dropped"].items()) or "none"
    return (
        f"Decontaminated against {sets or 'no evaluation set'} ({facts['set_texts']:,} texts) and "
        f"{facts['held_out_texts']:,} held-out prompts: equal texts, a share of {facts['overlap']:g} of runs "
        f"of 13 words, near duplicates from {facts['similarity']:g}. Rows dropped: {dropped}."
    )
