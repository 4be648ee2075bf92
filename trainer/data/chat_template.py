"""Render messages and an answer to token ids, and record where the supervised part begins. Loads no torch.

Prompt and answer are tokenised separately: at inference the prompt ends exactly there, so no BPE merge may
cross the boundary. The answer never passes through the chat template, which could trim it, rewrite it, or
turn it into control tokens. The supervised part is the answer verbatim, then the end of turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data import template_probe
from trainer.data.conversation import Conversation, Message, as_conversation
from trainer.errors import StudentError
from trainer.process import time_limit

Ids = npt.NDArray[np.int32]
Prompts = Sequence[Conversation | Sequence[Message]]
# Limit on rendering one conversation: a template comes with the base and may loop. transformers runs it in
# a sandbox, which does not limit its time.
TEMPLATE_TIMEOUT_S = 5.0
# Remedy where a template refuses messages.
ROLES_REMEDY = "roles must be those the student's template knows"
# Time that templates are given. The current time would change every prompt from one day to the next; Llama
# 3's template uses this date when it is given none.
TEMPLATE_TIME = datetime(2024, 7, 26)
TEMPLATE_DATE = TEMPLATE_TIME.strftime("%d %b %Y")
# A template's call for the current time, with its format as a literal.
CLOCK_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# Replaces the clock of templates; {} is the formatted time by format.
_FIXED_CLOCK = (
    "{{%- macro strftime_now(format) -%}}{{%- set times = {} -%}}{{%- if format not in times -%}}"
    "{{{{ raise_exception('the template writes the current time in a format that it computes') }}}}"
    "{{%- endif -%}}{{{{ times[format] }}}}{{%- endmacro -%}}"
)
# Jinja's functions whose result differs from one call to the next.
RANDOM_CALLS = re.compile(r"\|\s*random\b|\blipsum\s*\(")
# One of these is put before a text when the tokenizer would add a space at the start of an isolated text; its
# ids are then cut off. The first one that does not merge with the text is used.
ANCHORS = ("\n", "0", ".", "]")
# Stands for a special token inside a message, by its number, while the template renders the message. The
# first character itself, which a message may have from an icon font, gets the number after the last token.
_SPECIAL = "\ue0f2{}\ue0f3"
_SPECIAL_BEGIN = _SPECIAL[0]
_SPECIALS_IN_TEXT = re.compile(_SPECIAL.format("([0-9]+)"))
# Stands for a text of a conversation, by its number, to find out whether the template renders it.
_MARK = "\ue0f0text{}\ue0f1"


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Hold the teacher's probabilities of a few tokens at some positions of an example.

    Attributes:
        positions: [n] int32, rising: which supervised token of the example, from 0.
        ids: [n, k] int32 ids of the student, distinct in a row, those with a probability first.
        log_probs: [n, k] float16, natural logarithm, as the corpus stores it; -inf where nothing is listed,
            but never in the first column.
    """

    positions: npt.NDArray[np.int32]
    ids: Ids
    log_probs: npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered sample.

    Attributes:
        ids: [length] int32: prompt, completion, end of turn.
        prompt_length: tokens of the prompt; all tokens after it are supervised.
        terminated: whether the last id is the end of turn.
        weight: how much each of its supervised tokens counts in the loss.
        soft: the teacher's probabilities for some of the supervised tokens; None: there are none.
        token_weights: [supervised] fp32, factor on `weight` for each supervised token, which may be negative;
            None: all are 1.
    """

    ids: Ids
    prompt_length: int
    terminated: bool = True
    weight: float = 1.0
    soft: SparseTargets | None = None
    token_weights: npt.NDArray[np.float32] | None = None

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
        fixed_clock: text before the template that replaces its clock by `TEMPLATE_TIME`; "" if it has none.

    Raises:
        StudentError: there is no chat template, it fails, its output is random, or it never ends a turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise StudentError(
                "the student's tokenizer has no chat template",
                place=str(getattr(tokenizer, "name_or_path", "")),
                remedy="add chat_template.jinja to the base folder, or set [student] template",
            )
        if random_call := RANDOM_CALLS.search(tokenizer.chat_template):
            raise StudentError(
                f"the chat template's output is random: it contains {random_call[0]!r}",
                place=str(getattr(tokenizer, "name_or_path", "")),
                remedy="repair it, or set [student] template",
            )
        self.tokenizer = tokenizer
        times = {m[2]: TEMPLATE_TIME.strftime(m[2]) for m in CLOCK_CALL.finditer(tokenizer.chat_template)}
        uses_clock = "strftime_now(" in tokenizer.chat_template
        self.fixed_clock = _FIXED_CLOCK.format(json.dumps(times)) if uses_clock else ""
        self._losses: dict[str, str] = {}
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._specials = sorted(special, key=len, reverse=True)
        # "<think>" is often an added token that is not special; in an answer it has to stay text as well.
        markup = {t.content for t in added if template_probe.MARKUP_TOKEN.fullmatch(t.content)} - special
        marks = sorted((mark for mark in markup if mark in tokenizer.chat_template), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None
        anchor, anchored, alone = self._split([ANCHORS[0], ANCHORS[0] + "x", "x"])
        # SentencePiece adds a space before "x" alone, but not before "x" after the anchor.
        adds_space = anchored != anchor + alone
        self._anchors = list(zip(ANCHORS, self._split(ANCHORS), strict=True)) if adds_space else []
        self._developer_role = self._role_for_developer()
        self.chat_shape = template_probe.probe(self.template, tokenizer, self._encode_in_place)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts its BOS token before a text by itself."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer("x")["input_ids"][:1]) == [bos]

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the chat template's text."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def prompts(self, rows: Prompts, thinking: Sequence[bool] = ()) -> list[list[int]]:
        """Return the ids of each prompt, which the model continues; they include the generation prompt.

        Args:
            thinking: for each row, whether the answer begins with reasoning; the prompt then ends before
                the scaffold. Empty: none does.
        """
        thinking = thinking or [False] * len(rows)
        return self._encode(
            [
                self.learned_prompt(messages, thinks=thinks)
                for messages, thinks in zip(rows, thinking, strict=True)
            ]
        )

    def examples(
        self,
        rows: Prompts,
        answers: Sequence[str],
        terminated: Sequence[bool],
        thoughts: Sequence[str | None] = (),
    ) -> list[Example]:
        """Render rows of messages with the teacher's answers.

        Args:
            rows: what is asked, with or without tools.
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

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids that follow a prompt: a space at their start is part of the text."""
        if not self._anchors:
            return str(self._decoded(ids))
        anchor = self._anchors[0][1]
        return str(self._decoded([*anchor, *ids])[len(self._decoded(anchor)) :])

    def prompt_text(self, prompt: Conversation | Sequence[Message]) -> str:
        """Render a prompt without scaffold. Special tokens in a message are replaced by placeholders."""
        conversation = as_conversation(prompt)
        return self.template(self._hidden(conversation.messages), True, self._hidden(conversation.tools))

    def accepts(self, prompt: Conversation | Sequence[Message]) -> bool:
        """Whether the chat template renders a prompt."""
        try:
            self.prompt_text(prompt)
        except StudentError:
            return False
        return True

    def learned_prompt(self, prompt: Conversation | Sequence[Message], *, thinks: bool) -> str:
        """Render a prompt as it is learned: with the scaffold, unless the answer begins with reasoning."""
        return self.prompt_text(prompt) + ("" if thinks else self.chat_shape.scaffold)

    def text_lost(self, prompt: Conversation | Sequence[Message], rendered: str = "") -> str:
        """Return the first text of a prompt that the chat template leaves out; "" if it renders all of them.

        Two renderings are searched: one with unique marks in place of the texts, because a short text may
        also occur elsewhere, and the prompt itself, because a template may treat texts by their content.
        Reasoning of earlier turns does not count: templates drop it on purpose.

        Args:
            rendered: the rendered prompt, if it is at hand.
        """
        conversation = as_conversation(prompt)
        marked, texts = _with_marks(conversation)
        key = hashlib.sha256(json.dumps([marked.messages, marked.tools]).encode()).hexdigest()
        if key not in self._losses:
            self._losses[key] = self._first_missing(marked, list(texts))
        if lost := self._losses[key]:
            return texts[lost]
        rendered = rendered or self._shown(self.prompt_text(conversation))
        wanted = (text.rsplit("</think>", 1)[-1].strip() for text in conversation.texts())
        return next((text for text in wanted if not _contains(rendered, text)), "")

    def with_known_roles(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages in which a developer is the system if the template does not know developers."""
        return [{**m, "role": self._developer_role} if m["role"] == "developer" else m for m in messages]

    def has_special_text(self, prompt: Conversation) -> bool:
        """Whether a text of a prompt contains a special token, which is encoded as text here."""
        texts = list(_strings([*prompt.messages, *prompt.tools]))
        return any(special in text for special in self._specials for text in texts)

    def template(
        self, messages: Sequence[Message], generation: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Render messages with the chat template, its variables set.

        A developer's message becomes a system message if the template does not know developers.

        Raises:
            StudentError: the template raises, does something that the sandbox forbids, or takes too long.
        """
        try:
            with time_limit(TEMPLATE_TIMEOUT_S):
                text = self.tokenizer.apply_chat_template(
                    self.with_known_roles(messages),
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=generation,
                    date_string=TEMPLATE_DATE,
                    chat_template=self.fixed_clock + self.tokenizer.chat_template,
                )
        except Exception as error:  # noqa: BLE001 - jinja raises whatever the template's author chose
            raise StudentError(
                f"the chat template refuses these messages: {str(error)[:500]}",
                place=str(getattr(self.tokenizer, "name_or_path", "")),
                remedy=ROLES_REMEDY,
            ) from None
        return str(text)

    def _role_for_developer(self) -> str:
        """The role that a developer's message is rendered with: "system" if the template knows only that."""
        self._developer_role = "developer"
        user = {"role": "user", "content": template_probe.QUESTION}
        shows = {
            role: not self._first_missing(Conversation(({"role": role, "content": mark}, user)), [mark])
            for role, mark in (("developer", _MARK.format(0)), ("system", _MARK.format(1)))
        }
        knows = shows["developer"] and "developer" in self.tokenizer.chat_template
        return "developer" if knows or not shows["system"] else "system"

    def _first_missing(self, conversation: Conversation, marks: Sequence[str]) -> str:
        """The first mark that the rendered conversation lacks; "" if it has all."""
        try:
            rendered = self.template(conversation.messages, True, conversation.tools)
        except StudentError:
            return marks[0] if len(marks) == 1 else ""  # the prompt's own rendering decides
        return next((mark for mark in marks if mark not in rendered), "")

    def _decoded(self, ids: Sequence[int]) -> str:
        decoded = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _thought(self, thought: str) -> list[int]:
        if self.chat_shape.reasoning is None:
            raise StudentError(
                "the chat template can't render reasoning",
                place="data.reasoning",
                remedy='set [data] reasoning = "inline" or "drop" in train.toml',
            )
        before, after = (self._encode_in_place(text) if text else [] for text in self.chat_shape.reasoning)
        return [*before, *self.texts([thought])[0], *after]

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts so that "<|im_end|>" in them becomes the ids of its characters."""
        encoding = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return list(encoding["input_ids"])

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that follow other text; nothing in them becomes a special token."""
        if not self._anchors:
            return self._split(texts)
        anchor, anchor_ids = self._anchors[0]
        length = len(anchor_ids)
        return [
            ids[length:] if ids[:length] == anchor_ids else self._in_place(text, split_special_tokens=True)
            for ids, text in zip(self._split([anchor + text for text in texts]), texts, strict=True)
        ]

    def _encode_in_place(self, text: str) -> list[int]:
        """Encode a text of the template that follows other text; special tokens in it are special."""
        return self._in_place(text, split_special_tokens=False)

    def _in_place(self, text: str, *, split_special_tokens: bool) -> list[int]:
        def encode(text: str) -> list[int]:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
            return list(ids["input_ids"])

        for anchor, anchor_ids in self._anchors:
            ids = encode(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return encode(text)

    def _unmarked(self, text: str) -> list[int]:
        assert self._marks is not None
        ids: list[int] = []
        for piece in self._marks.split(text):
            is_mark = piece and self._marks.fullmatch(piece)
            for part in (piece[:1], piece[1:]) if is_mark else (piece,):
                ids += self._plain([part])[0] if part else []
        return ids

    def _hidden(self, value: Any) -> Any:
        """A copy of messages or tools with placeholders for the special tokens in their texts."""
        if isinstance(value, Mapping):
            return {key: self._hidden(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hidden(item) for item in value]
        if not isinstance(value, str):
            return value
        value = value.replace(_SPECIAL_BEGIN, _SPECIAL.format(len(self._specials)))
        for number, special in enumerate(self._specials):
            if special in value:
                value = value.replace(special, _SPECIAL.format(number))
        return value

    def _shown(self, text: str) -> str:
        """A rendered prompt with its special tokens in place of the placeholders."""
        if _SPECIAL_BEGIN not in text:
            return text
        shown = {str(number): special for number, special in enumerate([*self._specials, _SPECIAL_BEGIN])}
        return _SPECIALS_IN_TEXT.sub(lambda match: shown.get(match[1], match[0]), text)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if not any(_SPECIAL_BEGIN in text for text in texts):
            ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return ids
        return [self._encode_pieces(text) for text in texts]

    def _encode_pieces(self, text: str) -> list[int]:
        """Encode a rendered prompt; special tokens of its messages become the ids of their characters."""
        ids: list[int] = []
        begin = 0
        for match in _SPECIALS_IN_TEXT.finditer(text):
            if int(match[1]) < len(self._specials):
                ids += self._encode_between(text[begin : match.start()], is_first=not ids)
                ids += self._plain([self._specials[int(match[1])]])[0]
                begin = match.end()
        return ids + self._encode_between(text[begin:], is_first=not ids)

    def _encode_between(self, piece: str, *, is_first: bool) -> list[int]:
        """Encode what stands between two special tokens of a message."""
        if not piece:
            return []
        shown = self._shown(piece)
        if is_first:
            return list(self.tokenizer.encode(shown, add_special_tokens=False))
        return self._encode_in_place(shown)


def _with_marks(conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
    """Replace each text of a conversation by a unique mark; return that and the texts by mark."""
    texts: dict[str, str] = {}

    def mark(text: Any) -> Any:
        if not isinstance(text, str) or not text.strip():
            return text
        name = _MARK.format(len(texts))
        texts[name] = text
        return name

    def marked_function(function: Mapping[str, Any]) -> Mapping[str, Any]:
        names = [name for name in ("name", "description") if name in function]
        changed = {**function, **{name: mark(function[name]) for name in names}}
        if isinstance(function.get("arguments"), Mapping):
            changed["arguments"] = {key: mark(item) for key, item in function["arguments"].items()}
        return changed

    messages = []
    for message in conversation.messages:
        changed = {**message, "content": mark(message.get("content"))}
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [
                {**call, "function": marked_function(call.get("function", {}))} for call in calls
            ]
        messages.append(changed)
    tools = [
        {**tool, "function": marked_function(tool["function"])} if "function" in tool else tool
        for tool in conversation.tools
    ]
    return Conversation(tuple(messages), tuple(tools)), texts


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts in messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _contains(rendered: str, text: str) -> bool:
    """Whether a text is in a rendered prompt, as it is or escaped as in JSON."""
    return (
        text in rendered
        or json.dumps(text, ensure_ascii=False)[1:-1] in rendered
        or json.dumps(text)[1:-1] in rendered
    )
