"""Read the pool of a loop and choose prompts from it. Loads no torch.

The choice sees the pool, which of its prompts a student answered correctly, and the content of the prompts
that may not be chosen. It sees no score of a held-out prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvester.quality.held_out import prompt_key
from harvester.quality.verifiers.verifiers import AnswerVerdict, Candidate, Verifiers
from harvester.store.shards.schema import Sample
from trainer.config import DataSection
from trainer.data import row_rules
from trainer.data.conversation import Conversation
from trainer.data.held_out import HeldOut
from trainer.errors import DataError

# Fields of a line that are no metadata of the prompt.
_OWN_FIELDS = frozenset({"id", "prompt", "messages", "reference", "tags"})
# Fields that are sent along and that a plain conversation lacks.
_SENT_FIELDS = frozenset({"tools", "tool_choice", "response_format", "functions"})
_ROLES = frozenset({"system", "developer", "user", "assistant"})
# Split of the pool where its prompts are scored.
POOL_SPLIT = "pool"


@dataclass(frozen=True, slots=True)
class PoolPrompt:
    """A prompt to choose from.

    Attributes:
        key: hash of the content that is sent (`similarity.split.prompt_key`).
        line: the line of the prompt file, as it is harvested.
    """

    key: str
    line: str
    messages: tuple[Mapping[str, Any], ...]
    candidate: Candidate

    def as_held_out(self) -> HeldOut:
        """Return the prompt in the form in which prompts are answered and judged."""
        return HeldOut(
            self.key,
            Conversation(self.messages),
            self.candidate.reference,
            self.candidate.task or "all",
            POOL_SPLIT,
            None,
            candidates=(self.candidate,),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """Prompts chosen in a round.

    Attributes:
        asked: prompts that the student answered to find those that it fails; 0 for a random choice.
        failed: how many of them it failed.
        filled: random prompts that were chosen because too few were failed.
    """

    prompts: tuple[PoolPrompt, ...]
    asked: int = 0
    failed: int = 0
    filled: int = 0


def read_pool(
    files: Sequence[Path], system: str | None, data: DataSection, verifiers: Verifiers
) -> list[PoolPrompt]:
    """Read the prompts that may be chosen: plain text, of the training split, and judgeable.

    Args:
        system: the system prompt that the harvest adds to prompts without one.

    Raises:
        DataError: a file can't be read, a line is no prompt, or no prompt can be used.
    """
    prompts: dict[str, PoolPrompt] = {}
    lines = 0
    for path in files:
        for place, text, fields in prompt_lines(path):
            lines += 1
            prompt = pool_prompt(text, fields, system, place)
            if prompt is not None and is_to_learn(prompt, data) and _is_judgeable(prompt, verifiers):
                prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise DataError(
            f"none of {lines:,} prompts of the pool can be chosen",
            place=", ".join(map(str, files)),
            remedy="prompts need plain text, a reference or a task that [verify] can judge, and "
            f"{data.split_field!r} = 'train' (or none)",
        )
    return list(prompts.values())


def prompt_lines(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield place, text and fields of each line of a file of prompts.

    Raises:
        DataError: the file can't be read, or a line is no JSON object.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise DataError(
            f"the pool can't be read: {why}", place=str(path), remedy="name JSON-lines files"
        ) from None
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        place = f"{path}:{number}"
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise DataError("this line is no JSON object", place=place, remedy='as in {"prompt": "..."}')
        yield place, text, fields


def pool_prompt(text: str, fields: Mapping[str, Any], system: str | None, place: str) -> PoolPrompt | None:
    """Return the prompt of a line, with the system prompt that the harvest adds; None: no plain text.

    Raises:
        DataError: the line has no prompt.
    """
    messages = fields.get("messages")
    if messages is None and isinstance(fields.get("prompt"), str):
        messages = [{"role": "user", "content": fields["prompt"]}]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(
            "this line has neither a prompt nor messages", place=place, remedy='as in {"prompt": "..."}'
        )
    if _SENT_FIELDS & fields.keys() or not all(_is_plain(message) for message in messages):
        return None
    if system is not None and messages[0]["role"] not in {"system", "developer"}:
        messages = [{"role": "system", "content": system}, *messages]
    reference, tags = fields.get("reference"), fields.get("tags") or ()
    candidate = Candidate(
        None,
        "missing",
        reference if isinstance(reference, str) else None,
        tuple(map(str, tags)),
        {name: value for name, value in fields.items() if name not in _OWN_FIELDS},
    )
    return PoolPrompt(prompt_key(messages), text, tuple(messages), candidate)


def _is_plain(message: Mapping[str, Any]) -> bool:
    is_text = isinstance(message.get("content"), str) and message.get("role") in _ROLES
    return is_text and message.keys() <= {"role", "content"}


def is_to_learn(prompt: PoolPrompt, data: DataSection) -> bool:
    """Whether the row would be in the training split once it is harvested."""
    sample = Sample(
        key="",
        prompt_id="",
        messages=[],
        completion=None,
        outcome="",
        finish_reason="",
        metadata_json=json.dumps(dict(prompt.candidate.metadata)),
    )
    return row_rules.split_of(sample, prompt.key, data) == "train"


def _is_judgeable(prompt: PoolPrompt, verifiers: Verifiers) -> bool:
    like = prompt.candidate
    probe = replace(like, text=like.reference or "x", outcome="ok")
    return verifiers.judge(probe).verdict != AnswerVerdict.UNVERIFIABLE


def in_order(pool: Sequence[PoolPrompt], taken: Collection[str], seed: int) -> list[PoolPrompt]:
    """Return the prompts that may still be chosen, in an order that is a function of content and seed."""
    left = [prompt for prompt in pool if prompt.key not in taken]
    return sorted(left, key=lambda p: hashlib.sha256(f"{seed} {p.key}".encode()).digest())


def choose_random(ordered: Sequence[PoolPrompt], count: int) -> Choice:
    """Choose the first prompts of the order."""
    return Choice(tuple(ordered[:count]))


def choose_hard(ordered: Sequence[PoolPrompt], passed: Mapping[str, float | None], count: int) -> Choice:
    """Choose the first prompts that the student failed; if they are too few, others in their order.

    Args:
        passed: 1 or 0 for each prompt that the student answered, None if it could not be judged.
    """
    failed = [prompt for prompt in ordered if passed.get(prompt.key) == 0.0]
    chosen = failed[:count]
    keys = {prompt.key for prompt in chosen}
    others = [prompt for prompt in ordered if prompt.key not in keys][: count - len(chosen)]
    return Choice((*chosen, *others), len(passed), len(failed), len(others))
