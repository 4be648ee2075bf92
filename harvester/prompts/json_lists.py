"""Read a JSON file that is one long list, object by object, without holding all of it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harvester.errors import PromptError
from harvester.prompts.compression import open_file

_CHUNK = 1 << 16
_LIST = "a file that begins with [ is one list of objects with commas between them; else one object a line"
_SPACE = " \t\r\n"
# Most blank characters in a row.
_MOST_BLANK = 4 << 20


def rows(path: Path, name: str, longest: int) -> Iterator[tuple[int, Mapping[str, Any] | PromptError]]:
    """Yield the number of each element (from 1) and the element, or its error.

    Args:
        name: the file's name for errors.
        longest: an element of more characters ends the reading.

    Raises:
        PromptError: the list is broken.
        OSError, UnicodeDecodeError: the file can't be read.
    """
    with open_file(path) as handle, io.TextIOWrapper(handle, encoding="utf-8-sig") as reader:
        text = _Text(reader, longest, name)
        text.skip("[", name, 0)
        number = 0
        while text.peek() != "]":
            number += 1
            element = text.element(f"{name}:{number}")
            if isinstance(element, dict):
                yield number, element
            else:
                message = f"a JSON object is expected, found {type(element).__name__}"
                remedy = 'each element of the list is {"prompt": "..."} or {"messages": [...]}'
                yield number, PromptError(message, place=f"{name}:{number}", remedy=remedy)
            if text.peek() != "]":
                text.skip(",", name, number)


class _Text:
    """The unread rest of a file, of which enough is held to read the next element."""

    def __init__(self, reader: io.TextIOWrapper, longest: int, name: str) -> None:
        self._reader = reader
        self._name = name
        self._longest = longest
        self._held = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is no white space; "" at the end."""
        blank = 0
        while True:
            while self._at < len(self._held) and self._held[self._at] in _SPACE:
                self._at += 1
                blank += 1
            if self._at < len(self._held):
                return self._held[self._at]
            if blank > _MOST_BLANK:
                raise PromptError(
                    f"more than {_MOST_BLANK >> 20} million blank characters",
                    place=self._name,
                    remedy="the file is damaged, or was not written to its end; write it again",
                )
            if not self._more(_CHUNK):
                return ""

    def skip(self, mark: str, name: str, number: int) -> None:
        """Skip a character that must come next."""
        if self.peek() != mark:
            raise PromptError(f"not a JSON list: {mark!r} is missing", place=f"{name}:{number}", remedy=_LIST)
        self._at += 1

    def element(self, place: str) -> Any:
        """Read the next element.

        Raises:
            PromptError: it is not JSON, or too long.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except (ValueError, RecursionError) as error:
                # An element may end after what is held: twice as much is tried, so the work stays linear.
                held = len(self._held) - self._at
                if isinstance(error, RecursionError) or held > self._longest or not self._more(max(held, 1)):
                    raise PromptError(f"not JSON: {error}", place=place, remedy=_LIST) from None
                continue
            if end == len(self._held) and self._more(_CHUNK):
                continue  # a number may go on
            self._at = end
            return value

    def _more(self, size: int) -> bool:
        more = self._reader.read(size)
        self._held = self._held[self._at :] + more
        self._at = 0
        return bool(more)
