"""Find prompts that will not be asked: those that repeat an earlier one, or a text of an evaluation set.

The screen decides once for all prompts, in file order, before the first is asked. What it skips is listed in
the store's `skipped_prompts.jsonl`, each with its reason and with the text that it repeats.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from harvester.api import request_builder
from harvester.api.request_key import short_digest
from harvester.api.types import Message, Prompt
from harvester.config.config import HarvestConfig
from harvester.prompts import reader
from harvester.prompts.bad_lines import BadLines
from harvester.prompts.row_rules import RowRules
from harvester.quality.similarity.duplicates import Duplicates
from harvester.quality.similarity.leaks import LeakIndex, leak_label, parse_label, user_texts
from harvester.quality.similarity.settings import load_sets
from harvester.store.journal.sqlite import disk_error
from harvester.system import own_files

SKIPPED_PROMPTS_NAME = "skipped_prompts.jsonl"
DUPLICATE, NEAR_DUPLICATE, CONTAMINATED = "duplicate", "near_duplicate", "contaminated"

# Skipped prompts that `plan` shows for each reason.
EXAMPLES = 3
# Characters of a text that lists show.
SHOWN_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Skip:
    """A prompt that is not asked, why, and which prompt or evaluation text it repeats.

    Attributes:
        place: file and line of the prompt; `text`, the beginning of what it asks.
        other_place, other_text: the same of what it repeats.
        similarity: 1.0 if both are equal once normalised, else the estimated Jaccard similarity, or the
            share of common runs of words.
    """

    reason: str
    id: str
    place: str
    text: str
    other_place: str
    other_text: str
    similarity: float

    def line(self) -> str:
        """Return a line for the terminal."""
        other = f"{self.other_place} {self.other_text!r}"
        return f"{self.place} {self.text!r} repeats {other} ({self.similarity:.2f})"


class SkippedPrompts:
    """The prompts that are not asked. In memory there are a digest of each, counts and some examples.

    The full list lies in a temporary file, see `write_down`.
    """

    def __init__(self) -> None:
        self.by_reason: Counter[str] = Counter()
        self.examples: list[Skip] = []
        self._digests: set[int] = set()
        self._list: IO[bytes] | None = None

    def __len__(self) -> int:
        return self.by_reason.total()

    def __contains__(self, prompt: Prompt) -> bool:
        return bool(self._digests) and _place_digest(prompt) in self._digests

    def add(self, prompt: Prompt, skip: Skip) -> None:
        """Note a prompt that is not asked."""
        self._digests.add(_place_digest(prompt))
        if self.by_reason[skip.reason] < EXAMPLES:
            self.examples.append(skip)
        self.by_reason[skip.reason] += 1
        if self._list is None:
            self._list = tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, self._list.close)
        self._list.write(orjson.dumps(asdict(skip)) + b"\n")

    def note(self) -> str:
        """Return how many prompts are not asked, by reason; "" for none."""
        if not self:
            return ""
        counts = ", ".join(
            f"{count:,} {reason.replace('_', ' ')}" for reason, count in sorted(self.by_reason.items())
        )
        return f"{len(self):,} prompts are not asked ({counts})"

    def write_down(self, store: Path) -> None:
        """Write `skipped_prompts.jsonl`, the list of the prompts that this run skips; remove it without any.

        Raises:
            StoreError: it can't be written.
        """
        path = store / SKIPPED_PROMPTS_NAME
        try:
            if self._list is None:
                path.unlink(missing_ok=True)
                return
            self._list.seek(0)
            with own_files.replacing(path) as file:
                shutil.copyfileobj(self._list, file)
        except OSError as error:
            raise disk_error(error, path) from None


class PromptScreen:
    """Decides which prompts are skipped, one after the other.

    Args:
        root: folder that names and globs are relative to.

    Attributes:
        skipped: the prompts skipped so far.

    Raises:
        ConfigError: an evaluation set can't be read. PromptError: a prompt can't be used.
    """

    def __init__(self, config: HarvestConfig, root: Path, rules: RowRules) -> None:
        self.skipped = SkippedPrompts()
        self._leaks: LeakIndex | None = None
        self._held_out: LeakIndex | None = None
        self._system = config.prompts.system
        self._decontaminate = config.decontaminate
        # Rows harvested for evaluation are never learned from, so nothing leaks into them.
        if config.decontaminate is not None and config.run.purpose == "train":
            self._leaks, _ = load_sets(config.decontaminate, root)
            self._held_out = config.decontaminate.empty_index()
            for prompt in _read(config, root, rules):
                if config.decontaminate.is_held_out(prompt.metadata) or self._is_drawn(prompt):
                    place = f"{prompt.file}:{prompt.line}"
                    for text in user_texts(prompt.messages):
                        self._held_out.add(text, leak_label("held out", place, text))
        section = config.prompts
        self._duplicates = (
            None if section.dedupe == "off" else Duplicates(section.dedupe, section.dedupe_threshold)
        )

    def is_skipped(self, prompt: Prompt) -> bool:
        """Decide about the next prompt, and note it if it is skipped."""
        skip = self._leak(prompt) or self._duplicate(prompt)
        if skip is not None:
            self.skipped.add(prompt, skip)
        return skip is not None

    def _leak(self, prompt: Prompt) -> Skip | None:
        if self._leaks is None or self._held_out is None or self._decontaminate is None:
            return None
        if self._decontaminate.is_held_out(prompt.metadata):
            return None
        texts = user_texts(prompt.messages)
        leak = self._leaks.find(texts)
        if leak is None and not self._is_drawn(prompt):
            leak = self._held_out.find(texts)
        if leak is None:
            return None
        hit_place, hit_text = parse_label(leak.label)
        place, shown = f"{prompt.file}:{prompt.line}", excerpt("\n".join(texts))
        reason = f"{CONTAMINATED}_{leak.kind}"
        return Skip(reason, prompt.id, place, shown, hit_place, excerpt(hit_text), leak.score)

    def _is_drawn(self, prompt: Prompt) -> bool:
        """Whether a training draws a prompt without a split for evaluation; as its row will be stored."""
        if self._decontaminate is None:
            return False
        from harvester.store.shards.schema import text_of  # loads pyarrow, which a run needs later

        messages = request_builder.with_system(prompt.messages, self._system)
        stored = [{"role": turn.get("role"), "content": text_of(turn.get("content"))} for turn in messages]
        return self._decontaminate.is_drawn(prompt.metadata, stored)

    def _duplicate(self, prompt: Prompt) -> Skip | None:
        if self._duplicates is None:
            return None
        text, guard = comparable(prompt)
        place, shown = f"{prompt.file}:{prompt.line}", excerpt(text)
        label = orjson.dumps([prompt.id, place, shown]).decode()
        match = self._duplicates.find(text, label, guard)
        if match is None:
            return None
        other_id, other_place, other_text = orjson.loads(match.label)
        if other_id == prompt.id:  # the same prompt given again shares the answer by its request key
            return None
        reason = DUPLICATE if match.similarity == 1.0 else NEAR_DUPLICATE
        return Skip(reason, prompt.id, place, shown, other_place, other_text, match.similarity)

    def close(self) -> None:
        """Give back what the decisions needed; the list of skipped prompts stays."""
        for index in (self._duplicates, self._leaks, self._held_out):
            if index is not None:
                index.close()


def _read(config: HarvestConfig, root: Path, rules: RowRules) -> Iterator[Prompt]:
    """Read the prompts once more. The pass that counts them reports bad lines."""
    bad = BadLines(config.prompts.max_bad)
    return reader.read(config.prompts.files, root, bad, rules=rules)


def comparable(prompt: Prompt) -> tuple[str, str]:
    """Return the text of a prompt to compare, and what must be equal in prompts that repeat each other.

    The text is that of all turns. Roles, contents that are not text (images), and fields that are sent, such
    as `tools`, must be equal.
    """
    texts: list[str] = []
    apart: list[Any] = [dict(prompt.fields)] if prompt.fields else []
    for message in prompt.messages:
        rest = _text_of(message, texts)
        apart.append([message.get("role"), rest] if rest else message.get("role"))
    if apart == ["user"]:
        return "\n".join(texts), ""
    encoded = orjson.dumps(apart, option=orjson.OPT_SORT_KEYS, default=repr)
    return "\n".join(texts), hashlib.blake2b(encoded, digest_size=16).hexdigest()


def _text_of(message: Message, texts: list[str]) -> Mapping[str, Any]:
    """Add the texts of a message to `texts`; return what else it holds."""
    rest = {name: value for name, value in message.items() if name not in {"role", "content"}}
    content = message.get("content")
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        parts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if isinstance(text, str):
                texts.append(text)
            else:
                parts.append(part)
        if parts:
            rest["content"] = parts
    return rest


def excerpt(text: str) -> str:
    """Return the beginning of a text on one line."""
    flat = " ".join(text[: 4 * SHOWN_CHARACTERS].split())
    return flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[:SHOWN_CHARACTERS]}..."


def _place_digest(prompt: Prompt) -> int:
    return short_digest(f"{prompt.file}\x1f{prompt.line}\x1f{prompt.id}".encode("utf-8", "surrogatepass"))
