"""Judge answers to rule tasks, as the shipped rubrics ask for it: compute what is right, and compare."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Final

_TAG: Final = r"<{0} ([0-9a-f]{{8}})>\n(.*)\n</{0} \1>"
_REQUEST: Final = re.compile(_TAG.format("request"), re.DOTALL)
_ANSWER: Final = re.compile(_TAG.format("answer"), re.DOTALL)
_PAIR: Final = tuple(re.compile(_TAG.format(f"answer {name}"), re.DOTALL) for name in "AB")
_SCALE: Final = re.compile(r"whole number from (\d+) .*? to (\d+) ", re.DOTALL)


class Preference(StrEnum):
    """What the mock prefers as the judge of a pair: the right answer, the longer one, or the first one."""

    RIGHT = "right"
    LONGER = "longer"
    FIRST = "first"


def biased_verdict(text: str, preference: Preference) -> str | None:
    """Return the verdict on a pair of a judge that does not look at what is right, as JSON.

    Returns:
        None if the text asks to compare no pair, or the judge prefers what is right.
    """
    pair = [answer[2] for each in _PAIR if (answer := each.search(text)) is not None]
    if preference == Preference.RIGHT or len(pair) < 2:
        return None
    if preference == Preference.FIRST:
        return _pair("A")
    lengths = [len(answer) for answer in pair]
    return _pair("tie" if lengths[0] == lengths[1] else ("A" if lengths[0] > lengths[1] else "B"))


def verdict(text: str, right_answer: Callable[[str], str | None]) -> tuple[str, str] | None:
    """Return the right verdict and the opposite one, as JSON; None if the text asks for none.

    Args:
        right_answer: solves the request; None where it can't.
    """
    request = _REQUEST.search(text)
    right = None if request is None else right_answer(request[2])
    if right is None:
        return None
    pair = [answer for each in _PAIR if (answer := each.search(text)) is not None]
    if len(pair) == 2:
        are_right = [answer[2].strip() == right for answer in pair]
        winner = "tie" if are_right[0] == are_right[1] else ("A" if are_right[0] else "B")
        return _pair(winner), _pair("B" if winner == "A" else "A")
    answer, scale = _ANSWER.search(text), _SCALE.search(text)
    if answer is None or scale is None:
        return None
    scores = (int(scale[1]), int(scale[2]))
    is_right = answer[2].strip() == right
    return _score(scores[is_right]), _score(scores[not is_right])


def _score(score: int) -> str:
    return json.dumps({"score": score, "reason": "computed"})


def _pair(winner: str) -> str:
    return json.dumps({"winner": winner, "reason": "computed"})
