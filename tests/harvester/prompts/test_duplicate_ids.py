"""Test that two prompts with one id are distinguished from one prompt given twice, with little memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.api.types import Prompt
from harvester.config.shard import Shard
from harvester.prompts import duplicate_ids
from harvester.prompts.duplicate_ids import DuplicateIds, clash


def named(rows: list[tuple[str, str]]) -> tuple[str, str, int] | None:
    """Places of the two prompts that the error names, and further ids that it counts; None for no error."""
    prompts = [
        Prompt(identity, ({"role": "user", "content": text},), file="p", line=line)
        for line, (identity, text) in enumerate(rows)
    ]
    ids = DuplicateIds()
    for prompt in prompts:
        ids.note(prompt)
    error = clash(lambda: prompts, ids.repeated())
    if error is None:
        return None
    before, _, further = error.message.rpartition("at ")[2].partition(", and so it is with ")
    return error.place, before, int(further.split()[0]) if further else 0


@pytest.mark.parametrize("few", [0, duplicate_ids.FEW_IDS], ids=["sorted by Arrow", "sorted by Python"])
@settings(deadline=None)  # the first example loads a library
@given(rows=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=10))
def test_a_clash_is_found_exactly_when_one_id_has_two_texts(few: int, rows: list[tuple[str, str]]) -> None:
    pairs = [
        (f"p:{second}", f"p:{first}")
        for first, second in itertools.combinations(range(len(rows)), 2)
        if rows[first][0] == rows[second][0] and rows[first][1] != rows[second][1]
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicate_ids, "FEW_IDS", few)
        result = named(rows)
    assert (result is None) == (not pairs)
    assert result is None or result[:2] in pairs
    texts = dict.fromkeys(rows)
    clashing = [identity for identity in "abcd" if len([row for row in texts if row[0] == identity]) > 1]
    assert result is None or result[2] == len(clashing) - 1


def test_a_file_given_twice_is_held_in_a_few_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 5_000
    monkeypatch.setattr(duplicate_ids, "FEW_IDS", rows)
    assert named([("a", "x"), ("a", "x")]) is None  # what is loaded once is no cost of a row

    def twice() -> Iterator[Prompt]:
        for number in itertools.chain(range(rows), range(rows)):
            yield Prompt(f"p{number}", ({"role": "user", "content": f"q{number}"},))

    ids = DuplicateIds()
    tracemalloc.start()
    try:
        for prompt in twice():
            ids.note(prompt)
        assert clash(twice, ids.repeated()) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / (2 * rows) < 40


def test_ranks_of_a_fleet_find_together_what_one_run_finds() -> None:
    prompts = [Prompt(id=f"p{n % 90}", messages=({"role": "user", "content": str(n)},)) for n in range(100)]
    whole, parts = DuplicateIds(), [DuplicateIds(Shard(number, 4)) for number in range(1, 5)]
    for prompt in prompts:
        for ids in (whole, *parts):
            ids.note(prompt)
    found = [set(ids.repeated()) for ids in parts]
    assert set.union(*found) == set(whole.repeated())
    assert sum(map(len, found)) == 10
    assert len([one for one in found if one]) > 1
