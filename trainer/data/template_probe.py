"""Find out what a chat template puts around an answer by rendering a conversation with a marked answer.

A template is a program, so its text is not parsed. The same conversation is rendered with a generation
prompt and with an answer; the text between the two and after the answer comes from the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import StudentError

# Private-use characters mark the ends, so that no template trims or splits the marked text.
ANSWER = "\ue0f0answer\ue0f1"
THOUGHT = "\ue0f0thought\ue0f1"
QUESTION = "hi"
# An added token that has meaning to a template, such as <think>. Others, such as "\n\n", are plain text.
MARKUP_TOKEN = re.compile(r"<\S+>|\[\S+\]")

Template = Callable[[Sequence[Mapping[str, Any]], bool], str]


@dataclass(frozen=True, slots=True)
class ChatShape:
    """The text and ids that a chat template puts around an assistant's answer.

    Attributes:
        scaffold: text between generation prompt and answer that the template supplies, such as an empty
            think block. It is part of the prompt and never supervised.
        lead: white space between generation prompt and answer, which the model has to generate.
        end_of_turn: ids after the answer, up to and including the first special token.
        reasoning: text between generation prompt and reasoning, and between reasoning and answer; None if
            the template can't render reasoning.
    """

    scaffold: str
    lead: str
    end_of_turn: tuple[int, ...]
    reasoning: tuple[str, str] | None = None

    @property
    def stop_id(self) -> int:
        """The id that ends an answer."""
        return self.end_of_turn[-1]

    def answer_in(self, generated: str) -> str:
        """Return the answer in a generated text, without the reasoning before it."""
        _, mark, after = generated.partition(self.reasoning[1]) if self.reasoning else ("", "", "")
        return after if mark else generated


def probe(template: Template, tokenizer: Any, encode: Callable[[str], list[int]]) -> ChatShape:
    """Render marked conversations to find the text around answer and reasoning, and the end of a turn.

    Args:
        template: renders messages; its second argument asks for a generation prompt.
        encode: encodes a text of the template as it is encoded when other text precedes it.

    Raises:
        StudentError: an answer does not continue the generation prompt, or no turn ever ends.
    """
    user = {"role": "user", "content": QUESTION}
    prompt = template([user], True)
    conversation = template([user, {"role": "assistant", "content": ANSWER}], False)
    before, match, after = conversation.partition(ANSWER)
    if not match or not before.startswith(prompt):
        raise StudentError(
            "the chat template doesn't continue its own generation prompt with the assistant's text",
            place=str(getattr(tokenizer, "name_or_path", "")),
            remedy="repair the template: rendering with add_generation_prompt must be a prefix",
        )
    between = before[len(prompt) :]
    scaffold, lead = (between, "") if between.strip() else ("", between)
    return ChatShape(
        scaffold, lead, _end_of_turn(encode(after), tokenizer), _reasoning(template, user, prompt)
    )


def _reasoning(template: Template, user: Mapping[str, Any], prompt: str) -> tuple[str, str] | None:
    """Find the text around reasoning; None if the template renders none between prompt and answer."""
    answer = {"role": "assistant", "content": ANSWER}
    for name in ("reasoning_content", "reasoning", "thinking"):
        try:
            conversation = template([user, {**answer, name: THOUGHT}], False)
        except StudentError:
            continue
        before, thought, rest = conversation.partition(THOUGHT)
        close, answered, _ = rest.partition(ANSWER)
        if thought and answered and before.startswith(prompt):
            return before[len(prompt) :], close
    return None


def _end_of_turn(ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Cut the ids after an answer behind the first control token; without one the turn ends with EOS.

    Added tokens of white space, as Gemma and Phi have for empty lines and indents, stand in answers, too: a
    student that was taught to end with one would stop at its first paragraph.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} | set(tokenizer.all_special_ids)
    markup = {number for number, token in added if MARKUP_TOKEN.fullmatch(token.content)}
    words = {number for number, token in added if token.content.strip()}
    for ends in (special | markup, words):
        for position, token in enumerate(ids):
            if token in ends:
                return tuple(ids[: position + 1])
    if tokenizer.eos_token_id is None:
        raise StudentError(
            "neither the chat template nor the tokenizer defines how a turn ends",
            place=str(getattr(tokenizer, "name_or_path", "")),
            remedy="give the tokenizer an eos_token",
        )
    return (int(tokenizer.eos_token_id),)
