"""Messages + completion -> token ids, and where the supervised part begins. No torch.

Prompt and completion are tokenised apart: what the model sees at inference ends exactly where the
prompt ends, so no BPE merge may cross that border. The teacher's text never passes through the chat
template: it can't be trimmed, rewritten or read as control tokens, and what is trained is the text verbatim
followed by the template's own end of turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import StudentError
from trainer.hold import time_limit

Ids = npt.NDArray[np.int32]
TEMPLATE_S = 5.0  # a template is a program of others; sandboxed by transformers, bounded here
DATE = "26 Jul 2024"  # what Llama 3's template falls back to: today's would change every prompt tomorrow
_ANSWER = "\ue0f0answer\ue0f1"  # private use: no template trims or splits it
_SPECIAL = "\ue0f2{}\ue0f3"


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered sample.

    Attributes:
        ids: [length] int32, prompt then completion then end of turn.
        prompt_length: tokens of the prompt; everything after them is supervised.
        terminated: whether the last id is the end of turn.
    """

    ids: Ids
    prompt_length: int
    terminated: bool = True

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class ChatShape:
    """What a chat template puts around an assistant's answer.

    Attributes:
        scaffold: text between generation prompt and answer that the template supplies (an empty think
            block): part of the prompt, never supervised.
        lead: white space between generation prompt and answer: the model has to say it.
        end_of_turn: ids after the answer, up to and including the first special token.
    """

    scaffold: str
    lead: str
    end_of_turn: tuple[int, ...]

    @property
    def stop_id(self) -> int:
        """The id whose arrival ends an answer."""
        return self.end_of_turn[-1]


class Renderer:
    """A tokenizer and the shape of its chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Raises:
        StudentError: no chat template, one that fails, or one that never ends a turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise StudentError(
                "the student's tokenizer has no chat template",
                place=str(getattr(tokenizer, "name_or_path", "")),
                remedy="add chat_template.jinja to the base folder; none is invented here",
            )
        self.tokenizer = tokenizer
        self._specials = sorted(_special_texts(tokenizer), key=len, reverse=True)
        self.shape = self._learn_shape()

    @property
    def template_sha256(self) -> str:
        """Hash of the chat template's text."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def prompts(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        """Ids of each row of messages, generation prompt included; what the model continues."""
        return self._encode([self._prompt_text(messages) for messages in rows])

    def examples(
        self, rows: Sequence[Sequence[Mapping[str, Any]]], answers: Sequence[str], terminated: Sequence[bool]
    ) -> list[Example]:
        """Render rows of messages with the teacher's answers.

        Args:
            rows: messages of each prompt.
            answers: the text to learn, verbatim.
            terminated: whether the end of turn follows; not so for answers cut by a token limit.
        """
        plain = self.tokenizer(
            [self.shape.lead + answer for answer in answers],
            add_special_tokens=False,
            split_special_tokens=True,  # "<|im_end|>" in the teacher's text stays text
        )["input_ids"]
        made = []
        for prompt, answer, ends in zip(self.prompts(rows), plain, terminated, strict=True):
            ids = [*prompt, *answer, *(self.shape.end_of_turn if ends else ())]
            made.append(Example(np.asarray(ids, dtype=np.int32), len(prompt), ends))
        return made

    def _prompt_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        # Control tokens written by a user are hidden from the template and put back as plain text.
        hidden = [{**m, "content": self._hide(m.get("content") or "")} for m in messages]
        return self._template(hidden, generation=True) + self.shape.scaffold

    def _template(self, messages: Sequence[Mapping[str, Any]], *, generation: bool) -> str:
        try:
            with time_limit(TEMPLATE_S):
                text = self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generation, date_string=DATE
                )
        except Exception as error:  # noqa: BLE001 - jinja raises whatever the template's author chose
            raise StudentError(
                f"the chat template refuses these messages: {error}",
                place=str(getattr(self.tokenizer, "name_or_path", "")),
                remedy="roles must be those the student's template knows",
            ) from None
        return str(text)

    def _hide(self, content: str) -> str:
        for number, special in enumerate(self._specials):
            if special in content:
                content = content.replace(special, _SPECIAL.format(number))
        return content

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if not any("\ue0f2" in text for text in texts):
            ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return ids
        return [self._encode_pieces(text) for text in texts]

    def _encode_pieces(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in text.split("\ue0f2"):
            number, mark, rest = piece.partition("\ue0f3")
            if mark and number.isdigit() and int(number) < len(self._specials):
                plain = self._specials[int(number)]
                ids += self.tokenizer.encode(plain, add_special_tokens=False, split_special_tokens=True)
                piece = rest
            ids += self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
        return ids

    def _learn_shape(self) -> ChatShape:
        user = {"role": "user", "content": "hi"}
        asked = self._template([user], generation=True)
        told = self._template([user, {"role": "assistant", "content": _ANSWER}], generation=False)
        before, found, after = told.partition(_ANSWER)
        if not found or not before.startswith(asked):
            raise StudentError(
                "the chat template doesn't continue its own generation prompt with the assistant's text",
                place=str(getattr(self.tokenizer, "name_or_path", "")),
                remedy="repair the template: rendering with add_generation_prompt must be a prefix",
            )
        between = before[len(asked) :]
        scaffold, lead = (between, "") if between.strip() else ("", between)
        return ChatShape(scaffold, lead, self._end_of_turn(after))

    def _end_of_turn(self, after: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode(after, add_special_tokens=False)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for position, token in enumerate(ids):
            if token in special:
                return tuple(ids[: position + 1])
        if self.tokenizer.eos_token_id is None:
            raise StudentError(
                "neither the chat template nor the tokenizer says how a turn ends",
                place=str(getattr(self.tokenizer, "name_or_path", "")),
                remedy="give the tokenizer an eos_token",
            )
        return (int(self.tokenizer.eos_token_id),)


def _special_texts(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
