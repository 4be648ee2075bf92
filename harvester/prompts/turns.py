"""Read the turns of a conversation in the spellings of other tools. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "bing", "bard", "model", "ai", "claude"), "assistant"
    ),
    **dict.fromkeys(("system", "system_prompt"), "system"),
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "function"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_ROLE_MEMBERS = ("role", "from", "speaker", "author")
_TEXT_MEMBERS = ("content", "value", "text", "message", "parts")
# Parts of a content list that a server of OpenAI's interface accepts.
_PARTS = frozenset({"text", "image_url", "input_audio", "file", "video_url"})
# Members of a turn that are sent as they are.
_KEPT_MEMBERS = ("name", "tool_calls", "tool_call_id")


class RowError(ValueError):
    """A row of a recognised format can't be asked as it is.

    Args:
        format: name of the format.
    """

    def __init__(self, message: str, format: str) -> None:
        super().__init__(message)
        self.format = format


def parsed_list(value: Any) -> list[Any] | None:
    """Return a list as it is, or out of a text that holds one as JSON; None for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def is_turns(value: Sequence[Any], *, texts: bool) -> bool:
    """Return whether a list holds turns.

    Args:
        texts: a list of texts (user, assistant, user, ...) or of pairs of texts counts too.
    """
    if not value:
        return False
    if all(isinstance(turn, Mapping) for turn in value):
        return all(any(name in turn for name in _ROLE_MEMBERS) for turn in value)
    if not texts:
        return False
    if all(isinstance(turn, str) for turn in value):
        return True
    return all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in value
    )


def conversation(turns: Sequence[Any], format: str) -> list[dict[str, Any]]:
    """Convert turns to messages.

    Raises:
        RowError: a turn has an unknown role, no text, or a part that can't be sent.
    """
    if not all(isinstance(turn, Mapping) for turn in turns):
        texts = [text for turn in turns for text in ([turn] if isinstance(turn, str) else turn)]
        return [
            {"role": "assistant" if number % 2 else "user", "content": text}
            for number, text in enumerate(texts)
        ]
    messages: list[dict[str, Any]] = []
    calls: list[str] = []
    for number, turn in enumerate(turns, start=1):
        word = next((turn[name] for name in _ROLE_MEMBERS if name in turn), None)
        if isinstance(word, Mapping):
            word = word.get("role")
        role = _ROLES.get(word.strip().lower()) if isinstance(word, str) else None
        if role is None:
            raise RowError(f"turn {number} has the unknown role {word!r}", format)
        content = _content(turn, number, format)
        if role == "call":
            messages.append(_call(content, len(messages), calls, number, format))
            continue
        message: dict[str, Any] = {"role": role, "content": content}
        message |= {name: turn[name] for name in _KEPT_MEMBERS if turn.get(name)}
        if role == "tool" and "tool_call_id" not in message:
            if not calls:
                raise RowError(f"turn {number} answers a tool call that is not there", format)
            message["tool_call_id"] = calls.pop(0)
        if content is None and not message.get("tool_calls"):
            raise RowError(f"turn {number} has no content", format)
        messages.append(message)
    return messages


def _content(turn: Mapping[str, Any], number: int, format: str) -> Any:
    value = next((turn[name] for name in _TEXT_MEMBERS if turn.get(name) is not None), None)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("parts"), list):
        value = value["parts"]
    if not isinstance(value, list):
        raise RowError(f"turn {number} has a content that is neither text nor parts", format)
    parts = [_part(part, number, format) for part in value]
    if all(part["type"] == "text" for part in parts) and "parts" in turn:  # Gemini's own texts
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, number: int, format: str) -> Mapping[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and "type" not in part and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if (
        not isinstance(part, Mapping)
        or not isinstance(kind, str)
        or kind not in _PARTS
        or part.get(kind) is None
    ):
        shown = kind or type(part).__name__
        raise RowError(f"turn {number} has a part of type {shown!r}, which can't be sent as it is", format)
    return part


def _call(content: Any, at: int, calls: list[str], number: int, format: str) -> dict[str, Any]:
    """Convert ShareGPT's `function_call` turn: JSON with name and arguments."""
    try:
        value = json.loads(content) if isinstance(content, str) else None
    except (ValueError, RecursionError):
        value = None
    entries = value if isinstance(value, list) else [value]
    tool_calls = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise RowError(f"turn {number} is a tool call without a name", format)
        arguments = entry.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        identity = f"call_{at}_{index}"
        calls.append(identity)
        tool_calls.append(
            {"id": identity, "type": "function", "function": {"name": entry["name"], "arguments": text}}
        )
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}


def plain_text(value: Any, column: str, format: str) -> str:
    """Return a text that can be asked.

    Raises:
        RowError: it is no text, or an empty one.
    """
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column!r} is not a text", format)
    return value


def chosen_answer(value: Any) -> str | None:
    """Return the text of an answer: a text, a number, the last turn, or SQuAD's first answer; else None."""
    if isinstance(value, Mapping):
        value = value.get("text", value.get("content"))
    turns = parsed_list(value)
    if turns is not None:
        value = turns[-1] if turns and isinstance(turns[-1], Mapping) else turns[0] if turns else None
        if isinstance(value, Mapping):
            value = next((value[name] for name in _TEXT_MEMBERS if isinstance(value.get(name), str)), None)
    if isinstance(value, bool) or value is None:
        return None
    return value if isinstance(value, str) else str(value) if isinstance(value, int | float) else None


def tool_schemas(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a row as they are sent: from a list, or a JSON text; bare functions are wrapped."""
    listed = parsed_list(value)
    if not listed or not all(isinstance(tool, Mapping) for tool in listed):
        return None
    tools = []
    for tool in listed:
        if isinstance(tool.get("type"), str) and (tool["type"] != "function" or "function" in tool):
            tools.append(dict(tool))
        elif isinstance(tool.get("name"), str):
            tools.append({"type": "function", "function": dict(tool)})
        else:
            return None
    return tools


def batch_prompt(body: Mapping[str, Any], format: str) -> tuple[list[dict[str, Any]] | None, set[str]]:
    """Return the messages of a batch line's body, and the members they were in; None if it has none."""
    for name in ("messages", "contents", "input"):
        turns = body.get(name)
        if isinstance(turns, list) and is_turns(turns, texts=False):
            messages = conversation(turns, format)
            break
        if isinstance(turns, str) and name == "input" and turns.strip() and "encoding_format" not in body:
            messages = [{"role": "user", "content": turns}]
            break
    else:
        text = body.get("prompt")
        if not isinstance(text, str) or not text.strip():
            return None, set()
        name, messages = "prompt", [{"role": "user", "content": text}]
    used = {name}
    for own in ("system", "instructions", "systemInstruction", "system_instruction"):
        value = body.get(own)
        if isinstance(value, Mapping):
            value = "".join(
                part.get("text", "") for part in value.get("parts", ()) if isinstance(part, Mapping)
            )
        if isinstance(value, str) and value.strip():
            messages.insert(0, {"role": "system", "content": value})
            used.add(own)
            break
    return messages, used
