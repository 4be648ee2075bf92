"""Read the prompts of a plan, and collect what is to be said of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from harvester.api.types import Prompt
from harvester.config.config import HarvestConfig
from harvester.prompts import reader
from harvester.prompts.bad_lines import BadLines
from harvester.prompts.duplicate_ids import DuplicateIds
from harvester.prompts.own_prompts import OwnPrompts
from harvester.prompts.row_rules import rules_of
from harvester.prompts.screen import PromptScreen
from harvester.run.planning.prompt_notes import PromptNotes

# Prompts that are shown as a template writes them.
SHOWN_PROMPTS = 3


class PromptReading:
    """The prompts of a plan as they are read, and what is to be said of them.

    Attributes:
        bad: lines that can't be used.
        notes: what the operator should know.
        screen: decides which prompts are skipped.
    """

    def __init__(self, config: HarvestConfig, root: Path) -> None:
        self._prompts, self._root = config.prompts, root
        self._rules = rules_of(config.prompts, root)
        self._ids = DuplicateIds()
        self.bad = BadLines(config.prompts.max_bad)
        self._own = OwnPrompts(config)
        self.notes, self.screen = PromptNotes(), PromptScreen(config, root, self._rules)

    def prompts(self) -> Iterator[Prompt]:
        """Yield every prompt of this shard, also those that are skipped."""
        for prompt in reader.read(self._prompts.files, self._root, self.bad, rules=self._rules):
            self._ids.note(prompt)
            is_skipped = self.screen.is_skipped(prompt)
            if prompt not in self._own:
                continue
            if not is_skipped:
                self.notes.add(prompt)
            yield prompt

    def end(self) -> None:
        """Refuse two different prompts with one id, once all were read.

        Raises:
            PromptError: names both places.
        """
        self.screen.close()
        self._ids.require_unique(self._again)

    def first_prompts(self) -> tuple[str, ...]:
        """Return what the template writes from the first rows; nothing without a template."""
        if self._rules.template is None:
            return ()
        first = itertools.islice(self._again(), SHOWN_PROMPTS)
        return tuple(str(prompt.messages[0]["content"]) for prompt in first)

    def _again(self) -> Iterator[Prompt]:
        bad = BadLines(self._prompts.max_bad)
        return reader.read(self._prompts.files, self._root, bad, rules=self._rules)
