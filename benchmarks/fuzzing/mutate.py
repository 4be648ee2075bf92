"""Mutate JSON values and bytes, as faulty servers, proxies and writers do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from . import texts

_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 1.5, -0.0, 1e308, 2**31, 2**53, 2**64, -(2**63), float("nan")),
    *(
        "",
        " ",
        "\n",
        "0",
        "null",
        "\ud800",
        "\udfff\ud83d",
        "\x00",
        "x" * 300,
        [],
        {},
        [[]],
        [None],
        {"": None},
    ),
    *({"error": {"message": "m", "code": 429}}, {"type": "text"}, [{"type": "text", "text": None}]),
)
_NAMES = (
    "error",
    "content",
    "choices",
    "message",
    "text",
    "type",
    "index",
    "finish_reason",
    "delta",
    "usage",
)
_BYTES = (
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\n",
    b"\r",
    b"\n\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
)
_WORDS = (
    b"data: ",
    b"data: [DONE]\n\n",
    b"\\u0000",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"9" * 400,
    b"<html>",
    b"event: error\n",
)


def mutate_tree(random: Random, document: Any) -> Any:
    """Return a copy of a JSON value with one to three changes."""
    changed = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return changed
        holder, key = random.choice(places)
        changed = random.choice(_TREE_CHANGES)(random, changed, holder, key) or changed
    return changed


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield holder and key or index of every value inside."""
    if depth > 12:
        return
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, member in members:
        yield value, key
        yield from _places(member, depth + 1)


def _replace(random: Random, root: Any, holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(random.choice(_SCALARS))


def _delete(random: Random, root: Any, holder: Any, key: Any) -> None:
    del holder[key]


def _rename(random: Random, root: Any, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        new = random.choice((*_NAMES, f"{key}s", key.upper(), ""))
        if new not in holder:
            holder[new] = holder.pop(key)


def _wrap(random: Random, root: Any, holder: Any, key: Any) -> None:
    value = holder[key]
    holder[key] = random.choice(([value], {"value": value}, {"text": value}, [[value]], {"content": value}))


def _unwrap(random: Random, root: Any, holder: Any, key: Any) -> None:
    value = holder[key]
    if isinstance(value, list) and value:
        holder[key] = value[0]
    elif isinstance(value, dict) and value:
        holder[key] = random.choice(list(value.values()))


def _as_text(random: Random, root: Any, holder: Any, key: Any) -> None:
    holder[key] = str(holder[key])[:200]


def _insert(random: Random, root: Any, holder: Any, key: Any) -> None:
    value = copy.deepcopy(random.choice(_SCALARS))
    if isinstance(holder, dict):
        holder.setdefault(random.choice((*_NAMES, texts.decoy(random))), value)
    else:
        holder.insert(key, value)


def _swap(random: Random, root: Any, holder: Any, key: Any) -> None:
    if isinstance(holder, list) and len(holder) > 1:
        other = random.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]


def _nest(random: Random, root: Any, holder: Any, key: Any) -> None:
    for _ in range(random.choice((3, 20, 300))):
        holder[key] = [holder[key]]


_TREE_CHANGES: tuple[Callable[[Random, Any, Any, Any], None], ...] = (
    *(_replace, _replace, _delete, _delete, _rename, _wrap, _unwrap, _as_text, _insert, _swap, _nest),
)


def mutate_bytes(random: Random, raw: bytes) -> bytes:
    """Return bytes with one to three changes."""
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at = random.randrange(len(changed) + 1)
        kind = random.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at:at] = random.choice((*_BYTES, *_WORDS))
        elif kind == 2:
            del changed[at : at + random.choice((1, 2, 8, 50))]
        elif kind == 3:
            del changed[at:]
        elif kind == 4:
            del changed[:at]
        else:
            changed[at : at + 1] = random.choice(_BYTES)
    return bytes(changed)
