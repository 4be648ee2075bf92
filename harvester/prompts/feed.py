"""What a run reads: its prompts as requests, counted as they pass, and watched where asked.

A watching run reads a file again when it appeared or changed and then kept still for one look. Lines it has
taken before are passed over, unless what stays at home changed; a line that can't be used (yet) is a
complaint, not an end: the file is looked at again when it grows.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from harvester.api.request_builder import requests
from harvester.api.request_key import short_digest
from harvester.api.types import Prompt, Request
from harvester.config.config import HarvestConfig
from harvester.errors import NoPrompts, PromptError
from harvester.prompts import reader
from harvester.prompts.bad_lines import BadLines
from harvester.prompts.completed_files import Finished
from harvester.store.journal.records import asker_digest

Signature = tuple[int, int, int]


@dataclass(slots=True)
class _File:
    """A file as it was when last read: inode, size, time, and a digest of each prompt taken from it."""

    signature: Signature | None = None
    digests: array[int] = field(default_factory=lambda: array("Q"))


class PromptFeed:
    """The feed of one run.

    Args:
        root: folder that names and globs are relative to.
        complain: hears of every prompt file that a watching run can't use.
    """

    def __init__(
        self, config: HarvestConfig, root: Path, complain: Callable[[PromptError], None] = lambda _: None
    ) -> None:
        self._config = config
        self._root = root
        self._complain = complain
        self._files: dict[Path, _File] = {}
        self._still: dict[Path, Signature] = {}
        self._told: set[str] = set()
        self.rows = 0
        self.input_tokens = 0

    def once(self) -> Iterator[Request]:
        """Every request, in prompt order.

        Raises:
            PromptError: the first line that can't be used.
        """
        bad = BadLines(self._config.prompts.max_bad)
        for request in requests(reader.read(self._config.prompts.files, self._root, bad), self._config):
            yield self._count(request)

    def pass_over(self, known: Finished) -> None:
        """Count the rows of files that are known to have no open one, without reading them."""
        self.rows, self.input_tokens = known.rows, known.input_tokens

    def watched(self) -> Iterator[Request | None]:
        """Every request, and those of files that appear or change; None when there is nothing new now."""
        first = True
        while True:
            for path, signature in self._changed(at_once=first):
                for request in requests(self._fresh(path, signature), self._config):
                    yield self._count(request)
            first = False
            yield None

    def _count(self, request: Request) -> Request:
        self.rows += 1
        self.input_tokens += request.input_tokens
        return request

    def _changed(self, *, at_once: bool) -> list[tuple[Path, Signature]]:
        """Files to read now: changed since they were read, and the same at two looks in a row."""
        ready = []
        for path in self._there():
            try:
                found = path.stat()
            except OSError:
                continue
            signature = (found.st_ino, found.st_size, found.st_mtime_ns)
            if signature == self._files.setdefault(path, _File()).signature:
                continue
            if at_once or self._still.get(path) == signature:
                ready.append((path, signature))
            self._still[path] = signature
        return ready

    def _there(self) -> list[Path]:
        found: dict[Path, None] = {}
        for pattern in self._config.prompts.files:
            try:
                found.update(dict.fromkeys(reader.find((pattern,), self._root, self._tell)))
            except NoPrompts:  # nothing there yet
                continue
            except PromptError as error:
                self._tell(error)
        return list(found)

    def _tell(self, error: PromptError) -> None:
        """Something lies there that can't be read: said once, not at each look."""
        if error.place not in self._told:
            self._told.add(error.place)
            self._complain(error)

    def _fresh(self, path: Path, signature: Signature) -> Iterator[Prompt]:
        file = self._files[path]
        file.signature = signature
        bad = BadLines(self._config.prompts.max_bad, self._complain)
        try:
            for number, prompt in enumerate(reader.read_file(path, self._root, bad, growing=True)):
                digest = _digest(prompt)
                if number < len(file.digests) and file.digests[number] == digest:
                    continue
                if number < len(file.digests):
                    file.digests[number] = digest
                else:
                    file.digests.append(digest)
                yield prompt
        except PromptError as error:
            self._complain(error)


def _digest(prompt: Prompt) -> int:
    """64 bits that tell one line of a file from another; a held answer is still looked up by its key."""
    told = asker_digest(prompt, 0) + orjson.dumps(prompt.messages, option=orjson.OPT_SORT_KEYS)
    return short_digest(told)
