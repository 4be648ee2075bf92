"""Test what is learned about the number of answers that one request may ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.config.teacher_section import TeacherSection
from harvester.errors import PromptRejected, RateLimited
from harvester.store.journal.journal import Journal
from harvester.teacher.choice_limit import ChoiceLimit


def teacher(max_n: int = 8) -> TeacherSection:
    return TeacherSection(base_url="http://127.0.0.1:1/v1", model="m", max_n=max_n)


def rejected(message: str, raw: bytes = b"") -> PromptRejected:
    return PromptRejected(message, status=400, raw=raw)


@pytest.mark.parametrize(
    ("message", "raw", "size"),
    [
        ("Invalid 'n': integer above maximum value. Expected a value <= 4, but got 8 instead.", b"", 4),
        ("'n' : number must be at most 1", b"", 1),
        ("n must be between 1 and 128", b"", 4),
        ("Multiple candidates is not enabled for this model", b"", 4),
        ("unsupported value", b'{"error": {"message": "unsupported value", "param": "n"}}', 4),
    ],
)
def test_a_refusal_that_names_n_is_believed_at_once(message: str, raw: bytes, size: int) -> None:
    limit = ChoiceLimit(teacher())
    assert limit.named_in(rejected(message, raw))
    assert limit.refused(8, rejected(message, raw))
    assert limit.size == size
    assert not limit.refused(8, rejected(message, raw))  # one that was in flight teaches nothing more


@pytest.mark.parametrize("message", ["context length exceeded: 9000 > 8192", "Bad request.", "content: n/a"])
def test_other_refusals_need_two_in_a_row(message: str) -> None:
    limit, error = ChoiceLimit(teacher()), rejected(message)
    assert not limit.named_in(error)
    assert not limit.refused(8, error)
    assert not limit.answered(8, 8)
    assert not limit.refused(8, error)
    assert limit.refused(7, error)
    assert limit.size == 3


def test_a_refusal_for_the_rate_never_names_n() -> None:
    assert not ChoiceLimit(teacher()).named_in(RateLimited("'n' is too high for your tokens per minute"))


def test_fewer_choices_twice_in_a_row_lower_it_to_the_most_that_came() -> None:
    limit = ChoiceLimit(teacher())
    assert not limit.answered(8, 4)
    assert not limit.answered(8, 8)
    assert not limit.answered(8, 5)
    assert limit.answered(8, 4)
    assert limit.size == 5
    assert not limit.answered(1, 1)


def test_what_was_learned_outlives_the_process_until_max_n_changes(tmp_path: Path) -> None:
    async def call(write: Callable[[Journal], None]) -> None:
        write(journal)

    with Journal.open(tmp_path) as journal:
        limit = ChoiceLimit.of(journal, teacher())
        assert limit.refused(8, rejected("'n' must be at most 2"))
        asyncio.run(limit.save(call))
        assert ChoiceLimit.of(journal, teacher()).size == 2
        assert "must be at most 2" in ChoiceLimit.of(journal, teacher()).text()
        assert ChoiceLimit.of(journal, teacher(4)).size == 4
        other = teacher().model_copy(update={"model": "other"})
        assert ChoiceLimit.of(journal, other).size == 8
