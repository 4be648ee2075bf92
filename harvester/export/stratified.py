"""Draw a stratified sample: so many rows, allocated to groups by weight. Pure.

A row's place in the draw depends on the seed, its prompt and its sample number only: a larger sample holds a
smaller one, and more rows in the corpus change little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from harvester.errors import ConfigError
from harvester.store.shards.schema import Sample
from harvester.system.toml_file import validate

COLUMNS = ("key", "prompt_id", "sample_index", "tags", "metadata_json", "request_model", "source_file")

# Group of the rows without the field.
NONE = "none"
_METADATA = "metadata."
# Groups that a warning names.
_SHOWN_GROUPS = 10


class SampleSection(BaseModel):
    """How many rows are drawn, and how they are allocated.

    Attributes:
        rows: rows to draw in all; fewer if the corpus has fewer.
        by: what groups rows: task, tag (the first), model, file, or metadata.NAME; empty: one group.
        weights: share of a group relative to the others, 1 where none is given; 0 leaves a group out.
        seed: another seed draws other rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(gt=0)
    by: str = ""
    weights: dict[str, float] = Field(default_factory=dict)
    seed: int = 0


class _SampleFile(BaseModel):
    """A file of which only `[sample]` is looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample: SampleSection


def parse(table: dict[str, Any], place_of: Callable[..., str]) -> SampleSection:
    """Validate a table `[sample]`.

    Raises:
        ConfigError: an unknown key, an impossible value, or an unknown group.
    """
    section = validate(_SampleFile, {"sample": table}, place_of=place_of, missing="rows is needed").sample
    if section.by not in {"", "task", "tag", "model", "file"} and not section.by.startswith(_METADATA):
        raise ConfigError(
            f"sample.by: {section.by!r} groups no rows",
            place=place_of(("sample", "by")),
            remedy="task, tag, model, file, or metadata.NAME",
        )
    if any(weight < 0 for weight in section.weights.values()):
        raise ConfigError(
            "sample.weights: a weight is negative",
            place=place_of(("sample", "weights")),
            remedy="weights = {math = 2, code = 1}; a group with 0 gets no rows",
        )
    return section


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample: the identities of its rows, and warnings about settings that do not fit the rows."""

    rows: Set[int]
    warnings: tuple[str, ...] = ()


def draw(samples: Iterable[Sample], section: SampleSection) -> Drawn:
    """Draw rows. Holds about 100 bytes a row."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for sample in samples:
        row = _place(sample, section.seed), identity(sample)
        groups.setdefault(group_of(sample, section.by), []).append(row)
    sizes = {name: len(rows) for name, rows in groups.items()}
    shares = deal({name: section.weights.get(name, 1.0) for name in sizes}, sizes, section.rows)
    rows = {row for name, rows in groups.items() for _, row in sorted(rows)[: shares[name]]}
    return Drawn(rows, tuple(_warnings(section, sizes, len(rows))))


def _warnings(section: SampleSection, sizes: Mapping[str, int], drawn: int) -> Iterator[str]:
    if section.by and sizes.keys() == {NONE}:
        yield f"[sample] by = {section.by!r}: no kept row has it, so all rows are one group, {NONE!r}"
    elif unknown := sorted(section.weights.keys() - sizes.keys()):
        names = ", ".join(repr(name) for name in sorted(sizes)[:_SHOWN_GROUPS])
        more = ", ..." if len(sizes) > _SHOWN_GROUPS else ""
        yield (
            f"[sample] weights: no kept row is of the group {', '.join(map(repr, unknown))}; "
            f"groups: {names or 'none'}{more}"
        )
    if drawn < section.rows:
        weighted = " in groups with a weight above 0" if 0 in section.weights.values() else ""
        yield (
            f"[sample] rows = {section.rows:,}: only {drawn:,} rows were drawn; the filters keep no more"
            f"{weighted}"
        )


def deal(weights: Mapping[str, float], sizes: Mapping[str, int], rows: int) -> dict[str, int]:
    """Deal rows out to groups by weight; what a small group can't take goes to the others."""
    shares = dict.fromkeys(sizes, 0)
    open_groups = {name for name in sizes if weights[name] > 0 and sizes[name]}
    left = min(rows, sum(sizes[name] for name in open_groups))
    while left and open_groups:
        total = sum(weights[name] for name in open_groups)
        fair = {name: left * weights[name] / total for name in open_groups}
        full = {name for name in open_groups if shares[name] + fair[name] >= sizes[name]}
        if not full:
            for name in open_groups:
                shares[name] += int(fair[name])
            left -= sum(int(part) for part in fair.values())
            by_rest = sorted(open_groups, key=lambda name: (-(fair[name] % 1), name))
            for name in by_rest[:left]:
                shares[name] += 1
            return shares
        for name in full:
            left -= sizes[name] - shares[name]
            shares[name] = sizes[name]
        open_groups -= full
    return shares


def group_of(sample: Sample, by: str) -> str:
    """Return the group of a row."""
    if by == "model":
        return sample.request_model
    if by == "file":
        return sample.source_file
    if by == "tag":
        return sample.tags[0] if sample.tags else NONE
    if by:
        value = sample.metadata.get(by.removeprefix(_METADATA))
        return NONE if value is None else str(value)
    return ""


def identity(sample: Sample) -> int:
    """Return a 64-bit digest of what tells a row from the others."""
    return _digest(f"{sample.key}\x1f{sample.prompt_id}\x1f{sample.sample_index}")


def _place(sample: Sample, seed: int) -> int:
    return _digest(f"{seed}\x1f{sample.prompt_id}\x1f{sample.sample_index}\x1f{sample.key}")


def _digest(text: str) -> int:
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")
