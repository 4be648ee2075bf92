"""The rule tasks: every phrasing is understood, answers are exact, slips are never right."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.mock_teacher.tasks.contents import content_key, draw
from harvester.mock_teacher.tasks.phrasings import PHRASINGS
from harvester.mock_teacher.tasks.rules import solve, wrong_answer

EVERY_PHRASING = [
    (task, phrasing) for task, asked in PHRASINGS.items() for phrasing in (*asked.train, *asked.held_out)
]
WORKED_BY_HAND = [
    ("What is 47 + 85?", "sum", "132"),
    ("Add up 999 + 999.", "sum", "1998"),
    ("Spell abcd backwards.", "reverse", "dcba"),
    ("Sort the letters of zebra.", "sort", "aberz"),
    ("Shift the string xyz forward by 5.", "shift", "cde"),
    ("How many times does s occur in possess?", "count", "4"),
    ("Count the letter q in possess.", "count", "0"),
    ("Make quiz upper case.", "upper", "QUIZ"),
    ("What is February 29, 2024 in ISO format?", "date", "2024-02-29"),
    ("Convert 3 May 1999 to ISO format.", "date", "1999-05-03"),
    (
        "Which SQL gives the count of users whose age is at least 30?",
        "sql",
        "SELECT COUNT(*) FROM users WHERE age >= 30",
    ),
    ("Double every letter of moon.", "double", "mmoooonn"),
    ("  Reverse the string abc.\n", "reverse", "cba"),
]
NO_TASK_OF_OURS = [
    "",
    "Hello!",
    "Reverse the string Abc.",
    "Reverse the string ab cd.",
    "Please reverse the string abc.",
    "Shift abc by 9.",
    "Convert 31 June 1999 to ISO format.",
    "What is February 29, 2023 in ISO format?",
    "Write SQL for the email of books with price over 30.",
    "Write SQL for the title of books with age over 30.",
    "What is 12 + ?",
]


@pytest.mark.parametrize(("prompt", "task", "answer"), WORKED_BY_HAND)
def test_answers_worked_by_hand(prompt: str, task: str, answer: str):
    solved = solve(prompt)
    assert solved is not None
    assert (solved.task, solved.answer) == (task, answer)


@pytest.mark.parametrize("prompt", NO_TASK_OF_OURS)
def test_what_is_no_task_is_left_alone(prompt: str):
    assert solve(prompt) is None


def test_there_are_eight_tasks_and_one_held_out_whole_each_asked_in_several_ways():
    assert len(PHRASINGS) == 9
    for phrasings in PHRASINGS.values():
        assert len(phrasings.train) >= 4
        assert len(phrasings.held_out) >= 2
    assert len({phrasing for _, phrasing in EVERY_PHRASING}) == len(EVERY_PHRASING)


@pytest.mark.parametrize(("task", "phrasing"), EVERY_PHRASING)
@settings(max_examples=10)  # of each of 62 phrasings
@given(seed=st.integers(0, 2**32))
def test_every_phrasing_is_read_back_with_its_content(task: str, phrasing: str, seed: int):
    slots = draw(task, random.Random(seed))
    solved = solve(phrasing.format(**slots))
    assert solved is not None
    assert (solved.task, solved.phrasing) == (task, phrasing)
    assert dict(solved.slots) == {name: slots[name] for name in solved.slots}
    assert set(solved.slots) == set(slots)


@pytest.mark.parametrize("task", [task for task in PHRASINGS if task not in ("sum", "count", "date", "sql")])
@given(seed=st.integers(0, 2**32))
def test_an_echo_of_the_content_is_never_right(task: str, seed: int):
    slots = draw(task, random.Random(seed))
    solved = solve(PHRASINGS[task].train[0].format(**slots))
    assert solved is not None
    assert solved.answer != slots["text"]


@pytest.mark.parametrize("task", PHRASINGS)
@given(seed=st.integers(0, 2**32), slip=st.integers(0, 2**32))
def test_a_wrong_answer_is_wrong_and_repeatable(task: str, seed: int, slip: int):
    slots = draw(task, random.Random(seed))
    solved = solve(PHRASINGS[task].train[0].format(**slots))
    assert solved is not None
    wrong = wrong_answer(solved, random.Random(slip))
    assert wrong.strip() == wrong != ""
    assert wrong != solved.answer
    assert wrong == wrong_answer(solved, random.Random(slip))


@pytest.mark.parametrize("prompt", ["Reverse the string a.", "Sort aaaa alphabetically.", "What is 0 + 0?"])
def test_even_degenerate_content_has_a_wrong_answer(prompt: str):
    solved = solve(prompt)
    assert solved is not None
    for seed in range(200):
        assert wrong_answer(solved, random.Random(seed)) not in ("", solved.answer)


def test_the_same_content_in_another_order_has_the_same_key():
    assert content_key("sum", {"a": "12", "b": "345"}) == content_key("sum", {"a": "345", "b": "12"})
    assert content_key("reverse", {"text": "abcd"}) == content_key("sort", {"text": "dbca"})
    assert content_key("sum", {"a": "12", "b": "345"}) != content_key("sum", {"a": "12", "b": "346"})
