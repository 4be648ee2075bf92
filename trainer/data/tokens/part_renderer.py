"""Render rows of a corpus into a part of the token store. Loads no torch by itself."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from harvester.api.types import OF_TEXTS, Outcome
from harvester.export.score import candidate_of
from harvester.quality.held_out import prompt_key
from harvester.quality.verifiers.comparisons import normalise
from harvester.quality.verifiers.verifiers import AnswerVerdict, Verifiers
from harvester.store.mixing import COLUMNS as MIXING_COLUMNS
from harvester.store.mixing import Mixing
from harvester.store.shards.schema import Sample
from harvester.store.where import Where
from trainer.config import DataSection, TrainConfig
from trainer.data import answers, data_checks, dataset, published_template, row_rules
from trainer.data.chat_template import Example, Renderer
from trainer.data.conversation import (
    Conversation,
    UnsupportedContent,
    conversation_of,
    request_beyond_columns,
)
from trainer.data.shared_questions import question_of
from trainer.data.split_names import UnknownSplits
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import TeacherSignal
from trainer.data.token_alignment import align
from trainer.data.tokens.part import PartContent, PartFacts
from trainer.data.tokens.part_signal import AlignedAnswer, SignalWriter
from trainer.data.tokens.row_record import NO_VERDICT, RECORD, RowFlag
from trainer.errors import StudentError
from trainer.provenance import fingerprint

# Rows that are rendered together.
_AT_ONCE = 256

VERDICTS = tuple(AnswerVerdict)


class PartRenderer:
    """Render rows, check them, and note what is needed to choose among them later.

    Args:
        vocabulary: rows of the student's embedding.

    Attributes:
        columns: columns of the corpus that it reads.
    """

    def __init__(self, config: TrainConfig, renderer: Renderer, vocabulary: int) -> None:
        data = config.data
        self._config = config
        self._renderer = renderer
        keeps_reasoning = published_template.keeps_reasoning(config, renderer)
        self._checker = data_checks.RowChecker(renderer, vocabulary, keeps_reasoning=keeps_reasoning)
        self._control = data_checks.control_ids(renderer)
        self._where = Where.parse(data.where).bind(config.corpus) if data.where else None
        self._verifiers = None
        if data.answers in {"verified", "best"}:
            self._verifiers = Verifiers(config.verify, config.root)
            self._verifiers.require_functions()
        of_where = self._where.columns if self._where else ()
        wanted = (*dataset.COLUMNS, *fingerprint.ORIGIN_COLUMNS, *MIXING_COLUMNS, *of_where)
        self.columns = tuple(dict.fromkeys(wanted))
        self._student = StudentTokens(renderer) if config.train.soft_targets != "off" else None

    @property
    def fault_names(self) -> tuple[str, ...]:
        """Faults that a row can have, in the order of the bits."""
        return self._checker.names

    def render(self, samples: Iterable[Sample], signal: TeacherSignal | None = None) -> PartContent:
        """Render rows, in their order.

        Args:
            signal: log-probabilities, those of a row at the latest when it comes; None without soft targets.

        Raises:
            StudentError: the tokenizer or the template can't be used at all. A row that the template refuses
                is noted in its record.
        """
        part = _PartWriter(signal)
        settings, splits = Mixing(self._config.corpus), UnknownSplits(self._config.data.split_field)
        left = iter(samples)
        while batch := list(islice(left, _AT_ONCE)):
            chosen = []
            for sample in batch:
                if sample.outcome in OF_TEXTS:
                    continue
                if self._where is not None and not self._where.matches(sample):
                    part.left_out += 1
                    continue
                settings.add(sample)
                splits.add(sample)
                chosen.append(_Row(sample, self._config.data))
            self._render_batch(chosen)
            if signal is not None:
                self._align(chosen, signal)
            for row in chosen:
                part.add(row)
        return part.content(settings, splits)

    def _align(self, rows: Sequence[_Row], signal: TeacherSignal) -> None:
        """Find where tokens of teacher and student begin together, in the rows that may be learned."""
        assert self._student is not None, "the settings ask for soft targets"
        for row in rows:
            tokens = signal.answers.get(row.sample.key)
            if tokens is None or row.example is None or not row.flags & RowFlag.LEARNABLE:
                continue
            answer = row_rules.teacher_text(row.sample, self._config.data)
            found = align(row.example, answer, tokens, signal.table, self._student, row.unaligned)
            row.aligned = AlignedAnswer(tokens, found)

    def _render_batch(self, rows: Sequence[_Row]) -> None:
        rendered = [row for row in rows if row.is_rendered]
        for row, example in zip(rendered, self._examples(rendered), strict=True):
            row.example = example
        rendered = [row for row in rendered if row.example is not None]
        learnable = [row for row in rendered if row.flags & RowFlag.LEARNABLE]
        if learnable:
            bits = self._checker.bits(
                [row.sample for row in learnable],
                [row.asked for row in learnable],
                [row.answer for row in learnable],
                [row.thought for row in learnable],
                [row.example for row in learnable if row.example is not None],
            )
            for row, faults in zip(learnable, bits.tolist(), strict=True):
                row.faults = faults
        for row in rendered:
            assert row.example is not None
            row.control = tuple(sorted(self._control & set(row.example.ids.tolist())))
        if answers.compares_answers(self._config.data):
            for row in learnable:
                row.normalised_answer = _digest(normalise(row.sample.completion or ""))
                if self._verifiers is not None:
                    verdict = self._verifiers.judge(candidate_of(row.sample)).verdict
                    row.verdict = VERDICTS.index(verdict)

    def _examples(self, rows: Sequence[_Row]) -> list[Example | None]:
        """Render rows; None, and the reason in the row, for those that the template refuses."""
        if not rows:
            return []
        try:
            return list(self._render_rows(rows))
        except StudentError as error:
            for row in rows:
                try:
                    self._renderer.prompt_text(row.asked)
                except StudentError as refused:
                    row.refuse(refused.message)
            kept = [row for row in rows if not row.flags & RowFlag.REFUSED]
            if len(kept) == len(rows):
                raise error from None
        by_row = dict(zip(map(id, kept), self._render_rows(kept), strict=True))
        return [by_row.get(id(row)) for row in rows]

    def _render_rows(self, rows: Sequence[_Row]) -> list[Example]:
        return self._renderer.examples(
            [row.asked for row in rows],
            [row.answer for row in rows],
            [row.sample.outcome != Outcome.TRUNCATED for row in rows],
            [row.thought for row in rows],
        )


class _Row:
    """One row while it is rendered."""

    def __init__(self, sample: Sample, data: DataSection) -> None:
        self.origin = fingerprint.origin_sha256(sample)
        self.sample = sample
        self.conversation: Conversation | None = None
        why_not = ""
        try:
            self.conversation = conversation_of(sample, request_beyond_columns(sample))
        except UnsupportedContent as error:
            why_not = str(error)
        self.prompt = prompt_key(sample.messages)
        split = row_rules.split_of(sample, self.prompt, data)
        has_text = self.conversation is not None
        unusable = row_rules.exclusion_reason(sample, data, why_not=why_not)
        self.reason = unusable if split == "train" else why_not
        self.answer = row_rules.answer_of(sample, data)
        self.thought = row_rules.reasoning_of(sample, data)
        self.text = ""
        self.flags = 0
        if has_text:
            self.flags |= RowFlag.TEXT
        if split != "train":
            self.flags |= RowFlag.HELD_OUT
            if has_text:
                self.text = self._asked_as_json(split, None if unusable else sample.completion)
        elif not unusable:
            self.flags |= RowFlag.LEARNABLE
        if not unusable:
            self.flags |= RowFlag.ANSWERED
        # The teacher's whole answers to held-out prompts are rendered for the held-out loss.
        is_target = split != "train" and has_text and not unusable and sample.outcome == Outcome.OK
        self.is_rendered = bool(self.flags & RowFlag.LEARNABLE) or is_target
        if data_checks.begins_with_thought(sample):
            self.flags |= RowFlag.THINKING
        if sample.reasoning:
            self.flags |= RowFlag.REASONING
        self.example: Example | None = None
        self.faults = 0
        self.control: tuple[int, ...] = ()
        self.normalised_answer = b""
        self.verdict = NO_VERDICT
        self.aligned: AlignedAnswer | None = None
        self.unaligned: Counter[str] = Counter()

    @property
    def asked(self) -> Conversation:
        """What is asked, of a row whose messages are text."""
        assert self.conversation is not None
        return self.conversation

    @property
    def spellings(self) -> tuple[bytes, bytes]:
        """Hashes of the normalised prompt, and of its question."""
        if self.conversation is None:
            return b"", b""
        question = question_of(self.asked.messages)
        return _digest(row_rules.normalised(self.asked.messages)), _digest(question) if question else b""

    def refuse(self, message: str) -> None:
        """Note that the chat template refuses the row, and why."""
        self.flags |= RowFlag.REFUSED
        self.text = message

    def _asked_as_json(self, split: str, teacher: str | None) -> str:
        """Return what is asked of the student where this prompt is held out, as JSON."""
        task = self.sample.metadata.get("task")
        return json.dumps(
            {
                "messages": [dict(message) for message in self.asked.messages],
                "tools": [dict(tool) for tool in self.asked.tools],
                "reference": self.sample.reference,
                "task": task if isinstance(task, str) and task else "all",
                "split": split,
                "teacher": teacher,
            }
        )


class _PartWriter:
    """Collect rows as records, ids and texts."""

    def __init__(self, signal: TeacherSignal | None) -> None:
        self.left_out = 0
        self._signal = None if signal is None else SignalWriter(signal.table)
        self._records: list[tuple[Any, ...]] = []
        self._ids = array("i")
        self._prompt_ids = bytearray()
        self._texts = bytearray()
        self._reasons: dict[str, int] = {"": 0}
        self._teachers: dict[tuple[str, str, bool], int] = {}
        self._controls: dict[tuple[int, ...], int] = {}

    def add(self, row: _Row) -> None:
        sample, example = row.sample, row.example
        start = len(self._ids)
        if example is not None:
            self._ids.frombytes(example.ids.tobytes())
            row.flags |= RowFlag.RENDERED
            if example.terminated:
                row.flags |= RowFlag.TERMINATED
        prompt_id = sample.prompt_id.encode("utf-8", "surrogatepass")
        text = row.text.encode()
        teacher = (sample.teacher_id, sample.terms_id, sample.mock)
        completion = (sample.completion or "").encode("utf-8", "surrogatepass")
        if self._signal is not None and row.aligned is not None:
            self._signal.add(len(self._records), row.aligned, row.unaligned)
        self._records.append(
            (
                *(start, len(self._prompt_ids), len(self._texts)),
                0 if example is None else len(example.ids),
                0 if example is None else example.prompt_length,
                *(sample.sample_index, len(prompt_id), len(text)),
                *(row.flags, row.faults, _number(self._reasons, row.reason)),
                *(_number(self._teachers, teacher), _number(self._controls, row.control), row.verdict),
                bytes.fromhex(sample.key),
                hashlib.sha256(completion).digest(),
                bytes.fromhex(row.origin),
                bytes.fromhex(row.prompt)[:16],
                *row.spellings,
                row.normalised_answer,
                hashlib.sha256(prompt_id).digest()[:16],
            )
        )
        self._prompt_ids += prompt_id
        self._texts += text

    def content(self, settings: Mixing, splits: UnknownSplits) -> PartContent:
        """Return the part."""
        records = np.array(self._records, dtype=RECORD)
        records["text_start"] += len(self._prompt_ids)
        facts = PartFacts(
            len(records),
            self.left_out,
            tuple(self._reasons),
            tuple(self._teachers),
            tuple(self._controls),
            settings.counts,
            splits.counts,
        )
        signal = {} if self._signal is None else self._signal.files()
        return PartContent(records, self._ids.tobytes(), bytes(self._prompt_ids + self._texts), facts, signal)


def _number(numbers: dict[Any, int], value: Any) -> int:
    """Return the number of a value, a new one if it wasn't seen before."""
    return numbers.setdefault(value, len(numbers))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
