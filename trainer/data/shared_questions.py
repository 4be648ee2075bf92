"""Notice rows to learn that ask a held-out prompt's question under another system prompt. Loads no torch.

Prompts are drawn by all of their content. Where each question is asked under several system prompts, as to
get answers in several manners, a question may so be learned and held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harvester.system.counted import counted
from trainer.data.row_rules import normalised

_SYSTEM_ROLES = frozenset({"system", "developer"})


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the normalised text of a prompt without its system prompt; "" if there is no other text."""
    return normalised([message for message in messages if message.get("role") not in _SYSTEM_ROLES])


def count(
    learned: Iterable[Sequence[Mapping[str, Any]]], held_out: Sequence[Sequence[Mapping[str, Any]]]
) -> int:
    """Count the learned prompts that have the question of a held-out one, but are not that prompt."""
    questions = {question_of(messages) for messages in held_out} - {""}
    whole = {normalised(messages) for messages in held_out if questions}
    return sum(
        question_of(messages) in questions and normalised(messages) not in whole
        for messages in (learned if questions else ())
    )


def notes(rows: int, of: int) -> tuple[str, ...]:
    """Return a line that counts such rows; nothing if there are none.

    Args:
        rows: that have the question of a held-out prompt. of: rows to learn.
    """
    if not rows:
        return ()
    return (
        f"{rows:,} of {counted(of, 'row')} to learn ask the question of a held-out prompt under another "
        "system prompt: unless that changes what the answer has to say, held-out scores are too high; give "
        "all prompts of a question the same split",
    )
