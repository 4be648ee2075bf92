"""How many lines of prompt files may be bad before a run refuses to start: `[prompts] max_bad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from harvester.errors import PromptError, StoreError

BAD_PROMPTS_NAME = "bad_prompts.jsonl"
Bad = Callable[[PromptError], None]
"""Hears of a line that can't be used: returns to pass it over, raises to end the reading."""


class BadLines:
    """Passes over so many bad lines and remembers them.

    Args:
        most: how many; the next one is raised.
        told: hears of each one that is passed over.
    """

    def __init__(self, most: int, told: Bad = lambda _: None) -> None:
        self.passed_over: list[PromptError] = []
        self._most = most
        self._told = told

    def __call__(self, error: PromptError) -> None:
        if len(self.passed_over) >= self._most:
            if self._most:
                error.remedy = f"[prompts] max_bad allows {self._most:,} bad lines, and this is one more"
            raise error
        self.passed_over.append(error)
        self._told(error)


def write_down(store: Path, passed_over: Sequence[PromptError]) -> None:
    """Rewrite the view of the lines that this run passed over; no file when there are none.

    Raises:
        StoreError: it can't be written.
    """
    path = store / BAD_PROMPTS_NAME
    try:
        if not passed_over:
            path.unlink(missing_ok=True)
            return
        hidden = store / f".{BAD_PROMPTS_NAME}.tmp"
        hidden.write_bytes(b"".join(_letter(one) for one in passed_over))
        hidden.replace(path)
    except OSError as error:
        raise StoreError(f"can't be written: {error.strerror}", place=str(path)) from None


def _letter(error: PromptError) -> bytes:
    file, _, line = error.place.rpartition(":")
    return (
        orjson.dumps({"code": error.code, "file": file, "line": int(line), "message": error.message}) + b"\n"
    )
