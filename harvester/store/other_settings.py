"""Compare the settings and teachers of a store's earlier runs with those of the next one.

Rows of several settings are mixed. Answers under another name of the teacher are not found, and are paid for
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from harvester.config.config import HarvestConfig
from harvester.store import paths
from harvester.store.journal.adoptions import Adoption, read_adoptions
from harvester.store.journal.journal import Journal
from harvester.store.journal.spending import COPIED_ENDING
from harvester.system.command_line.shell_words import shell_line
from harvester.terms.lineage import Lineage

# Keys of `[sampling]` that do not change what kind of answer comes: a longer limit, transport, more samples.
_SAME_KIND = frozenset({"max_tokens", "stream", "samples", "top_logprobs", "seed"})
_RUNS_WITH_ANSWERS = (
    "SELECT run_id, config_json, lineage_json FROM runs WHERE EXISTS (SELECT 1 FROM counters"
    " WHERE counters.run = runs.run AND counters.name LIKE 'outcome.%' AND counters.value > 0)"
)
_COPIED_RUNS = "SELECT run_id FROM runs WHERE ending = ?"
_SHOWN_CHARACTERS = 40
_SHOWN_RUNS = 3
_SHOWN_NAMES = 5


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
        f"runs are {', '.join(run_ids[:_SHOWN_RUNS])}{' ...' if len(run_ids) > _SHOWN_RUNS else ''}"
        for changes, run_ids in by_difference.items()
    )


def teacher_notes(root: Path, config: HarvestConfig) -> tuple[str, ...]:
    """Return a line for each name of a teacher under which answers lie that the keys of now do not find.

    These are answers of the store itself, which would be paid for again, and those of `[store] read_also`.

    Args:
        root: the folder that paths in the configuration are relative to.

    Raises:
        StoreError: a journal can't be read.
    """
    return (*_own_notes(root / config.store.path, config), *_read_also_notes(root, config))


def _own_notes(store: Path, config: HarvestConfig) -> tuple[str, ...]:
    """Return a line for each other name under which the store holds answers, if none lies under that of now.

    With an identity, each address that it could adopt has a line in any case.
    """
    teacher, name, again = config.teacher, config.teacher.key_name, "asked, and paid for, again"
    held = _TeacherNames.of(store)
    adoption = held.adoptions.get(teacher.base_url)
    if teacher.identity is None and adoption is not None:
        return (
            f"the answers of {teacher.base_url} were adopted by an identity: without [teacher] identity = "
            f'"{adoption.identity}" they are {again}',
        )
    lineages = [lineage for lineage in held.lineages if lineage.model == teacher.model]
    addresses = sorted(
        {lineage.teacher_name for lineage in lineages if held.is_address(lineage.teacher_name)} - {name}
    )
    to_adopt = f"harvester adopt {shell_line(store, '--identity', teacher.identity or 'NAME', '--from')} "
    notes = []
    asked = {held.key_name(lineage) for lineage in lineages if lineage.run_id not in held.copied}
    if teacher.identity is not None:
        notes = [
            f"the store holds answers of {teacher.model} at {address}. They are {again} unless they belong "
            f"to {teacher.identity!r} and it adopts them: {to_adopt}{address}"
            for address in addresses
        ]
    elif name not in asked:
        notes = [
            f"the store holds answers of {teacher.model} at {address}, and none at {name}. They are {again} "
            f"unless this is the same teacher, and an identity says so: {to_adopt}{address}, then [teacher] "
            "identity = NAME"
            for address in addresses
            if address in asked
        ]
    identities = sorted(asked - {name, *addresses})
    if name not in asked and identities:
        notes.append(
            f"the store holds answers of {teacher.model} under the identity {_listed(identities)}, and none "
            f"under {name!r}. They are {again} unless this is the same teacher, and [teacher] identity says "
            "so"
        )
    return tuple(notes)


def _read_also_notes(root: Path, config: HarvestConfig) -> tuple[str, ...]:
    """Return a line for each store of `[store] read_also` whose runs asked other teachers."""
    notes = (
        f"no answer of {name} ([store] read_also) fits: {kinds_text(root / name, config)}"
        for name in config.store.read_also
        if not may_fit(root / name, config)
    )
    return tuple(notes)


def may_fit(store: Path, config: HarvestConfig) -> bool:
    """Whether a run of another store asked this teacher, under the name of now, for the same purpose.

    Raises:
        StoreError: its journal can't be read.
    """
    teacher, held = config.teacher, _TeacherNames.of(store)
    return any(
        lineage.model == teacher.model
        and lineage.purpose == config.run.purpose
        and (lineage.run_id in held.copied or held.key_name(lineage) == teacher.key_name)
        for lineage in held.lineages
    )


def kinds_text(store: Path, config: HarvestConfig) -> str:
    """Say which teachers another store holds answers of, and which this run asks.

    Raises:
        StoreError: its journal can't be read.
    """
    teacher, held = config.teacher, _TeacherNames.of(store)
    kinds = {f"{each.model} under {held.key_name(each)} for {each.purpose}" for each in held.lineages}
    return (
        f"it holds {f'answers of {_listed(sorted(kinds))}' if kinds else 'no answers'}, and this run asks "
        f"{teacher.model} under {teacher.key_name} for {config.run.purpose}"
    )


@dataclass(frozen=True, slots=True)
class _TeacherNames:
    """Names that stand for teachers in the keys of a store.

    Attributes:
        lineages: of runs with answers.
        adoptions: by address.
        copied: ids of runs of other stores, whose copied answers have keys of the run that copied them.
    """

    lineages: tuple[Lineage, ...] = ()
    adoptions: Mapping[str, Adoption] = field(default_factory=dict)
    copied: frozenset[str] = frozenset()

    @classmethod
    def of(cls, store: Path) -> _TeacherNames:
        """Read them; there are none where no store is.

        Raises:
            StoreError: the journal can't be read.
        """
        if not (store / paths.JOURNAL).exists():
            return cls()
        with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
            rows = connection.execute(_RUNS_WITH_ANSWERS).fetchall()
            copied = connection.execute(
                "SELECT run_id FROM runs WHERE ending = ?", (COPIED_ENDING,)
            ).fetchall()
            adoptions = read_adoptions(connection)
        lineages = tuple(Lineage.from_json(text) for *_, text in rows)
        return cls(lineages, adoptions, frozenset(run_id for (run_id,) in copied))

    def is_address(self, name: str) -> bool:
        """Whether this is an address that no identity adopted."""
        return "://" in name and name not in self.adoptions

    def key_name(self, lineage: Lineage) -> str:
        """Return the name in the keys of a run: its own, or the identity that adopted its address."""
        adoption = self.adoptions.get(lineage.teacher_name)
        return lineage.teacher_name if adoption is None else adoption.identity


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN_NAMES])}{' ...' if len(names) > _SHOWN_NAMES else ''}"


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
