"""Recognise rows of prompt files in the formats of other tools, and convert them to prompt lines. Pure.

The table `FORMATS` lists what is recognised, in the order in which it is tried; README shows the same list.
A row is never converted by guessing: one that lacks something the prompt needs (an image that lies elsewhere,
a turn of an unknown role) is an error, which the caller counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harvester.prompts.turns import (
    RowError,
    batch_prompt,
    chosen_answer,
    conversation,
    is_turns,
    parsed_list,
    plain_text,
    tool_schemas,
)

# Fields of a prompt line that are sent with its messages.
SENT_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "response_format")

# Columns that hold a question, best name first.
QUESTIONS = (
    *("question", "query", "instruction", "user_prompt", "user_input", "user_query", "human", "problem"),
    *("input_text", "inputs", "input"),
)
# Columns that hold an answer to it.
ANSWERS = (
    *("answer", "response", "output", "completion", "chosen", "answers", "solution", "target", "targets"),
    *("assistant", "gpt", "expected_output", "ground_truth", "canonical_solution", "output_text"),
)
# Columns with text that the question is about; Alpaca calls it `input`.
CONTEXTS = ("context", "passage", "input", "document", "article")
SYSTEMS = ("system", "system_prompt", "system_message", "sys_prompt")
# Columns with a list of turns. In the first ones a list of texts is a conversation too; in others, as in
# MT-Bench's `turns`, such a list holds questions only.
TEXT_CONVERSATIONS = ("conversations", "conversation", "dialog", "dialogue", "dialogs")
CONVERSATIONS = (*TEXT_CONVERSATIONS, "messages", "turns", "chat", "data")
CHOICES = ("choices", "options")
IDS = ("id", "prompt_id", "custom_id", "question_id", "uuid", "conversation_id", "task_id", "qid")


@dataclass(slots=True)
class Converted:
    """A row as a prompt line.

    Attributes:
        format: name of the format, as in `FORMATS`.
        messages: what is asked, without the answer at the end.
        answer: the answer that the row holds; None for none.
        fields: fields of the prompt line that are sent with the messages (`SENT_FIELDS`).
        used: columns that went into these.
        dropped: what is neither sent nor kept, by name.
    """

    format: str
    messages: list[dict[str, Any]]
    answer: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    def send(self, name: str, value: Any, column: str) -> None:
        """Send a field, which was read out of this column."""
        self.fields[name] = value
        self.used.add(column)

    def set_answer(self, answer: str | None, column: str = "") -> None:
        """Note the answer that the row holds, and the column that holds it, if it is one of its own."""
        self.answer = answer
        if column:
            self.used.add(column)

    def drop(self, name: str) -> None:
        """Note what is neither sent nor kept."""
        self.dropped.add(name)


class Row:
    """The columns of one row, found by lower-case names."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._names = {_plain(str(name)): name for name in reversed(list(columns))}
        self._columns = columns

    def first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Return name and value of the first of these columns that is not empty; "" and None for none."""
        for name in names:
            own = self._names.get(name)
            if own is not None and self._columns[own] not in (None, "", [], {}):
                return own, self._columns[own]
        return "", None

    def has(self, name: str) -> bool:
        """Return whether there is such a column, empty or not."""
        return name in self._names


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def convert(columns: Mapping[str, Any], column: str = "") -> Converted | None:
    """Convert a row; None if its format is not recognised.

    Args:
        column: the column that holds the question, where the operator names it.

    Raises:
        RowError: the format is recognised, but this row can't be asked as it is.
    """
    row = Row(columns)
    if column:
        return _question(row, (_plain(column),), f"the column {column}")
    for name, read in FORMATS.items():
        converted = read(row, name)
        if converted is not None:
            if converted.format != BATCH:
                _add_sent_fields(row, converted)
            return converted
    return None


def identities(columns: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the columns that may hold the row's id, best first."""
    row = Row(columns)
    for name in IDS:
        own, value = row.first((name,))
        if own:
            yield own, value


def looks_like(columns: Mapping[str, Any]) -> str:
    """Return the name of the format of a row that is no prompt line; "" if it is not recognised."""
    try:
        converted = convert(columns)
    except RowError as error:
        return error.format
    return converted.format if converted is not None else ""


def is_convertible(columns: Mapping[str, Any]) -> bool:
    """Return whether a row is of another format and can be converted as it is."""
    try:
        return convert(columns) is not None
    except RowError:
        return False


def _add_sent_fields(row: Row, converted: Converted) -> None:
    own, value = row.first(("tools", "functions"))
    schemas = tool_schemas(value) if own else None
    if schemas:
        converted.send("tools", schemas, own)
    for name in SENT_FIELDS[1:]:
        own, value = row.first((name,))
        if own and (isinstance(value, dict) or (name != "response_format" and isinstance(value, str | bool))):
            converted.send(name, value, own)


def _prompt_line(row: Row, name: str) -> Converted | None:
    """A prompt line as `harvester run` reads it, without an answer of its own."""
    own, value = row.first(("prompt",))
    others = ("completion", "chosen", *CONVERSATIONS)
    if own != "prompt" or not isinstance(value, str) or parsed_list(value) or row.first(others)[0]:
        return None
    return Converted(name, [_user(plain_text(value, own, name))], used={own})


def _batch(row: Row, name: str) -> Converted | None:
    """A line of a batch file: OpenAI's `body`, Anthropic's `params`, Vertex AI's `request`."""
    own, body = row.first(("body", "params", "request"))
    url = row.first(("url",))[1]
    if not isinstance(body, Mapping) or (isinstance(url, str) and not _asks_for_text(url)):
        return None
    messages, used = batch_prompt(body, name)
    if messages is None:
        return None
    fields = {key: body[key] for key in SENT_FIELDS if body.get(key) is not None}
    dropped = {f"{own}.{key}" for key in body if key not in used and key not in fields}
    envelope = {other for key in ("method", "url", "processed_timestamp") if (other := row.first((key,))[0])}
    return Converted(name, messages, None, fields, {own}, dropped | envelope)


def _asks_for_text(url: str) -> bool:
    """Whether a batch line asks for text; embeddings and moderations bring nothing to learn."""
    return url.rstrip("/").rpartition("/")[2] in {"completions", "responses", "messages"}


def _conversation(row: Row, name: str) -> Converted | None:
    """A list of turns, in any of its spellings."""
    for column in CONVERSATIONS:
        own, value = row.first((column,))
        turns = parsed_list(value) if own else None
        if turns is None or not is_turns(turns, texts=column in TEXT_CONVERSATIONS):
            continue
        messages = conversation(turns, name)
        used = {own}
        _put_system(row, messages, used)
        prompt, text = row.first(("prompt",))
        if prompt:
            first = next((turn.get("content") for turn in messages if turn["role"] == "user"), None)
            if text != first and parsed_list(text) is None:
                raise RowError(f"both {prompt!r} and {own!r} are given, and they differ", name)
            used.add(prompt)
        return _split_answer(Converted(name, messages, used=used), row)
    return None


def _trl(row: Row, name: str) -> Converted | None:
    """TRL's `prompt` and `completion`, or `prompt`, `chosen` and `rejected`; the prompt is text or turns."""
    own, value = row.first(("prompt",))
    answer_column, answer = row.first(("completion", "chosen"))
    turns = parsed_list(value) if own else None
    if isinstance(value, str) and turns is not None and not is_turns(turns, texts=False):
        turns = None  # a text such as "[1, 2]"
    if not own and answer_column and row.has("rejected"):  # the prompt is the beginning of both answers
        turns = parsed_list(answer)
        if turns is None or not is_turns(turns, texts=False):
            return None
        return _split_answer(
            Converted(name, conversation(turns, name), used={answer_column}, dropped=_rejected(row)), row
        )
    if not own or not (isinstance(value, str) or (turns is not None and is_turns(turns, texts=False))):
        return None
    used = {own}
    messages = conversation(turns, name) if turns is not None else [_user(plain_text(value, own, name))]
    _put_system(row, messages, used)
    converted = Converted(name, messages, used=used, dropped=_rejected(row))
    if not answer_column:
        return _split_answer(converted, row)
    converted.set_answer(chosen_answer(answer))
    used.add(answer_column)
    return converted


def _rejected(row: Row) -> set[str]:
    return {own for name in ("rejected",) if (own := row.first((name,))[0])}


def _alpaca(row: Row, name: str) -> Converted | None:
    """`instruction`, with `input` (what it is about) and `output`."""
    if not row.has("instruction") or not (row.has("input") or row.has("output")):
        return None
    return _question(row, ("instruction",), name)


def _columns(row: Row, name: str) -> Converted | None:
    """A column with a question, and perhaps others with context, choices and an answer."""
    return _question(row, QUESTIONS, name)


def _question(row: Row, names: tuple[str, ...], name: str) -> Converted | None:
    own, value = row.first(names)
    if not own:
        return None
    if isinstance(value, list) and is_turns(value, texts=False):
        return _split_answer(Converted(name, conversation(value, name), used={own}), row)
    used = {own}
    text = plain_text(value, own, name)
    for column in CONTEXTS:
        context, content = row.first((column,))
        if context and context not in used and isinstance(content, str) and content.strip():
            is_input = column == "input"
            text = f"{text}\n\n{content}" if is_input else f"{content}\n\n{text}"
            used.add(context)
            break
    choices, listed = row.first(CHOICES)
    if choices:
        text = f"{text}\n\n{_lettered(listed, choices, name)}"
        used.add(choices)
    messages = _history(row, used, name)
    messages.append(_user(text))
    _put_system(row, messages, used)
    converted = Converted(name, messages, used=used)
    return _with_answer_column(converted, row)


def _history(row: Row, used: set[str], name: str) -> list[dict[str, Any]]:
    """Earlier turns of an Alpaca row: a list of pairs."""
    own, value = row.first(("history",))
    turns = parsed_list(value) if own else None
    if not turns or not is_turns(turns, texts=True):
        return []
    used.add(own)
    return conversation(turns, name)


def _lettered(value: Any, column: str, name: str) -> str:
    """Return the choices of a question, one a line, with their labels or A, B, C."""
    value = parsed_list(value) or value
    labels: list[Any] = []
    if isinstance(value, Mapping):
        labels, value = list(value.get("label") or ()), value.get("text")
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise RowError(f"{column!r} is not a list of texts", name)
    if len(labels) != len(value):
        labels = [chr(ord("A") + number) for number in range(len(value))]
    return "\n".join(f"{label}. {choice}" for label, choice in zip(labels, value, strict=True))


def _with_answer_column(converted: Converted, row: Row) -> Converted:
    for column in ANSWERS:
        own, value = row.first((column,))
        if own and own not in converted.used:
            converted.set_answer(chosen_answer(value), own)
            break
    return converted


def _split_answer(converted: Converted, row: Row) -> Converted:
    """Take the assistant turns at the end of a conversation out of it; the last one is the answer."""
    messages = converted.messages
    while messages and messages[-1]["role"] == "assistant":
        turn = messages.pop()
        if converted.answer is None:
            content = turn.get("content")
            converted.set_answer(content if isinstance(content, str) else None)
            if turn.get("tool_calls"):
                converted.drop("the tool call at the end")
    if not any(turn["role"] not in {"system", "developer"} for turn in messages):
        raise RowError("nothing is left to ask without the answer", converted.format)
    return converted


def _put_system(row: Row, messages: list[dict[str, Any]], used: set[str]) -> None:
    own, value = row.first(SYSTEMS)
    if own and isinstance(value, str) and value.strip():
        used.add(own)
        if not messages or messages[0]["role"] not in {"system", "developer"}:
            messages.insert(0, {"role": "system", "content": value})


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


PROMPT_LINES = "prompt lines"
BATCH = "batch lines (OpenAI, Anthropic, Vertex AI)"

# What is recognised: the format's name, and the function that reads a row of it or returns None.
FORMATS: Mapping[str, Callable[[Row, str], Converted | None]] = {
    PROMPT_LINES: _prompt_line,
    BATCH: _batch,
    "conversations (ShareGPT, OpenAI fine-tuning, Hugging Face)": _conversation,
    "prompt and completion (TRL)": _trl,
    "Alpaca": _alpaca,
    "a question column": _columns,
}
