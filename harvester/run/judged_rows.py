"""Read the answers that a judge is asked about: those of a corpus, or pairs of answers from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from harvester.config.judge_section import JudgeSection
from harvester.errors import ConfigError
from harvester.prompts.formats import MAX_LINE_BYTES
from harvester.store.published import local_store
from harvester.store.reader import Corpus, holds_answers
from harvester.system.objects.url import require_path_or_url, url_in

_COLUMNS = (
    *("key", "prompt_id", "sample_index", "messages"),
    *("completion", "outcome", "reference", "metadata_json"),
)
_PAIR_REMEDY = (
    'a line is {"prompt": "..." or "messages": [...], "answer": "...", "other": "..."}, and may have "id", '
    '"reference" and "metadata"'
)


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One answer, or a pair of answers.

    Attributes:
        key: 64 hexadecimal digits that verdicts are found by.
        id: id of the prompt, for people and other programs.
        answer: the row's own answer. other: the one that it is compared with; None for a score.
        left_out: why the judge is not asked about it; "" if it is.
    """

    key: str
    id: str
    messages: Sequence[Mapping[str, Any]]
    answer: str = ""
    other: str | None = None
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sample_index: int = 0
    left_out: str = ""

    @property
    def question(self) -> str:
        """What was asked: a lone user's text as it is, else every turn under its role."""
        turns = [(str(turn.get("role")), str(turn.get("content") or "")) for turn in self.messages]
        if len(turns) == 1:
            return turns[0][1]
        return "\n\n".join(f"[{role}]\n{text}" for role, text in turns)


def rows_of(section: JudgeSection, root: Path) -> Iterator[JudgedRow]:
    """Yield the rows in their order, also those that the judge is not asked about.

    Args:
        root: folder of the configuration.

    Raises:
        ConfigError: corpus or file are absent, or a line is no pair.
        StoreError: the corpus can't be read.
    """
    if section.pairs is not None:
        return _pairs(root / section.pairs)
    assert section.corpus is not None
    require_path_or_url(section.corpus)
    others = None if section.against is None else _answers(root / section.against)
    folder = local_store(section.corpus) if url_in(section.corpus) else root / section.corpus
    return _answers_of_corpus(_opened(folder, "judge.corpus"), others)


def _answers_of_corpus(corpus: Corpus, others: Mapping[tuple[str, int], str] | None) -> Iterator[JudgedRow]:
    for sample in corpus.samples(_COLUMNS):
        other, left_out = None, ""
        if sample.outcome != "ok":
            left_out = f"outcome_{sample.outcome}"
        elif not (sample.completion or "").strip():
            left_out = "blank"
        elif others is not None:
            other = others.get((sample.prompt_id, sample.sample_index))
            if other is None or other == sample.completion:
                left_out = "no_other_answer" if other is None else "equal_answers"
        yield JudgedRow(
            key=sample.key,
            id=sample.prompt_id,
            messages=sample.messages,
            answer=sample.completion or "",
            other=other,
            reference=sample.reference,
            metadata=sample.metadata,
            sample_index=sample.sample_index,
            left_out=left_out,
        )


def _opened(folder: Path, key: str) -> Corpus:
    if not holds_answers(folder):
        raise ConfigError(
            f"no answers are stored in {folder}",
            place=key,
            remedy="name a folder that holds journal.db or shards/, relative to the configuration",
        )
    return Corpus.open(folder)


def _answers(folder: Path) -> dict[tuple[str, int], str]:
    """Return the complete answers of a corpus by prompt and sample; in memory, as a whole."""
    columns = ("prompt_id", "sample_index", "completion", "outcome")
    return {
        (sample.prompt_id, sample.sample_index): sample.completion
        for sample in _opened(folder, "judge.against").samples(columns)
        if sample.outcome == "ok" and sample.completion
    }


def _pairs(path: Path) -> Iterator[JudgedRow]:
    """Yield the pairs of a file of JSON lines."""
    try:
        with path.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError("the line is too long", place=f"{path}:{number}", remedy=_PAIR_REMEDY)
                if line.strip():
                    yield _pair(line, path, number)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", place=str(path), remedy=_PAIR_REMEDY) from None


def _pair(line: bytes, path: Path, number: int) -> JudgedRow:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"is no JSON: {error}", place=f"{path}:{number}", remedy=_PAIR_REMEDY) from None
    row: Mapping[str, Any] = value if isinstance(value, dict) else {}
    messages: Any = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    texts: tuple[Any, ...] = tuple(row.get(name) for name in ("answer", "other", "reference"))
    answer, other, reference = texts
    metadata = row.get("metadata") or {}
    is_pair = (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(turn, dict) for turn in messages)
        and isinstance(answer, str)
        and isinstance(other, str)
        and (reference is None or isinstance(reference, str))
        and isinstance(metadata, dict)
    )
    if not is_pair:
        raise ConfigError("is no pair of answers", place=f"{path}:{number}", remedy=_PAIR_REMEDY)
    content = orjson.dumps([messages, answer, other, reference], option=orjson.OPT_SORT_KEYS)
    is_blank = not answer.strip() or not other.strip()
    return JudgedRow(
        key=hashlib.sha256(content).hexdigest(),
        id=str(row.get("id", number)),
        messages=messages,
        answer=answer,
        other=other,
        reference=reference,
        metadata=metadata,
        left_out="blank" if is_blank else ("equal_answers" if answer == other else ""),
    )
