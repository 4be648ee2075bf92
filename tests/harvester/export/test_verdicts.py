"""Test how replies of a judge are read, and how verdicts of both orders become one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.config.judge_section import JudgeSection
from harvester.export.verdicts import Task, Verdicts, read_reply

SCORES = JudgeSection(corpus="store", lowest=1, highest=10)
PAIRS = JudgeSection(corpus="store", against="other")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7, "reason": "fine"}', 7.0),
        ('```json\n{"score": 7.5}\n```', 7.5),
        ('I thought about {"score": 1} first.\nMy verdict: {"score": 9, "reason": "a {curly} one"}', 9.0),
        ('{"verdict": {"score": 9}}', None),
        ('Not {valid}: {"score": 2}', 2.0),
        ("{" * 5000 + '{"score": 2}', None),
        ('First {"score": 1}, then {"score": 9}', 9.0),
        ('{"score": 11}', None),
        ('{"score": 0}', None),
        ('{"score": true}', None),
        ('{"score": "7"}', None),
        ('{"score": NaN}', None),
        ("7 out of 10", None),
        ("[7]", None),
        ("", None),
    ],
)
def test_a_score_is_read_out_of_the_json_and_out_of_nothing_else(text: str, score: float | None) -> None:
    assert read_reply(text, SCORES, "") == score


@pytest.mark.parametrize(
    ("winner", "ab", "ba"), [("A", "win", "loss"), (" b ", "loss", "win"), ("tie", "tie", "tie")]
)
def test_the_winner_is_that_of_the_row_whatever_the_order(winner: str, ab: str, ba: str) -> None:
    text = f'{{"winner": "{winner}"}}'
    assert read_reply(text, PAIRS, "ab") == ab
    assert read_reply(text, PAIRS, "ba") == ba
    assert read_reply('{"winner": "C"}', PAIRS, "ab") is None


@given(st.text(max_size=80))
def test_no_reply_breaks_the_reader(text: str) -> None:
    score = read_reply(text, SCORES, "")
    assert score is None or (isinstance(score, float) and 1 <= score <= 10)
    assert read_reply(text, PAIRS, "ab") in (None, "win", "tie", "loss")


@pytest.mark.parametrize(
    ("ab", "ba", "winner"),
    [
        ("win", "win", "win"),
        ("win", "tie", "win"),
        ("win", "loss", "tie"),
        ("loss", "win", "tie"),
        ("tie", "loss", "loss"),
        ("win", None, None),
    ],
)
def test_a_pair_is_won_in_both_orders_together(ab: str, ba: str | None, winner: str | None) -> None:
    verdicts = Verdicts()
    verdicts.add(Task("k", "ab", "r"), ab)  # type: ignore[arg-type]
    if ba is not None:
        verdicts.add(Task("k", "ba", "r"), ba)  # type: ignore[arg-type]
    assert verdicts.winner("k") == winner
    assert len(verdicts) == (winner is not None)


def test_the_bias_to_a_position_is_counted() -> None:
    verdicts = Verdicts()
    for number in range(20):  # ten pairs are won by whoever stands first, ten by the row itself
        verdicts.add(Task(str(number), "ab", "r"), "win")
        verdicts.add(Task(str(number), "ba", "r"), "loss" if number < 10 else "win")
    facts = verdicts.facts()
    assert (facts["win"], facts["tie"], facts["loss"], facts["order_decided"]) == (10, 10, 0, 10)
    first = facts["first_wins"]
    assert first["share"] == 0.75
    assert first["low"] == pytest.approx(0.5981, abs=1e-3)  # Wilson, 30 of 40
    assert first["high"] == pytest.approx(0.8581, abs=1e-3)
