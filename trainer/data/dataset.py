"""Read a corpus, split it by prompt, and render the training examples. Loads no torch.

A prompt is identified by its content, so the same text under two ids can't be on both sides of the split.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harvester.api.types import Outcome
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from harvester.terms.lineage import FACT_COLUMNS, Lineage
from trainer.config import DataSection, TrainConfig
from trainer.data.chat_template import Example, Renderer
from trainer.errors import DataError, StudentError
from trainer.provenance import fingerprint, terms_check

COLUMNS = [
    *("key", "prompt_id", "sample_index", "messages", "completion", "reasoning", "outcome", "finish_reason"),
    *("reference", "metadata_json", "purpose", "terms_id", "teacher_id", "mock", "run_id"),
]

INLINE_REASONING = (
    "<think>\n",
    "\n</think>\n\n",
)  # plain text around reasoning that is learned as part of the answer


_CLEARED_COLUMNS: dict[str, Any] = {
    name: ""
    for name in fingerprint.ORIGIN_COLUMNS
    if name not in COLUMNS and name not in {"created_at", "mock"}
}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prompt that is judged with and never learned from.

    Attributes:
        teacher: the teacher's first answer, None when it gave none that is usable.
        taught: that answer as it would be learned; thought: its reasoning, where that is kept.
    """

    prompt_id: str
    messages: tuple[Mapping[str, Any], ...]
    reference: str | None
    task: str
    split: str
    teacher: str | None
    taught: str | None = None
    thought: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The corpus sorted into two piles, before anything is tokenised.

    Attributes:
        train: samples to learn from.
        held_out: prompts to judge with, in order of prompt id.
        excluded: samples in neither pile, by reason.
        lineages: who taught, under which terms.
        origins: by key, the hash of where a row came from (`trace.origin_of`).
    """

    train: tuple[Sample, ...]
    held_out: tuple[HeldOut, ...]
    excluded: Mapping[str, int]
    lineages: tuple[Lineage, ...]
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rendered training examples. `sha256` covers ids, borders and order: resume asks whether it changed."""

    examples: tuple[Example, ...]
    excluded: Mapping[str, int]
    sha256: str

    @property
    def lengths(self) -> list[int]:
        """Tokens each example feeds to the model: its last id is a target only."""
        return [len(e.ids) - 1 for e in self.examples]


def read(config: TrainConfig) -> Rows:
    """Read the corpus and split it by prompt. Loads no torch.

    Raises:
        DataError: no corpus, an empty one, or no row to learn from.
        TermsRefused: see `gate.ask`.
        StoreError, StoreCorrupt: a shard is missing or torn; its name is in the error.
    """
    if not config.corpus.is_dir():
        raise DataError(
            "no corpus here", place=str(config.corpus), remedy="harvest first, or set [data] corpus"
        )
    corpus = Corpus.open(config.corpus)
    origins: dict[str, str] = {}
    samples = sorted(_read_samples(corpus, origins), key=lambda s: (s.prompt_id, s.sample_index, s.key))
    if not samples:
        raise DataError(
            "the corpus is empty", place=str(config.corpus), remedy="`harvester run harvest.toml` fills it"
        )
    lineages = tuple(corpus.lineages())
    terms_check.require_permission(config, lineages, corpus.distinct(FACT_COLUMNS))
    excluded: Counter[str] = Counter()
    prompts = [prompt_key(s.messages) for s in samples]
    splits = [split_of(s, key, config.data) for s, key in zip(samples, prompts, strict=True)]
    judged = {key for key, split in zip(prompts, splits, strict=True) if split != "train"}
    train: list[Sample] = []
    seen: set[str] = set()
    for sample, key, split in zip(samples, prompts, splits, strict=True):
        if split != "train":
            continue
        reason = _exclusion_reason(sample, config.data) or ("leaked" if key in judged else "")
        reason = reason or ("shared answer" if sample.key in seen else "")
        if reason:
            excluded[reason] += 1
            continue
        seen.add(sample.key)
        train.append(sample)
    if not train:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(excluded.items()))
        raise DataError(
            f"no row to learn from: {counts or 'all rows are held out'}",
            place=str(config.corpus),
            remedy=f"rows need a completion and {config.data.split_field!r} = 'train' (or none)",
        )
    return Rows(tuple(train), _held_out(samples, splits, config.data), excluded, lineages, origins)


def _read_samples(corpus: Corpus, origins: dict[str, str]) -> Iterator[Sample]:
    """Samples without what only their origin is made of, which is hashed on the way."""
    for sample in corpus.samples(list(dict.fromkeys((*COLUMNS, *fingerprint.ORIGIN_COLUMNS)))):
        origins[sample.key] = fingerprint.origin_sha256(sample)
        yield replace(sample, **_CLEARED_COLUMNS)


def render(rows: Rows, renderer: Renderer, config: TrainConfig, vocabulary: int = 0) -> Dataset:
    """Render the training pile.

    Args:
        vocabulary: rows of the student's embedding; 0 leaves ids unchecked.

    Raises:
        DataError: every row is too long, or none has a token to learn.
        StudentError: the tokenizer makes ids that the student has no embedding for.
    """
    examples = renderer.examples(
        [s.messages for s in rows.train],
        [answer_of(s, config.data) for s in rows.train],
        [s.outcome != Outcome.TRUNCATED for s in rows.train],
        [reasoning_of(s, config.data) for s in rows.train],
    )
    reasons = [_unlearnable(e, config.train.max_length) for e in examples]
    fitting = tuple(e for e, reason in zip(examples, reasons, strict=True) if not reason)
    excluded = Counter(rows.excluded) + Counter(reason for reason in reasons if reason)
    if not fitting:
        raise DataError(
            f"no row to learn from: all longer than {config.train.max_length} tokens, or with none to learn",
            place=str(config.corpus),
            remedy="raise [train] max_length",
        )
    highest = max(int(e.ids.max()) for e in fitting)
    if vocabulary and highest >= vocabulary:
        raise StudentError(
            f"the tokenizer makes id {highest}, the student embeds ids below {vocabulary}",
            place=str(config.base),
            remedy="tokenizer and weights are not of one model",
        )
    digest = hashlib.sha256()
    for example in fitting:
        digest.update(f"{len(example.ids)} {example.prompt_length} ".encode())
        digest.update(example.ids.tobytes())
    return Dataset(fitting, excluded, digest.hexdigest())


def _unlearnable(example: Example, max_length: int) -> str:
    if len(example.ids) > max_length:  # never cut: a cut answer teaches to stop in the middle
        return "too long"
    return "" if example.supervised > 0 and example.prompt_length > 0 else "nothing supervised"


def prompt_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """Content of a prompt as a hash: role and text of each message."""
    content = [[m.get("role"), m.get("content")] for m in messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def split_of(sample: Sample, key: str, data: DataSection) -> str:
    """The split a row names, or one drawn from its prompt's content; "eval" rows never train."""
    named = sample.metadata.get(data.split_field)
    if isinstance(named, str) and named:
        return "held_out" if named == "train" and sample.purpose == "eval" else named
    drawn = int(key[:12], 16) / 16**12
    return "held_out" if sample.purpose == "eval" or drawn < data.eval_share else "train"


def _exclusion_reason(sample: Sample, data: DataSection) -> str:
    if sample.outcome == Outcome.TRUNCATED:
        if data.truncated == "exclude":
            return "truncated"
    elif sample.outcome != Outcome.OK:
        return str(sample.outcome)
    return "" if (sample.completion or "").strip() else "empty"


def answer_of(sample: Sample, data: DataSection) -> str:
    """The text to learn: the completion, with its reasoning before it as plain text when that is wanted."""
    answer = sample.completion or ""
    if data.reasoning == "inline" and sample.reasoning:
        return f"{INLINE_REASONING[0]}{sample.reasoning}{INLINE_REASONING[1]}{answer}"
    return answer


def reasoning_of(sample: Sample, data: DataSection) -> str | None:
    """The reasoning to learn where the student's template puts it; None where none is wanted."""
    return (sample.reasoning or None) if data.reasoning == "keep" else None


def _held_out(samples: Sequence[Sample], splits: Sequence[str], data: DataSection) -> tuple[HeldOut, ...]:
    found: dict[str, HeldOut] = {}
    for sample, split in zip(samples, splits, strict=True):
        if split == "train" or sample.prompt_id in found:
            continue
        task = sample.metadata.get("task")
        fit = not _exclusion_reason(sample, data) and sample.outcome == Outcome.OK
        found[sample.prompt_id] = HeldOut(
            sample.prompt_id,
            tuple(sample.messages),
            sample.reference,
            task if isinstance(task, str) and task else "all",
            split,
            sample.completion if not _exclusion_reason(sample, data) else None,
            answer_of(sample, data) if fit else None,
            reasoning_of(sample, data) if fit else None,
        )
    return tuple(found.values())
