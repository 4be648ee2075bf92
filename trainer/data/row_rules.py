"""Decide what a row is for: its split, whether it can be learned, and which text. Loads no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from harvester.api.types import Outcome
from harvester.quality.held_out import is_drawn, named_split
from harvester.store.shards.schema import Sample
from trainer.config import DataSection, TrainConfig
from trainer.data.conversation import why_not_restored
from trainer.data.token_alignment import TeacherText
from trainer.model import weights

# Plain text around reasoning that is learned as part of the answer.
INLINE_REASONING = ("<think>\n", "\n</think>\n\n")


def longest_row(config: TrainConfig) -> int:
    """Return the tokens of the longest row to learn: `[train] max_length`, or all that the base can read."""
    most = config.train.max_length
    if not weights.context_length(config.base) < most:
        return most
    from trainer.model import self_test  # loads torch

    return min(most, self_test.position_limit(config.base) or most)


def split_of(sample: Sample, key: str, data: DataSection) -> str:
    """Return the split that a row names, else one drawn from its prompt's content.

    Rows harvested for evaluation (`purpose` "eval") are never in "train".

    Args:
        key: `prompt_key` of the row's messages.
    """
    if named := named_split(sample.metadata, data.split_field):
        return "held_out" if named == "train" and sample.purpose == "eval" else named
    return "held_out" if sample.purpose == "eval" or is_drawn(key, data.eval_share) else "train"


def exclusion_reason(sample: Sample, data: DataSection, *, why_not: str | None = None) -> str:
    """Return why a row can't be learned whatever split it is in; "" if it can.

    Args:
        why_not: why what the teacher was asked can't be restored, "" if it can; None: look.
    """
    if sample.outcome == Outcome.TRUNCATED:
        if data.truncated == "exclude":
            return "truncated"
    elif sample.outcome != Outcome.OK:
        return str(sample.outcome)
    if not (sample.completion or "").strip():
        return "empty"
    return why_not_restored(sample) if why_not is None else why_not


def answer_of(sample: Sample, data: DataSection) -> str:
    """Return the text to learn: the completion, after its reasoning if `[data] reasoning` is "inline".

    Newlines between reasoning and answer are a separator that the teacher's server left there, not part of
    the answer; the student's template writes its own.
    """
    answer = sample.completion or ""
    if sample.reasoning is None:
        return answer
    answer, thought = answer.lstrip("\n"), sample.reasoning.strip("\n")
    if data.reasoning == "inline" and thought:
        return f"{INLINE_REASONING[0]}{thought}{INLINE_REASONING[1]}{answer}"
    return answer


def reasoning_of(sample: Sample, data: DataSection) -> str | None:
    """Return the reasoning to learn in the template's own format; None unless `[data] reasoning` is "keep".

    Newlines around it are left out: they belong to the teacher's format (see `answer_of`).
    """
    return ((sample.reasoning or "").strip("\n") or None) if data.reasoning == "keep" else None


def teacher_text(sample: Sample, data: DataSection) -> TeacherText:
    """Return the bytes that the teacher generated and that are learned."""
    text = sample.completion or ""
    if sample.reasoning is None:
        return TeacherText(text.encode())
    thought = "" if data.reasoning == "drop" else sample.reasoning.strip("\n")
    return TeacherText(text.lstrip("\n").encode(), thought.encode(), has_reasoning=True)


def normalised(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a prompt with case, white space and Unicode form normalised."""
    text = "\n".join(str(m.get("content") or "") for m in messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
