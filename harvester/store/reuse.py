"""Answers that came under a smaller `max_tokens` and were not cut short by it: paid once, good for ever.

Every field of the body is in the key, so another ceiling is another key. Whoever raises only the ceiling is
asked again for nothing but the truncated answers: the keys under every smaller ceiling that this store has
seen are looked up too.
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
    """What the store holds for a request, and under which key."""

    key: bytes
    held: HeldAnswer


@dataclass(frozen=True, slots=True)
class ReuseIndex:
    """The ceilings under which a store has asked so far: field of the body and value."""

    base_url: str
    epoch: int = 0
    seen: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def of(cls, journal: Journal, config: HarvestConfig) -> ReuseIndex:
        """Those of every run that the journal remembers."""
        with journal.reading() as connection:
            told = connection.execute("SELECT DISTINCT config_json FROM runs").fetchall()
        seen = frozenset(pair for (text,) in told for pair in _named(orjson.loads(text)))
        return cls(config.teacher.base_url, config.run.epoch, seen)

    def smaller(self, request: Request) -> list[bytes]:
        """Keys of the same request under each smaller ceiling; no ceiling is the greatest."""
        given = max_tokens_fields(request.body)
        return [
            request_key(self.base_url, {**request.body, name: value}, request.sample_index, self.epoch)
            for name, value in self.seen
            if not given or (given.keys() == {name} and value < given[name])
        ]


def find_answers(
    journal: Journal, requests: Sequence[Request], ceilings: ReuseIndex
) -> dict[bytes, ReusableAnswer]:
    """What the store holds of these requests, by their keys; the absent are absent."""
    found = {
        key: ReusableAnswer(key, held) for key, held in journal.look_up([one.key for one in requests]).items()
    }
    others = {
        key: request.key
        for request in requests
        if ceilings.seen and request.key not in found
        for key in ceilings.smaller(request)
    }
    if others:
        for key, held in journal.look_up(list(others)).items():
            if held.state == "answered" and held.outcome != Outcome.TRUNCATED:
                found[others[key]] = ReusableAnswer(key, held)
    return found


def _named(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    sampling = config.get("sampling")
    tables: Iterable[object] = (sampling, sampling.get("extra")) if isinstance(sampling, dict) else ()
    for table in tables:
        if isinstance(table, dict):
            yield from max_tokens_fields(table).items()
