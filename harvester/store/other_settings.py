"""Compare the settings of a store's earlier runs with those of the next one; its rows are mixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from harvester.config.config import HarvestConfig
from harvester.store import paths
from harvester.store.journal.adoptions import read_adoptions
from harvester.store.journal.journal import Journal
from harvester.terms.lineage import Lineage

# Keys of `[sampling]` that do not change what kind of answer comes: a longer limit, transport, more samples.
_SAME_KIND = frozenset({"max_tokens", "stream", "samples", "top_logprobs", "seed"})
_RUNS_WITH_ANSWERS = (
    "SELECT run_id, config_json, lineage_json FROM runs WHERE EXISTS (SELECT 1 FROM counters"
    " WHERE counters.run = runs.run AND counters.name LIKE 'outcome.%' AND counters.value > 0)"
)
_SHOWN_CHARACTERS = 40
_SHOWN_RUNS = 3


def notes(store: Path, config: HarvestConfig) -> tuple[str, ...]:
    """Return what differs from earlier runs that stored answers here, one line for each set of differences.

    Raises:
        StoreError: the journal can't be read.
    """
    if config.score is not None or not (store / paths.JOURNAL).exists():
        return ()  # scored texts are no answers, and are not mixed with any
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        runs = connection.execute(_RUNS_WITH_ANSWERS).fetchall()
    now = dict(_settings(orjson.loads(config.model_dump_json())))
    by_difference: dict[str, list[str]] = {}
    for run_id, text, _ in runs:
        settings = orjson.loads(text)
        before = dict(_settings(settings))
        if settings.get("score") is not None or not before:  # or of a store that another program wrote
            continue
        names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        changes = [f"{name} {_shown(before.get(name))}, now {_shown(now.get(name))}" for name in names]
        if changes:
            by_difference.setdefault("; ".join(changes), []).append(run_id)
    return tuple(
        f"the store also holds answers of {len(run_ids):,} runs with other settings ({changes}): exports and "
        "trainings take them too; `where` in curate.toml, train.toml and `harvester export` chooses. These "
        "runs are "
        f"{', '.join(run_ids[:_SHOWN_RUNS])}{' ...' if len(run_ids) > _SHOWN_RUNS else ''}"
        for changes, run_ids in by_difference.items()
    )


def unadopted_notes(store: Path, config: HarvestConfig) -> tuple[str, ...]:
    """Return a line for each name of this teacher under which answers lie that its keys of now do not find.

    They were asked under an address and the teacher has an identity now, or the other way round.

    Raises:
        StoreError: the journal can't be read.
    """
    teacher = config.teacher
    if not (store / paths.JOURNAL).exists():
        return ()
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        rows = connection.execute(_RUNS_WITH_ANSWERS).fetchall()
        adoptions = read_adoptions(connection)
    lineages = [Lineage.from_json(text) for *_, text in rows]
    names = {lineage.teacher_name for lineage in lineages if lineage.model == teacher.model}
    if teacher.identity is None:
        adoption = adoptions.get(teacher.base_url)
        if adoption is None:
            return ()
        return (
            f"the answers of {teacher.base_url} were adopted by an identity: without [teacher] identity = "
            f'"{adoption.identity}" they are asked, and paid for, again',
        )
    return tuple(
        f"the store holds answers of {teacher.model} at {name}. They are asked, and paid for, again unless "
        f"they belong to {teacher.identity!r} and it adopts them: harvester adopt {store} --identity "
        f"{teacher.identity} --from {name}"
        for name in sorted(names)
        if "://" in name and name not in adoptions
    )


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings that decide what kind of answers come, by dotted name; unset ones are left out."""
    teacher, prompts, sampling = (config.get(name) or {} for name in ("teacher", "prompts", "sampling"))
    if teacher.get("model"):
        yield "teacher.model", teacher["model"]
    if prompts.get("system") is not None:
        yield "prompts.system", prompts["system"]
    if epoch := (config.get("run") or {}).get("epoch"):
        yield "run.epoch", epoch
    for name, value in sampling.items():
        if name not in _SAME_KIND and value not in (None, {}, []):
            yield f"sampling.{name}", value


def _shown(value: Any) -> str:
    text = "none" if value is None else orjson.dumps(value).decode()
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
