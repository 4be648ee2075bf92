"""Feed a run with its prompts as requests, count them, and watch the files where asked.

A watching run reads a file again when it has appeared or changed and was then unchanged for one check. Lines
taken before are skipped, unless their content changed. A line that can't be used (yet) is reported and does
not end the run: the file is read again when it grows.
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
from harvester.prompts.own_prompts import OwnPrompts
from harvester.prompts.row_rules import RowRules, rules_of
from harvester.prompts.screen import SkippedPrompts
from harvester.store.journal.records import asker_digest

Signature = tuple[int, int, int]


@dataclass(slots=True)
class _File:
    """A file when it was last read: inode, size, time, and a digest of each prompt taken from it."""

    signature: Signature | None = None
    digests: array[int] = field(default_factory=lambda: array("Q"))


class PromptFeed:
    """The feed of one run.

    Args:
        root: folder that names and globs are relative to.
        on_error: called with the error of every prompt file or line that a watching run can't use.
        skipped: prompts that are not asked; None for none.
    """

    def __init__(
        self,
        config: HarvestConfig,
        root: Path,
        on_error: Callable[[PromptError], None] = lambda _: None,
        skipped: SkippedPrompts | None = None,
        rules: RowRules | None = None,
    ) -> None:
        self._skipped = skipped or SkippedPrompts()
        self._config = config
        self._own = OwnPrompts(config)
        self._root = root
        self._on_error = on_error
        self._files: dict[Path, _File] = {}
        self._rules = rules_of(config.prompts, root) if rules is None else rules
        self._last_seen: dict[Path, Signature] = {}
        self._reported: set[str] = set()
        self.rows = 0
        self.input_tokens = 0
        # Rows that no prompt file announced: further samples of [accept].
        self.further_rows = 0

    def once(self) -> Iterator[Request]:
        """Yield every request, in prompt order.

        Raises:
            PromptError: the first line that can't be used.
        """
        for request in requests(self.prompts(), self._config):
            yield self._count(request)

    def count_further(self) -> None:
        """Count a row that is asked in addition to those of the prompt files."""
        self.further_rows += 1

    def prompts(self) -> Iterator[Prompt]:
        """Yield every prompt that is asked, without counting it.

        Raises:
            PromptError: the first line that can't be used.
        """
        prompts = self._config.prompts
        bad = BadLines(prompts.max_bad)
        read = reader.read(prompts.files, self._root, bad, rules=self._rules)
        return (prompt for prompt in read if prompt not in self._skipped and prompt in self._own)

    def pass_over(self, known: Finished) -> None:
        """Count the rows of a complete set of files without reading them."""
        self.rows, self.input_tokens = known.rows, known.input_tokens

    def watched(self) -> Iterator[Request | None]:
        """Yield every request, later those of files that appear or change; None when there is nothing new."""
        first = True
        while True:
            for path, signature in self._changed(at_once=first):
                for request in requests(self._new_prompts(path, signature), self._config):
                    yield self._count(request)
            first = False
            yield None

    def _count(self, request: Request) -> Request:
        self.rows += 1
        self.input_tokens += request.input_tokens
        return request

    def _changed(self, *, at_once: bool) -> list[tuple[Path, Signature]]:
        """Return files to read now: changed since they were read, and unchanged in two checks in a row."""
        ready = []
        for path in self._matching():
            try:
                status = path.stat()
            except OSError:
                continue
            signature = (status.st_ino, status.st_size, status.st_mtime_ns)
            if signature == self._files.setdefault(path, _File()).signature:
                continue
            if at_once or self._last_seen.get(path) == signature:
                ready.append((path, signature))
            self._last_seen[path] = signature
        return ready

    def _matching(self) -> list[Path]:
        paths: dict[Path, None] = {}
        for pattern in self._config.prompts.files:
            try:
                paths.update(dict.fromkeys(reader.find((pattern,), self._root, self._report_once)))
            except NoPrompts:  # nothing there yet
                continue
            except PromptError as error:
                self._report_once(error)
        return list(paths)

    def _report_once(self, error: PromptError) -> None:
        """Report a path that can't be read once, not at each check."""
        if error.place not in self._reported:
            self._reported.add(error.place)
            self._on_error(error)

    def _new_prompts(self, path: Path, signature: Signature) -> Iterator[Prompt]:
        file = self._files[path]
        file.signature = signature
        bad = BadLines(self._config.prompts.max_bad, self._on_error)
        try:
            feed = reader.read_file(path, self._root, bad, growing=True, rules=self._rules)
            for number, prompt in enumerate(feed):
                digest = _digest(prompt)
                if number < len(file.digests) and file.digests[number] == digest:
                    continue
                if number < len(file.digests):
                    file.digests[number] = digest
                else:
                    file.digests.append(digest)
                if prompt in self._own:
                    yield prompt
        except PromptError as error:
            self._on_error(error)


def _digest(prompt: Prompt) -> int:
    """Return a 64-bit digest that detects a changed line; stored answers are still looked up by key."""
    sent = [prompt.messages, prompt.fields]
    content = asker_digest(prompt, 0) + orjson.dumps(sent, option=orjson.OPT_SORT_KEYS)
    return short_digest(content)
