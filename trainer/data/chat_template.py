"""Render messages and an answer to token ids, and mark where the supervised part begins. Loads no torch.

Prompt and answer are tokenised separately: at inference the model sees a prompt that ends exactly there, so
no BPE merge may cross the boundary. The teacher's text never passes through the chat template: a template
could trim or rewrite it, or read it as control tokens. The supervised part is the text verbatim, then the
end of turn.
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
TEMPLATE_TIMEOUT_S = 5.0  # a template is a program of others; sandboxed by transformers, bounded here
# Llama 3 falls back to this date; the current date would change every prompt from one day to the next.
TEMPLATE_DATE = "26 Jul 2024"
ANCHOR = "\n"  # before text whose tokenizer would put a space at the start of it
MARKUP_TOKEN = re.compile(r"<\S+>|\[\S+\]")
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
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._specials = sorted(special, key=len, reverse=True)
        # "<think>" is often an added token that isn't special: in an answer it has to stay text as well
        # (and only what looks like a mark: some tokenizers add "\n\n", which is text like any other)
        said = {token.content for token in added if MARKUP_TOKEN.fullmatch(token.content)} - special
        marks = sorted((mark for mark in said if mark in tokenizer.chat_template), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None
        bare, self._anchor = self._split([ANCHOR, ANCHOR + "x", "x"]), []
        if bare[1] != bare[0] + bare[2]:  # "x" alone gets a space before it, as SentencePiece does
            self._anchor = bare[0]
        self.shape = template_probe.probe(self.template, tokenizer)

    @property
    def template_sha256(self) -> str:
        """Hash of the chat template's text."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def prompts(self, rows: Conversations, thinking: Sequence[bool] = ()) -> list[list[int]]:
        """Ids of each row of messages, generation prompt included; what the model continues.

        Args:
            thinking: which rows are continued with reasoning, so without the scaffold that closes it; none.
        """
        thinks = thinking or [False] * len(rows)
        return self._encode(
            [
                self.prompt_text(messages) + ("" if thought else self.shape.scaffold)
                for messages, thought in zip(rows, thinks, strict=True)
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
            answers: the text to learn, verbatim.
            terminated: whether the end of turn follows; not so for answers cut by a token limit.
            thoughts: reasoning to learn, verbatim, where the template has its place for it.

        Raises:
            StudentError: reasoning is to be kept and the template has no place for it.
        """
        thinks = thoughts or [None] * len(rows)
        prompts = self.prompts(rows, [bool(thought) for thought in thinks])
        leads = ["" if thought else self.shape.lead for thought in thinks]
        plain = self.texts([lead + answer for lead, answer in zip(leads, answers, strict=True)])
        made = []
        for prompt, thought, answer, ends in zip(prompts, thinks, plain, terminated, strict=True):
            before = self._thought(thought) if thought else []
            ids = [*prompt, *before, *answer, *(self.shape.end_of_turn if ends else ())]
            made.append(Example(np.asarray(ids, dtype=np.int32), len(prompt), ends))
        return made

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that a student has to say: nothing in them is a control token."""
        if self._marks is None or not any(self._marks.search(text) for text in texts):
            return self._plain(texts)
        return [self._unmarked(text) for text in texts]

    def prompt_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A prompt as the template writes it, without scaffold; control tokens of a user stay hidden."""
        # They are hidden from the template and put back as plain text.
        return self.template([{**m, "content": self._hide(m.get("content") or "")} for m in messages], True)

    def template(self, messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
        """Messages through the chat template: the one place that calls it, with every choice made.

        Raises:
            StudentError: the template raises, reaches out or does not end.
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
        if self.shape.reasoning is None:
            raise StudentError(
                "the chat template has no place for reasoning",
                place="data.reasoning",
                remedy='reasoning = "inline" or "drop"',
            )
        before, after = (
            self.tokenizer.encode(t, add_special_tokens=False) if t else [] for t in self.shape.reasoning
        )
        return [*before, *self.texts([thought])[0], *after]

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        # "<|im_end|>" in the teacher's text stays text
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return list(found["input_ids"])

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._anchor:
            return self._split(texts)
        border = len(self._anchor)
        return [
            ids[border:] if ids[:border] == self._anchor else self._split([text])[0]
            for ids, text in zip(self._split([ANCHOR + text for text in texts]), texts, strict=True)
        ]

    def _unmarked(self, text: str) -> list[int]:
        assert self._marks is not None
        ids: list[int] = []
        for piece in self._marks.split(text):
            whole = piece and self._marks.fullmatch(piece)
            for part in (piece[:1], piece[1:]) if whole else (piece,):
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
