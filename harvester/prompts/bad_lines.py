"""Skip lines of prompt files that can't be used, up to `[prompts] max_bad`, and list them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from harvester.errors import PromptError
from harvester.store.journal.sqlite import disk_error
from harvester.system import own_files

BAD_PROMPTS_NAME = "bad_prompts.jsonl"
# Called with the error of a line that can't be used: returns to skip the line, raises to stop reading.
Bad = Callable[[PromptError], None]


class BadLines:
    """Skips bad lines up to a limit and remembers them.

    Args:
        limit: how many lines may be skipped; the next error is raised.
        on_skip: called with the error of each skipped line.
    """

    def __init__(self, limit: int, on_skip: Bad = lambda _: None) -> None:
        self.passed_over: list[PromptError] = []
        self._limit = limit
        self._on_skip = on_skip

    def __call__(self, error: PromptError) -> None:
        if len(self.passed_over) >= self._limit:
            if not self._limit:
                raise error
            raise PromptError(
                error.message,
                place=error.place,
                remedy=f"[prompts] max_bad allows {self._limit:,} bad lines, and this is one more",
            )
        self.passed_over.append(error)
        self._on_skip(error)


def write_down(store: Path, passed_over: Sequence[PromptError]) -> None:
    """Write `bad_prompts.jsonl`, the list of lines that this run skipped; remove it when there are none.

    Raises:
        StoreError: it can't be written.
    """
    path = store / BAD_PROMPTS_NAME
    try:
        if not passed_over:
            path.unlink(missing_ok=True)
            return
        with own_files.replacing(path) as file:
            file.write(b"".join(_as_line(error) for error in passed_over))
    except OSError as error:
        raise disk_error(error, path) from None


def _as_line(error: PromptError) -> bytes:
    file, _, line = error.place.rpartition(":")
    return (
        orjson.dumps({"code": error.code, "file": file, "line": int(line), "message": error.message}) + b"\n"
    )
