"""Define a run's lineage, and compare it with what the rows of the run say.

A lineage says which teacher answered, under which terms and for what purpose. It is stored in the metadata of
every shard, and rows repeat its facts in columns of their own. Changing one without the other, removing one,
or mixing files of several corpora makes them disagree, and `disagreements` reports it. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from harvester.system.hosts import printable

# Columns of a row that repeat the value of the same name in its lineage.
REPEATED_COLUMNS = ("teacher_id", "terms_id", "permission_sha256", "purpose", "mock")

# Columns that the terms checks read; a fact is one combination of their values that some rows hold.
FACT_COLUMNS = ("run_id", *REPEATED_COLUMNS, "request_model", "response_model", "provider")

Fact = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Lineage:
    """The lineage of one run: who was asked, under which terms, for what.

    It may come from a file that anybody wrote, so every value may be missing or of a wrong type. The
    properties give "" or an empty tuple then. `stored` keeps the object exactly as it was read; that object
    is what is written again.

    Attributes:
        stored: the JSON object as it stands in the journal or in a shard.
    """

    stored: Mapping[str, Any]

    @classmethod
    def from_json(cls, text: str | bytes) -> Lineage:
        """Parse a lineage as the journal stores it.

        Raises:
            ValueError: it is no JSON object.
        """
        stored = orjson.loads(text)
        if not isinstance(stored, dict):
            raise ValueError("a lineage is no object")
        return cls(stored)

    def to_json(self) -> bytes:
        """Return the stored object as JSON with sorted names: the form that is stored and compared."""
        return orjson.dumps(dict(self.stored), option=orjson.OPT_SORT_KEYS)

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self._text("run_id")

    @property
    def teacher_id(self) -> str:
        """`base_url|model`, or `identity|model`, of the teacher that was asked."""
        return self._text("teacher_id")

    @property
    def teacher_name(self) -> str:
        """What stands for the teacher in request keys: an address, or an identity."""
        return self.teacher_id.removesuffix(f"|{self.model}")

    @property
    def host(self) -> str:
        """Host that was asked, with its port where the URL has one."""
        return self._text("host")

    @property
    def model(self) -> str:
        """Model that was asked for."""
        return self._text("model")

    @property
    def terms_id(self) -> str:
        """Ids of the terms records that applied, comma-separated."""
        return self._text("terms_id")

    @property
    def permission_sha256(self) -> str:
        """Hash of the recorded permission that the run relied on; "" for none."""
        return self._text("permission_sha256")

    @property
    def purpose(self) -> str:
        """`train` or `eval`."""
        return self._text("purpose")

    @property
    def config_sha256(self) -> str:
        """Hash of the run's configuration."""
        return self._text("config_sha256")

    @property
    def tool_version(self) -> str:
        """Version of the harvester that ran."""
        return self._text("tool_version")

    @property
    def mock(self) -> bool:
        """Whether the teacher was the mock teacher."""
        return bool(self.stored.get("mock"))

    @property
    def duties(self) -> tuple[str, ...]:
        """What the terms require of those who use the answers; see `obligations`."""
        return self._texts("duties")

    @property
    def providers(self) -> tuple[str, ...]:
        """Providers that a router was restricted to; empty for no router, or no restriction."""
        return self._texts("providers")

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that have no value."""
        return [name for name in names if not self.stored.get(name)]

    def _text(self, name: str) -> str:
        return str(self.stored.get(name) or "")

    def _texts(self, name: str) -> tuple[str, ...]:
        value = self.stored.get(name) or ()
        return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


def disagreements(lineages: Iterable[Lineage], facts: Iterable[Fact]) -> list[str]:
    """Return one sentence for each way in which rows and lineages differ, or a lineage is missing."""
    by_run: dict[str, list[Lineage]] = {}
    for lineage in lineages:
        by_run.setdefault(lineage.run_id, []).append(lineage)
    reasons = ["a file of rows carries no lineage"] if "" in by_run else []
    reasons += [
        f"run {run!r} has {len(several)} lineages that differ"
        for run, several in by_run.items()
        if several[1:]
    ]
    for fact in facts:
        run = str(fact.get("run_id") or "")
        of_run = by_run.get(run)
        if not of_run or not run:
            reasons.append(f"rows of {fact.get('teacher_id') or f'run {run!r}'} carry no lineage")
            continue
        reasons += _differences(fact, of_run[0], run)
    return list(dict.fromkeys(reasons))


def _differences(fact: Fact, lineage: Lineage, run: str) -> list[str]:
    reasons = [
        f"rows of run {run!r} say {name} = {fact.get(name)!r}, "
        f"their lineage says {lineage.stored.get(name)!r}"
        for name in REPEATED_COLUMNS
        if fact.get(name) != lineage.stored.get(name)
    ]
    requested = str(fact.get("request_model") or "")
    if requested and requested != lineage.model:
        reasons.append(f"rows of run {run!r} asked for {requested!r}, their lineage says {lineage.model!r}")
    provider = str(fact.get("provider") or "")
    if not is_allowed_provider(provider, lineage.providers):
        reasons.append(
            f"rows of run {run!r} were served by {unexpected_provider(provider, lineage.providers)}"
        )
    return reasons


def is_allowed_provider(provider: str, allowed: Sequence[str]) -> bool:
    """Return whether a router used one of the providers it was restricted to.

    Without a restriction, or when the answer names no provider, there is nothing to judge: true. Answers give
    a provider's name ("DeepInfra", "Google AI Studio"), requests its slug ("deepinfra/fp8").
    """
    return not provider or not allowed or _slug(provider) in map(_slug, allowed)


def providers_not_allowed(lineages: Iterable[Lineage], facts: Iterable[Fact]) -> list[str]:
    """Return the providers that answered although a router was restricted to others."""
    allowed = {lineage.run_id: lineage.providers for lineage in lineages}
    named = dict.fromkeys((str(fact.get("run_id") or ""), str(fact.get("provider") or "")) for fact in facts)
    return list(dict.fromkeys(n for run, n in named if not is_allowed_provider(n, allowed.get(run, ()))))


def _slug(provider: str) -> str:
    return "".join(c for c in provider.partition("/")[0].lower() if c.isalnum())


def unexpected_provider(provider: str, allowed: Sequence[str]) -> str:
    """Describe for an error which provider served a request and which ones were allowed."""
    return f"{printable(provider)!r}, while the router was restricted to {', '.join(map(printable, allowed))}"


def other_models(facts: Iterable[Fact]) -> dict[str, tuple[str, ...]]:
    """Return, by run id, the models that answers name as their own where it is not the requested one."""
    names_by_run: dict[str, dict[str, None]] = {}
    for fact in facts:
        answered, requested = str(fact.get("response_model") or ""), str(fact.get("request_model") or "")
        if answered and answered.lower() != requested.lower():
            names_by_run.setdefault(str(fact.get("run_id") or ""), {})[answered] = None
    return {run: tuple(names) for run, names in names_by_run.items()}
