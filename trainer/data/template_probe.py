"""Find out what a chat template puts around an answer by rendering marked conversations.

A template is a program, so its text is not parsed: one conversation is rendered with and without an answer,
and what lies between the generation prompt and the marks is what the template supplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import StudentError

ANSWER = "\ue0f0answer\ue0f1"  # private use: no template trims or splits it
THOUGHT = "\ue0f0thought\ue0f1"
PROBE = "hi"

Template = Callable[[Sequence[Mapping[str, Any]], bool], str]


@dataclass(frozen=True, slots=True)
class ChatShape:
    """What a chat template puts around an assistant's answer.

    Attributes:
        scaffold: text between generation prompt and answer that the template supplies (an empty think
            block): part of the prompt, never supervised.
        lead: white space between generation prompt and answer: the model has to say it.
        end_of_turn: ids after the answer, up to and including the first special token.
        reasoning: text between generation prompt and reasoning, and between reasoning and answer; None where
            the template has no place for reasoning.
    """

    scaffold: str
    lead: str
    end_of_turn: tuple[int, ...]
    reasoning: tuple[str, str] | None = None

    @property
    def stop_id(self) -> int:
        """The id whose arrival ends an answer."""
        return self.end_of_turn[-1]

    def answer_in(self, said: str) -> str:
        """The answer in what a student said, without the reasoning before it."""
        _, mark, after = said.partition(self.reasoning[1]) if self.reasoning else ("", "", "")
        return after if mark else said


def probe(template: Template, tokenizer: Any) -> ChatShape:
    """Render probes to find where answer, reasoning and end of turn are.

    Args:
        template: renders messages; its second argument asks for a generation prompt.

    Raises:
        StudentError: it does not continue its own generation prompt, or never ends a turn.
    """
    user = {"role": "user", "content": PROBE}
    asked = template([user], True)
    told = template([user, {"role": "assistant", "content": ANSWER}], False)
    before, found, after = told.partition(ANSWER)
    if not found or not before.startswith(asked):
        raise StudentError(
            "the chat template doesn't continue its own generation prompt with the assistant's text",
            place=str(getattr(tokenizer, "name_or_path", "")),
            remedy="repair the template: rendering with add_generation_prompt must be a prefix",
        )
    between = before[len(asked) :]
    scaffold, lead = (between, "") if between.strip() else ("", between)
    return ChatShape(scaffold, lead, _end_of_turn(after, tokenizer), _reasoning(template, user, asked))


def _reasoning(template: Template, user: Mapping[str, Any], asked: str) -> tuple[str, str] | None:
    """Text around reasoning, where the template puts any before the answer and after what it supplies."""
    answer = {"role": "assistant", "content": ANSWER}
    for name in ("reasoning_content", "reasoning", "thinking"):
        try:
            told = template([user, {**answer, name: THOUGHT}], False)
        except StudentError:
            continue
        before, found, rest = told.partition(THOUGHT)
        close, also, _ = rest.partition(ANSWER)
        if found and also and before.startswith(asked):
            return before[len(asked) :], close
    return None


def _end_of_turn(after: str, tokenizer: Any) -> tuple[int, ...]:
    ids = tokenizer.encode(after, add_special_tokens=False)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for position, token in enumerate(ids):
        if token in special:
            return tuple(ids[: position + 1])
    if tokenizer.eos_token_id is None:
        raise StudentError(
            "neither the chat template nor the tokenizer says how a turn ends",
            place=str(getattr(tokenizer, "name_or_path", "")),
            remedy="give the tokenizer an eos_token",
        )
    return (int(tokenizer.eos_token_id),)
