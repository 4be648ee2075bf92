"""Count the answers of a store by task, tag, split and prompt file.

`task` and `split` are fields of that name in a prompt line; tags are its `tags`. A prompt without one is
counted as "(none)". An answer with several tags counts under each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from harvester.api.types import UNUSABLE
from harvester.system.command_line.text_table import aligned

# What answers can be grouped by.
KINDS = ("task", "tag", "split", "file")
# Columns that `Groups.add_table` reads.
COLUMNS = ("tags", "metadata_json", "source_file", "outcome", "output_tokens", "cost_microusd")
NONE, OTHERS = "(none)", "(others)"
# Groups kept of a kind; the answers of further ones are counted together as `OTHERS`.
MOST_GROUPS = 200
# Characters of a group's name; the rest is cut off.
LONGEST_NAME = 80


@dataclass(slots=True)
class Group:
    """Sums over the answers of one group."""

    answers: int = 0
    not_usable: int = 0
    truncated: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0

    def add(self, other: Group) -> None:
        """Add the sums of other answers."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, int]:
        """Return the sums by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Groups:
    """The groups of each of `KINDS`, by name."""

    by_kind: dict[str, dict[str, Group]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    def add(self, other: Groups) -> None:
        """Add the groups of other answers."""
        for kind, groups in other.by_kind.items():
            for name, group in groups.items():
                self._group(kind, name).add(group)

    def add_table(self, table: pa.Table) -> None:
        """Count the answers of a table that has `COLUMNS`."""
        columns = [table[name].to_pylist() for name in COLUMNS]
        for tags, metadata_json, source_file, outcome, output_tokens, cost_microusd in zip(
            *columns, strict=True
        ):
            answer = Group(
                answers=1,
                not_usable=int(outcome in UNUSABLE),
                truncated=int(outcome == "truncated"),
                output_tokens=output_tokens,
                cost_microusd=cost_microusd,
            )
            metadata = _loaded(metadata_json)
            self._group("task", _name(metadata.get("task"))).add(answer)
            self._group("split", _name(metadata.get("split"))).add(answer)
            self._group("file", _name(source_file)).add(answer)
            for tag in dict.fromkeys(_name(tag) for tag in tags or [None]):
                self._group("tag", tag).add(answer)

    def _group(self, kind: str, name: str) -> Group:
        groups = self.by_kind[kind]
        if name not in groups and len(groups) >= MOST_GROUPS:
            name = OTHERS
        return groups.setdefault(name, Group())

    def largest(self, kind: str) -> list[tuple[str, Group]]:
        """Return the groups of a kind, those with the most answers first."""
        return sorted(self.by_kind[kind].items(), key=lambda entry: (-entry[1].answers, entry[0]))

    def has_several_groups(self, kind: str) -> bool:
        """Whether a kind divides the answers at all."""
        return bool(set(self.by_kind[kind]) - {NONE}) and len(self.by_kind[kind]) > 1


def table_lines(kind: str, groups: Iterable[tuple[str, Group]]) -> list[str]:
    """Return the groups of one kind as lines of text, with a heading."""
    rows = [(kind, "answers", "not usable", "truncated", "tokens out", "cost")]
    rows += [(name, *cells(group)) for name, group in groups]
    return aligned(rows, left={0})


def cells(group: Group) -> tuple[str, str, str, str, str]:
    """Return the sums of a group as text, in the order of the heading of `table_lines`."""
    return (
        f"{group.answers:,}",
        _with_share(group.not_usable, group.answers),
        _with_share(group.truncated, group.answers),
        f"{group.output_tokens:,}",
        f"${group.cost_microusd / 1e6:,.4f}",
    )


def _with_share(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.1%})" if count else "0"


def _loaded(metadata_json: str) -> Mapping[str, Any]:
    # Most prompts have neither field: a search is 20 times as fast as parsing.
    if '"task"' not in metadata_json and '"split"' not in metadata_json:
        return {}
    metadata = json.loads(metadata_json)
    return metadata if isinstance(metadata, dict) else {}


def _name(value: Any) -> str:
    """Return the name of a group; values other than text and numbers have none."""
    is_named = isinstance(value, str | int | float) and value != ""
    return str(value)[:LONGEST_NAME] if is_named else NONE
