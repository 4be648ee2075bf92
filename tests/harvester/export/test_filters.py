"""Test the filters: they decide by the sample alone, and a drop has a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.errors import ConfigError
from harvester.export import filters
from harvester.quality.verifiers.settings import VerifierSection
from harvester.quality.verifiers.verifiers import Verifiers
from harvester.store.shards.schema import Sample


def sample(
    completion: str | None = "4", outcome: str = "ok", reference: str | None = None, prompt: str = "2+2?"
) -> Sample:
    messages = [{"role": "user", "content": prompt}]
    return Sample(
        key="0" * 64,
        prompt_id="p",
        messages=messages,
        completion=completion,
        outcome=outcome,
        finish_reason="stop",
        reference=reference,
    )


@pytest.mark.parametrize("outcome", ["truncated", "filtered", "refused", "tool_call", "empty", "unknown"])
def test_only_whole_answers_are_finished(outcome: str):
    assert filters.finished(sample()) is None
    assert filters.finished(sample(outcome=outcome)) == filters.Drop(f"outcome_{outcome}")


@pytest.mark.parametrize("text", [None, "", " \n\t"])
def test_blank_completions_are_dropped(text: str | None):
    assert filters.not_blank(sample(text)) == filters.Drop("blank")


def test_a_verified_answer_may_differ_in_outer_space_only():
    assert filters.agrees_with_reference(sample(" 4\n", reference="4")) is None
    assert filters.agrees_with_reference(sample("5", reference="4")) == filters.Drop("differs_from_reference")
    assert filters.agrees_with_reference(sample("5")) is None


def test_duplicates_are_folded_by_case_width_and_space():
    check = filters.no_duplicates()
    assert check(sample("Hello  World")) is None
    assert check(sample("hello world")) == filters.Drop("duplicate")
    assert check(sample("ｈｅｌｌｏ world")) == filters.Drop("duplicate")
    assert check(sample("hello world", prompt="other?")) is None
    assert filters.no_duplicates()(sample("Hello World")) is None, "every curation starts afresh"


def test_near_duplicates_of_rows_prompts_and_answers():
    long = "The sky is blue since air scatters short waves of light more than long ones."
    rows = [
        sample(long, prompt="Why is the sky blue? Answer as if I were five years old."),
        sample(long + "!", prompt="Why is the sky blue? Answer as if I were five years old"),
        sample("Air scatters blue light.", prompt="Why is the sky blue? Answer as if I were five years old."),
        sample(long, prompt="Describe the weather on an ordinary day in spring, please."),
    ]

    def dropped(value: object) -> list[bool]:
        check = filters.named("near_duplicates", value)
        return [check(row) is not None for row in rows]

    assert dropped(None) == [False, True, False, False]
    assert dropped({"of": "prompt"}) == [False, True, False, False], "samples of one prompt stay"
    assert dropped({"of": "answer", "threshold": 0.9}) == [False, True, False, True]
    for value in (2, "x", {"threshold": 0.1}, {"of": "all"}, {"other": 1}, True):
        with pytest.raises(ConfigError, match="near_duplicates"):
            filters.named("near_duplicates", value)


@given(st.lists(st.tuples(st.text(max_size=3), st.sampled_from(["ok", "truncated"])), max_size=30))
def test_a_chain_keeps_what_every_filter_keeps(rows: list[tuple[str, str]]):
    chained = filters.chain([filters.finished, filters.not_blank, filters.longest(2)])
    for text, outcome in rows:
        answer = sample(text, outcome)
        kept = outcome == "ok" and bool(text.strip()) and len(text) <= 2
        assert (chained(answer) is None) == kept


def test_names_are_checked():
    with pytest.raises(ConfigError, match="unknown filter 'nope'"):
        filters.named("nope")
    with pytest.raises(ConfigError, match="positive number"):
        filters.named("longest", -1)
    with pytest.raises(ConfigError, match=r"needs a table \[verify\]"):
        filters.named("verified")
    parameters: dict[str, object] = {
        "longest": 5,
        "run": "run-1",
        "tokens": 9,
        "language": "en",
        "json_schema": {},
        "pattern": "a",
        "no_pattern": "a",
        "code": "python",
        "difficulty": {"least": 0.1},
        "python": "json:dumps",
    }
    verifiers = Verifiers({"*": VerifierSection(kind="exact")}, Path())
    for name in filters.FILTER_NAMES:
        assert filters.named(name, parameters.get(name), verifiers)


def test_only_answers_that_pass_are_verified():
    check = filters.verified(Verifiers({"*": VerifierSection(kind="numeric")}, Path()))
    assert check(sample("it is 4", reference="4")) is None
    assert check(sample("it is 5", reference="4")) == filters.Drop("verify_failed")
    assert check(sample("it is 4")) == filters.Drop("verify_unverifiable")
