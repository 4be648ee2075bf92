"""Render messages and an answer to token ids, and record where the supervised part begins. Loads no torch.

Prompt and answer are tokenised separately: at inference the prompt ends exactly there, so no BPE merge may
cross the boundary. The answer never passes through the chat template, which could trim it, rewrite it, or
turn it into control tokens. The supervised part is the answer verbatim, then the end of turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data import template_probe
from trainer.errors import StudentError
from trainer.process import time_limit

Ids = npt.NDArray[np.int32]
Conversations = Sequence[Sequence[Mapping[str, Any]]]
# Limit on rendering one conversation: a template comes with the base and may loop. transformers runs it in
# a sandbox, which does not limit its time.
TEMPLATE_TIMEOUT_S = 5.0
# Date that templates are given. The current date would change every prompt from one day to the next; Llama
# 3's template uses this one when it is given none.
TEMPLATE_DATE = "26 Jul 2024"
# Put before a text when the tokenizer would add a space at the start of an isolated text; its ids are then
# cut off.
ANCHOR = "\n"
# An added token that has meaning to a template, such as <think>. Others, such as "\n\n", are plain text.
MARKUP_TOKEN = re.compile(r"<\S+>|\[\S+\]")
# Stands for a special token inside a message, by its number, while the template renders the message.
_SPECIAL = "\ue0f2{}\ue0f3"


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered sample.

    Attributes:
        ids: [length] int32: prompt, completion, end of turn.
        prompt_length: tokens of the prompt; all tokens after it are supervised.
        terminated: whether the last id is the end of turn.
    """

    ids: Ids
    prompt_length: int
    terminated: bool = True

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.prompt_length


class Renderer:
    """Render conversations with a tokenizer and its chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Attributes:
        chat_shape: what the template puts around an answer.

    Raises:
        StudentError: there is no chat template, it fails, or it never ends a turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise StudentError(
                "the student's tokenizer has no chat template",
                place=str(getattr(tokenizer, "name_or_path", "")),
                remedy="add chat_template.jinja to the base folder, or set [student] template",
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._specials = sorted(special, key=len, reverse=True)
        # "<think>" is often an added token that is not special; in an answer it has to stay text as well.
        markup = {token.content for token in added if MARKUP_TOKEN.fullmatch(token.content)} - special
        marks = sorted((mark for mark in markup if mark in tokenizer.chat_template), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None
        anchor, anchored, alone = self._split([ANCHOR, ANCHOR + "x", "x"])
        # SentencePiece adds a space before "x" alone, but not before "x" after the anchor.
        self._anchor = anchor if anchored != anchor + alone else []
        self.chat_shape = template_probe.probe(self.template, tokenizer)

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the chat template's text."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def prompts(self, rows: Conversations, thinking: Sequence[bool] = ()) -> list[list[int]]:
        """Return the ids of each prompt, which the model continues; they include the generation prompt.

        Args:
            thinking: for each row, whether the answer begins with reasoning; the prompt then ends before
                the scaffold. Empty: none does.
        """
        thinking = thinking or [False] * len(rows)
        return self._encode(
            [
                self.prompt_text(messages) + ("" if thinks else self.chat_shape.scaffold)
                for messages, thinks in zip(rows, thinking, strict=True)
            ]
        )

    def examples(
        self,
        rows: Conversations,
        answers: Sequence[str],
        terminated: Sequence[bool],
        thoughts: Sequence[str | None] = (),
    ) -> list[Example]:
        """Render rows of messages with the teacher's answers.

        Args:
            rows: messages of each prompt.
            answers: the texts to learn, verbatim.
            terminated: whether the end of turn follows; false for answers cut by a token limit.
            thoughts: the reasoning to learn before each answer, verbatim; empty: none.

        Raises:
            StudentError: there is reasoning to learn, and the template can't render reasoning.
        """
        thoughts = thoughts or [None] * len(rows)
        prompts = self.prompts(rows, [bool(thought) for thought in thoughts])
        leads = ["" if thought else self.chat_shape.lead for thought in thoughts]
        answer_ids = self.texts([lead + answer for lead, answer in zip(leads, answers, strict=True)])
        examples = []
        for prompt, thought, answer, ends in zip(prompts, thoughts, answer_ids, terminated, strict=True):
            before = self._thought(thought) if thought else []
            ids = [*prompt, *before, *answer, *(self.chat_shape.end_of_turn if ends else ())]
            examples.append(Example(np.asarray(ids, dtype=np.int32), len(prompt), ends))
        return examples

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that the student has to generate: nothing in them becomes a control token."""
        if self._marks is None or not any(self._marks.search(text) for text in texts):
            return self._plain(texts)
        return [self._unmarked(text) for text in texts]

    def prompt_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render a prompt without scaffold. Special tokens in a message are replaced by placeholders."""
        return self.template([{**m, "content": self._hide(m.get("content") or "")} for m in messages], True)

    def template(self, messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
        """Render messages with the chat template, its variables set; nothing else calls the template.

        Raises:
            StudentError: the template raises, does something that the sandbox forbids, or takes too long.
        """
        try:
            with time_limit(TEMPLATE_TIMEOUT_S):
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=generation,
                    date_string=TEMPLATE_DATE,
                )
        except Exception as error:  # noqa: BLE001 - jinja raises whatever the template's author chose
            raise StudentError(
                f"the chat template refuses these messages: {error}",
                place=str(getattr(self.tokenizer, "name_or_path", "")),
                remedy="roles must be those the student's template knows",
            ) from None
        return str(text)

    def _thought(self, thought: str) -> list[int]:
        if self.chat_shape.reasoning is None:
            raise StudentError(
                "the chat template can't render reasoning",
                place="data.reasoning",
                remedy='reasoning = "inline" or "drop"',
            )
        before, after = (
            self.tokenizer.encode(text, add_special_tokens=False) if text else []
            for text in self.chat_shape.reasoning
        )
        return [*before, *self.texts([thought])[0], *after]

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts so that "<|im_end|>" in them becomes the ids of its characters."""
        encoding = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return list(encoding["input_ids"])

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._anchor:
            return self._split(texts)
        length = len(self._anchor)
        return [
            ids[length:] if ids[:length] == self._anchor else self._split([text])[0]
            for ids, text in zip(self._split([ANCHOR + text for text in texts]), texts, strict=True)
        ]

    def _unmarked(self, text: str) -> list[int]:
        assert self._marks is not None
        ids: list[int] = []
        for piece in self._marks.split(text):
            is_mark = piece and self._marks.fullmatch(piece)
            for part in (piece[:1], piece[1:]) if is_mark else (piece,):
                ids += self._plain([part])[0] if part else []
        return ids

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
                ids += self._plain([self._specials[int(number)]])[0]
                piece = rest
            ids += self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
        return ids
