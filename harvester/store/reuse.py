"""Reuse answers that were paid under a smaller `max_tokens` and not truncated by it.

Every field of the body is part of the key, so another limit gives another key. When only the limit was
raised, the keys under every smaller limit of this store's runs are looked up too, and only truncated answers
are asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import orjson

from harvester.api.max_tokens import max_tokens_fields
from harvester.api.request_key import request_key
from harvester.api.types import Outcome, Request
from harvester.config.config import HarvestConfig
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import HeldAnswer


@dataclass(frozen=True, slots=True)
class ReusableAnswer:
    """An answer or dead letter that the store holds for a request, and its key."""

    key: bytes
    held: HeldAnswer


@dataclass(frozen=True, slots=True)
class ReuseIndex:
    """The `max_tokens` limits of a store's runs: field of the body and value.

    Attributes:
        teacher: what stands for the teacher in request keys.
    """

    teacher: str
    epoch: int = 0
    seen: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def of(cls, journal: Journal, config: HarvestConfig) -> ReuseIndex:
        """Read the limits of every run in the journal."""
        with journal.reading() as connection:
            configs = connection.execute("SELECT DISTINCT config_json FROM runs").fetchall()
        seen = frozenset(pair for (text,) in configs for pair in _named(orjson.loads(text)))
        return cls(config.teacher.key_name, config.run.epoch, seen)

    def smaller(self, request: Request) -> list[bytes]:
        """Return the keys of the same request under each smaller limit; no limit is the largest."""
        fields = max_tokens_fields(request.body)
        return [
            request_key(self.teacher, {**request.body, name: value}, request.sample_index, self.epoch)
            for name, value in self.seen
            if not fields or (fields.keys() == {name} and value < fields[name])
        ]


def find_answers(
    journal: Journal, requests: Sequence[Request], ceilings: ReuseIndex
) -> dict[bytes, ReusableAnswer]:
    """Return what the store holds for these requests, by their keys."""
    reusable = {
        key: ReusableAnswer(key, held)
        for key, held in journal.look_up([wanted.key for wanted in requests]).items()
    }
    others = {
        key: request.key
        for request in requests
        if ceilings.seen and request.key not in reusable
        for key in ceilings.smaller(request)
    }
    if others:
        for key, held in journal.look_up(list(others)).items():
            if held.state == "answered" and held.outcome != Outcome.TRUNCATED:
                reusable[others[key]] = ReusableAnswer(key, held)
    return reusable


def _named(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    sampling = config.get("sampling")
    tables: Iterable[object] = (sampling, sampling.get("extra")) if isinstance(sampling, dict) else ()
    for table in tables:
        if isinstance(table, dict):
            yield from max_tokens_fields(table).items()
