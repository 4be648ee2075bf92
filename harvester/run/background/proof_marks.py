"""Remember in the journal until when each address was proven, and what its canary was to answer.

A run that is killed leaves answers that no check has proven. The next one finds them by these marks in
`meta`, and checks the address before it reads the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from harvester.store.journal.journal import Journal
from harvester.store.journal.meta_values import read_value, write_values


@dataclass(slots=True)
class EarlierRows:
    """Unproven answers of earlier runs at one address: keys, and when the first came, in Unix seconds."""

    keys: set[bytes] = field(default_factory=set)
    first_at: float = math.inf


def load_earlier(journal: Journal, urls: Iterable[str], model: str, now: float) -> dict[str, EarlierRows]:
    """Return the answers in the journal that came after the last proof of their address.

    An address without a mark gets one: what it answered until now is taken as it is.
    """
    earlier: dict[str, EarlierRows] = {}
    for url in urls:
        name = _proved(url, model)
        mark = _read(journal, name)
        if mark is None:
            _write(journal, name, {"at": now})
            continue
        with journal.reading() as connection:
            rows = connection.execute(
                "SELECT key, at_us FROM answers WHERE endpoint = ? AND at_us >= ?",
                (url, round(float(mark["at"]) * 1e6)),
            ).fetchall()
        if rows:
            first_us = min(at_us for _, at_us in rows)
            earlier[url] = EarlierRows({key for key, _ in rows}, first_us / 1e6)
    return earlier


def mark_proved(journal: Journal, url: str, model: str, at: float) -> None:
    """Write down that an address was good at this time, in Unix seconds."""
    _write(journal, _proved(url, model), {"at": at})


def load_reference(journal: Journal, teacher_id: str, prompt: str) -> str | None:
    """Return what most addresses of a teacher answered to this prompt; None where that is not known."""
    saved = _read(journal, _canary(teacher_id))
    return None if saved is None or saved["prompt"] != prompt else str(saved["answer"])


def save_reference(journal: Journal, teacher_id: str, prompt: str, answer: str) -> None:
    """Write down what most addresses answered."""
    _write(journal, _canary(teacher_id), {"prompt": prompt, "answer": answer})


def _proved(url: str, model: str) -> str:
    return f"proved:{url}|{model}"


def _canary(teacher_id: str) -> str:
    return f"replica_canary:{teacher_id}"


def _read(journal: Journal, name: str) -> dict[str, Any] | None:
    with journal.reading() as connection:
        value: dict[str, Any] | None = read_value(connection, name)
    return value


def _write(journal: Journal, name: str, value: dict[str, Any]) -> None:
    with journal.writing() as connection:
        write_values(connection, {name: value})
