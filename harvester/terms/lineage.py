"""Rows against their lineage: what a file says of its rows and what the rows say of themselves must agree.

A lineage travels in a file's metadata, its facts again in columns of every row; whoever changes one and
not the other, strips one, or puts files of several corpora together, is caught here. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harvester.system.hosts import printable

SAME = ("teacher_id", "terms_id", "permission_sha256", "purpose", "mock")
"""Columns that repeat their lineage word for word."""

COLUMNS = ("run_id", *SAME, "request_model", "response_model", "provider")
"""Columns the doors look at; a fact is one combination of their values that rows hold."""

Fact = Mapping[str, Any]


def disagreements(lineages: Iterable[Mapping[str, Any]], facts: Iterable[Fact]) -> list[str]:
    """One sentence for each way in which rows and lineages differ; rows without a lineage are one."""
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for lineage in lineages:
        by_run.setdefault(str(lineage.get("run_id") or ""), []).append(lineage)
    found = ["a file of rows carries no lineage"] if "" in by_run else []
    found += [f"run {run!r} has {len(told)} lineages that differ" for run, told in by_run.items() if told[1:]]
    for fact in facts:
        run = str(fact.get("run_id") or "")
        told = by_run.get(run)
        if not told or not run:
            found.append(f"rows of {fact.get('teacher_id') or f'run {run!r}'} carry no lineage")
            continue
        found += _differing(fact, told[0], run)
    return list(dict.fromkeys(found))


def _differing(fact: Fact, lineage: Mapping[str, Any], run: str) -> list[str]:
    found = [
        f"rows of run {run!r} say {name} = {fact.get(name)!r}, their lineage says {lineage.get(name)!r}"
        for name in SAME
        if fact.get(name) != lineage.get(name)
    ]
    asked, model = str(fact.get("request_model") or ""), str(lineage.get("model") or "")
    if asked and asked != model:
        found.append(f"rows of run {run!r} were asked of {asked!r}, their lineage says {model!r}")
    provider, held = str(fact.get("provider") or ""), tuple(map(str, lineage.get("providers") or ()))
    if not is_among(provider, held):
        found.append(f"rows of run {run!r} were served by {strange_provider(provider, held)}")
    return found


def is_among(provider: str, held: Sequence[str]) -> bool:
    """Whether a router kept to the providers it was held to; a name it leaves unsaid can't be judged.

    Answers bear a provider's name ("DeepInfra", "Google AI Studio"), requests its slug ("deepinfra/fp8").
    """
    return not provider or not held or _slug(provider) in map(_slug, held)


def _slug(provider: str) -> str:
    return "".join(c for c in provider.partition("/")[0].lower() if c.isalnum())


def strange_provider(provider: str, held: Sequence[str]) -> str:
    """Who served it, and who might have."""
    return f"{printable(provider)!r}, while the router was held to {', '.join(map(printable, held))}"


def answering(facts: Iterable[Fact]) -> dict[str, tuple[str, ...]]:
    """Models that answers of each run name as their own; where it is the one asked for, none."""
    found: dict[str, dict[str, None]] = {}
    for fact in facts:
        named, asked = str(fact.get("response_model") or ""), str(fact.get("request_model") or "")
        if named and named.lower() != asked.lower():
            found.setdefault(str(fact.get("run_id") or ""), {})[named] = None
    return {run: tuple(names) for run, names in found.items()}
