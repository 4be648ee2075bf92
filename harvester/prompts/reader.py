"""Read prompt files as a stream of `Prompt`, with file and line in every error.

JSONL, CSV, plain text (one prompt a line; each also .gz or .zst), Parquet and Arrow, as `formats` reads them.
A JSON line is `{"prompt": "..."}` or `{"messages": [...]}`, with optional `id`, `reference`, `tags`. `tools`,
`tool_choice`, `parallel_tool_calls` and `response_format` are sent with the messages, and so are the settings
that `row_rules` names; any further field becomes metadata, which is stored and never sent. With a template
the fields of the row are what it writes the prompt from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from harvester.api.request_key import canonical
from harvester.api.response_format import check as check_response_format
from harvester.api.types import Message, Prompt
from harvester.errors import ConfigError, NoPrompts, PromptError
from harvester.prompts import dataset_folders, formats, recognise
from harvester.prompts.bad_lines import Bad
from harvester.prompts.row_rules import RowRules
from harvester.store.journal.records import as_json

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_OWN_FIELDS = frozenset({"id", "prompt", "messages", "reference", "tags"})
# With a template they are fields like others.
_ASKED_FIELDS = frozenset({"prompt", "messages"})
BY_DEFAULT = RowRules()
_MESSAGES = 'as in "messages": [{"role": "user", "content": "..."}]'
# Byte order mark, and spaces and joiners without width.
_INVISIBLE = frozenset("\ufeff\u200b\u200c\u200d\u2060\u00ad")


def raise_first(error: PromptError) -> None:
    """Raise the error: no line may be bad."""
    raise error


def find(files: Sequence[str], root: Path, bad: Bad = raise_first) -> list[Path]:
    """Return the prompt files that names and globs match, in a stable order, each once.

    A folder that `datasets` saved stands for its Arrow files.

    Args:
        bad: called for each match that can't be a prompt file; it is left out unless `bad` raises.

    Raises:
        NoPrompts: a name or glob matches nothing.
        PromptError: a name or glob is not valid, or `bad` raises.
    """
    paths: dict[Path, None] = {}
    for pattern in files:
        usable = []
        for path in _matches(pattern, root):
            try:
                if path.is_dir() and dataset_folders.is_dataset(path):
                    usable += dataset_folders.files_of(path, name_of(path, root))
                elif _is_usable(path):
                    usable.append(path)
            except PromptError as error:
                bad(error)
        if not usable and _is_literal(pattern) and (root / pattern).is_dir():
            raise NoPrompts(
                f"{pattern!r} is a folder, and no dataset that `datasets` saved",
                place="prompts.files",
                remedy=f'name the files in it, as in "{pattern.rstrip("/")}/a.jsonl"',
            )
        if not usable:
            _require_readable(pattern, root)
            remedy = "names and globs are resolved beside the configuration file"
            if Path(pattern).is_absolute() and not _is_literal(pattern):
                remedy = "an absolute name is taken as it is: write a glob relative to the configuration file"
            raise NoPrompts(f"no prompt file matches {pattern!r}", place=printable_path(root), remedy=remedy)
        paths.update(dict.fromkeys(usable))
    return list(paths)


def _is_literal(pattern: str) -> bool:
    return frozenset("*?[").isdisjoint(pattern)


def _require_readable(pattern: str, root: Path) -> None:
    """Refuse a folder that this user may not look into: a glob passes over it without a word.

    Raises:
        PromptError: names the first such folder that the pattern names without wildcards.
    """
    folder = root
    for part in Path(pattern).parts[:-1]:
        folder /= part
        if not _is_literal(part) or not folder.is_dir():
            return
        if not os.access(folder, os.R_OK | os.X_OK):
            raise PromptError(
                "can't be read: permission denied",
                place=printable_path(folder),
                remedy="check its owner and permissions",
            )


def _matches(pattern: str, root: Path) -> list[Path]:
    base = Path(pattern)
    try:
        return [base] if base.is_absolute() else sorted(root.glob(pattern))
    except (ValueError, OSError) as error:
        raise PromptError(
            f"{pattern!r} is not a file name or glob: {error}",
            place="prompts.files",
            remedy='name files as "prompts/a.jsonl" or "prompts/*.jsonl"; ** stands alone between slashes',
        ) from None


def _is_usable(path: Path) -> bool:
    try:
        if not (path.is_fifo() or path.is_char_device()):
            return path.is_file()
    except OSError as error:
        raise PromptError(
            f"can't be looked at: {error.strerror}",
            place=printable_path(path),
            remedy="check the permissions of the file and of the folders above it",
        ) from None
    raise PromptError(
        "is a pipe or a terminal, which can't be read twice",
        place=printable_path(path),
        remedy="save the prompts to a .jsonl file first: a run counts them before it asks",
    )


def name_of(path: Path, root: Path) -> str:
    """Return the file's name for errors and rows: relative to `root` where it lies under it."""
    return printable_path(path.relative_to(root) if path.is_relative_to(root) else path)


def printable_path(path: Path) -> str:
    r"""Return the path as valid text: a byte that is not UTF-8 becomes `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read(
    files: Sequence[str], root: Path, bad: Bad = raise_first, *, rules: RowRules = BY_DEFAULT
) -> Iterator[Prompt]:
    """Yield all prompts of all files, in file order.

    Args:
        bad: called with the error of each line that can't be used; it is skipped unless `bad` raises.
        rules: how rows become prompts.

    Raises:
        PromptError: the first file or line that can't be used.
    """
    empty = True
    for path in find(files, root):
        for prompt in read_file(path, root, bad, rules=rules):
            empty = False
            yield prompt
    if empty:
        raise NoPrompts(
            "the prompt files hold no prompt",
            place=", ".join(files),
            remedy='write one a line: {"prompt": "..."}',
        )


def read_file(
    path: Path,
    root: Path,
    bad: Bad = raise_first,
    *,
    growing: bool = False,
    rules: RowRules = BY_DEFAULT,
) -> Iterator[Prompt]:
    """Yield the prompts of one file; names in errors are relative to `root`. `bad` as for `read`.

    Args:
        growing: see `formats.rows`.
        rules: how rows become prompts.

    Raises:
        PromptError: the first line that can't be used.
    """
    name = name_of(path, root)
    for line, fields in formats.rows(path, name, growing=growing):
        try:
            if isinstance(fields, PromptError):
                raise fields
            prompt = to_prompt(fields, file=name, line=line, rules=rules)
        except PromptError as error:
            bad(error)
            continue
        yield prompt


def to_prompt(fields: Mapping[str, Any], *, file: str, line: int, rules: RowRules = BY_DEFAULT) -> Prompt:
    """Convert one row to a Prompt.

    Raises:
        PromptError: it has no messages, or messages or settings that the API does not accept, or the template
            can't be filled.
    """
    place = f"{file}:{line}" if line else file
    if rules.template is None:
        messages, own = _messages(fields, place), _OWN_FIELDS
    else:
        messages = ({"role": "user", "content": rules.template.render(fields, place)},)
        own = _OWN_FIELDS - _ASKED_FIELDS
    reference = fields.get("reference")
    if rules.last_assistant == "reference" and messages[-1].get("role") == "assistant":
        text = messages[-1].get("content")
        messages = messages[:-1]
        if not messages:
            raise PromptError(
                "nothing is left to ask without the last turn",
                place=place,
                remedy='add the turn that it answers, or set [prompts] last_assistant = "send"',
            )
        reference = text if reference is None else reference
    if reference is not None and not isinstance(reference, str):
        reference = _as_text(reference)
    tags = fields.get("tags") or ()
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise PromptError(
            "tags must be a list of strings", place=place, remedy='as in "tags": ["math", "easy"]'
        )
    identity = fields.get("id")
    sent = _sent_fields(fields, rules, place)
    return Prompt(
        id=_derived_id(messages, sent, place) if identity in (None, "") else str(identity),
        messages=messages,
        reference=reference,
        tags=tuple(tags),
        metadata={name: value for name, value in fields.items() if name not in own and name not in sent},
        fields=sent,
        file=file,
        line=line,
    )


def _messages(fields: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    text, messages = fields.get("prompt"), fields.get("messages")
    if text is not None and messages is not None:
        raise PromptError("both 'prompt' and 'messages' are given", place=place, remedy="keep one")
    if messages is None:
        if not isinstance(text, str) or is_blank(text):
            raise _no_prompt_line(fields, place)
        return ({"role": "user", "content": text},)
    if not isinstance(messages, list) or not messages:
        raise PromptError(
            "'messages' must be a list with at least one message", place=place, remedy=_MESSAGES
        )
    if not _are_plain(messages, place):  # plain messages always have a key, and checking costs a microsecond
        _require_key(messages, place)
    if not any(map(_says_something, messages)):
        raise PromptError("no message has any text", place=place, remedy="write one, or remove the line")
    return tuple(messages)


def is_blank(text: str) -> bool:
    """Whether a text has nothing but white space and characters without width."""
    text = text.strip()
    return not text or (text[0] in _INVISIBLE and all(c in _INVISIBLE or c.isspace() for c in text))


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has text, an image, tool calls, or anything that is checked elsewhere."""
    content = message.get("content")
    if isinstance(content, str):
        return not is_blank(content) or bool(message.get("tool_calls"))
    if not isinstance(content, list):
        return True
    return any(
        not isinstance(part, dict) or not isinstance(part.get("text"), str) or not is_blank(part["text"])
        for part in content
    )


def _no_prompt_line(fields: Mapping[str, Any], place: str) -> PromptError:
    """Return the error of a row without messages; it says where the row is of another tool's format."""
    format = recognise.looks_like(fields)
    if format and format != recognise.PROMPT_LINES:
        file = place.rpartition(":")[0] or place
        message = f"is no prompt line; it looks like {format}"
        return PromptError(message, place=place, remedy=formats.import_remedy(file))
    return PromptError(
        "needs 'prompt' (text) or 'messages' (a list)",
        place=place,
        remedy='a line is {"prompt": "..."} or {"messages": [...]}',
    )


def _are_plain(messages: list[Any], place: str) -> bool:
    """Return whether they hold only roles and texts; raise PromptError for anything that is not a message."""
    plain = True
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            if recognise.is_convertible({"messages": messages}):
                raise _no_prompt_line({"messages": messages}, place)
            raise PromptError(
                f"message {number} needs a role out of {', '.join(sorted(ROLES))}",
                place=place,
                remedy=_MESSAGES,
            )
        content = message.get("content")
        if not isinstance(content, str):
            plain = False
            if not (isinstance(content, list) or (content is None and message.get("tool_calls"))):
                raise PromptError(
                    f"message {number} needs 'content' (text or a list of parts)",
                    place=place,
                    remedy=_MESSAGES,
                )
        elif len(message) != 2:
            plain = False
    return plain


def _require_key(messages: list[Message], place: str) -> None:
    """Raise PromptError for messages that no request key can be made of, before anything is sent."""
    try:
        canonical(messages)
    except ValueError as error:
        raise PromptError(
            str(error), place=place, remedy="integers go to 2**53 - 1; greater ones are written as text"
        ) from None


def _as_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # out of Parquet: bytes, decimals
        return as_json(value).decode()


def _sent_fields(fields: Mapping[str, Any], rules: RowRules, place: str) -> dict[str, Any]:
    """Return the fields of the row that are sent. One of another type is a column of that name: metadata.

    Raises:
        PromptError: a field has no canonical JSON, or is a setting with a value that `[sampling]` refuses.
    """
    sent = {name: fields[name] for name, is_sent in _SENT.items() if name in fields and is_sent(fields[name])}
    sent |= rules.settings_of(fields, place)
    if sent:
        _require_key([sent], place)
        try:
            check_response_format(sent.get("response_format"))
        except ConfigError as error:
            raise PromptError(f"response_format: {error.message}", place=place, remedy=error.remedy) from None
    return sent


def _are_tools(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(tool, dict) and isinstance(tool.get("type"), str) for tool in value)
    )


# Which values of `recognise.SENT_FIELDS` are sent.
_SENT: Mapping[str, Callable[[Any], bool]] = {
    "tools": _are_tools,
    "tool_choice": lambda value: value in ("auto", "none", "required") or _is_typed(value),
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "response_format": lambda value: _is_typed(value),
}


def _is_typed(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str)


def _derived_id(messages: tuple[Message, ...], sent: Mapping[str, Any], place: str) -> str:
    content = [messages, sent] if sent else messages
    try:
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:24]
    except (orjson.JSONEncodeError, TypeError) as error:
        raise PromptError(
            f"text that is not valid Unicode: {error}",
            place=place,
            remedy="remove the half character (an escape such as \\ud83d without its second half)",
        ) from None
