"""Check the rendered examples and the corpus for fatal faults; count each fault and name its first row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.store.shards.schema import Sample
from trainer.config import TrainConfig
from trainer.data import dataset, published_template, row_rules
from trainer.data.chat_template import Example, Renderer
from trainer.data.collator import collate
from trainer.data.conversation import Conversation, conversation_of
from trainer.data.dataset import Rows
from trainer.data.soft_targets import SoftReport
from trainer.model import token_rows

# Largest share of the rows to learn that may be too long. Above it, most of the paid answers would be unused.
MAX_SHARE_LEFT_OUT = 0.5


@dataclass(frozen=True, slots=True)
class Check:
    """Hold the result of looking for one fault.

    Attributes:
        fault: what is wrong with the counted items. count: how many of the `of` items have the fault.
        first: index of the first training row that has it; None if none has.
        unit: what was counted, plural.
        first_prompt: prompt id of that row.
    """

    fault: str
    count: int
    of: int
    first: int | None = None
    unit: str = "examples"
    first_prompt: str = ""

    def __str__(self) -> str:
        """Return the result as one line."""
        first = f", the first is prompt {self.first_prompt!r}" if self.first_prompt else ""
        return f"{self.fault}: {self.count:,} of {self.of:,} {self.unit}{first}"


@dataclass(frozen=True, slots=True)
class RenderedRows:
    """Hold the rows to learn and their rendered examples; all sequences have the order of `rows.train`.

    Attributes:
        soft: how much of the teacher's log-probabilities is learned; None without `[train] soft_targets`.
    """

    rows: Rows
    conversations: tuple[Conversation, ...]
    answers: tuple[str, ...]
    thoughts: tuple[str | None, ...]
    examples: tuple[Example, ...]
    keeps_reasoning: bool
    base: Path
    trainable_tokens: tuple[str, ...]
    soft: SoftReport | None = None

    def __len__(self) -> int:
        """Return the number of rows to learn, those too long included."""
        return len(self.examples)

    def prompt_id(self, number: int) -> str:
        """Return the prompt id of a row."""
        return self.rows.train[number].prompt_id

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[rows] int32, tokens of each row."""
        return np.array([len(e.ids) for e in self.examples], dtype=np.int32)

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        """[rows] int32, supervised tokens of each row."""
        return np.array([e.supervised for e in self.examples], dtype=np.int32)

    @property
    def with_soft_targets(self) -> Sequence[int]:
        """Numbers of the rows that have soft targets."""
        return [number for number, example in enumerate(self.examples) if example.soft is not None]

    def kinds(self) -> RowKinds:
        """Count rows of the kinds that the doctor mentions."""
        return RowKinds(
            thinking=sum(map(begins_with_thought, self.rows.train)),
            with_reasoning=sum(bool(sample.reasoning) for sample in self.rows.train),
            without_end=sum(not example.terminated for example in self.examples),
        )


@dataclass(frozen=True, slots=True)
class RowKinds:
    """Count rows to learn that are unusual, but not wrong.

    Attributes:
        thinking: answers that begin with <think>, as text. with_reasoning: rows whose reasoning is in a
            column of its own. without_end: answers that are learned without an end of turn.
    """

    thinking: int
    with_reasoning: int
    without_end: int


def begins_with_thought(sample: Sample) -> bool:
    """Whether an answer begins with <think>, so that its reasoning is learned as plain text."""
    return sample.completion is not None and sample.completion.lstrip().startswith("<think>")


def render_rows(
    rows: Rows, renderer: Renderer, config: TrainConfig, vocabulary: int = 0
) -> tuple[RenderedRows, dataset.Dataset]:
    """Render every row once.

    Args:
        vocabulary: rows of the student's embedding; 0: ids are not checked.

    Returns:
        All rows as examples, for the checks; and those that are learned.

    Raises:
        DataError, StudentError: see `dataset.select`.
    """
    examples = dataset.render_samples(rows.train, renderer, config.data)
    with_soft, soft = dataset.with_soft_targets(rows, examples, renderer, config)
    rendered = RenderedRows(
        rows,
        tuple(conversation_of(s) for s in rows.train),
        tuple(row_rules.answer_of(s, config.data) for s in rows.train),
        tuple(row_rules.reasoning_of(s, config.data) for s in rows.train),
        tuple(with_soft),
        published_template.keeps_reasoning(config, renderer),
        config.base,
        config.lora.trainable_tokens,
        soft,
    )
    return rendered, dataset.select(rows, rendered.examples, config, vocabulary)


def run_checks(rendered: RenderedRows, renderer: Renderer, *, vocabulary: int, learned: int) -> list[Check]:
    """Run all checks and return their results, also of those that found nothing.

    Args:
        vocabulary: rows of the student's embedding.
        learned: number of examples that are short enough to be learned.
    """
    checker = RowChecker(renderer, vocabulary, keeps_reasoning=rendered.keeps_reasoning)
    held_out = {row_rules.normalised(held.conversation.messages) for held in rendered.rows.held_out}
    respelled = [row_rules.normalised(conversation_of(s).messages) in held_out for s in rendered.rows.train]
    read = set(np.unique(np.concatenate([e.ids for e in rendered.examples])).tolist())
    found = RowFaults(
        checker.bits(
            rendered.rows.train,
            rendered.conversations,
            rendered.answers,
            rendered.thoughts,
            rendered.examples,
        ),
        np.array(respelled, dtype=bool),
        frozenset(read & control_ids(renderer)),
        any(e.terminated for e in rendered.examples),
        learned,
    )
    tokens = token_check(found.control, renderer, rendered.base, rendered.trainable_tokens)
    return [*found.checks(checker.names, rendered.prompt_id), tokens]


@dataclass(frozen=True, slots=True)
class RowFaults:
    """Say what is wrong with each of the rows to learn.

    Attributes:
        bits: [rows] uint16; bit i is set where a row has the fault `RowChecker.names[i]`.
        respelled: [rows] bool, whether the prompt is a held-out one in another spelling.
        control: control tokens that occur in the rows.
        any_ends: whether any answer has an end of turn.
        learned: rows that are short enough to be learned.
    """

    bits: npt.NDArray[np.uint16]
    respelled: npt.NDArray[np.bool_]
    control: frozenset[int]
    any_ends: bool
    learned: int

    def checks(self, names: Sequence[str], prompt_id: Callable[[int], str]) -> list[Check]:
        """Return all checks but `token_check`, also those that found nothing.

        Args:
            names: of the bits. prompt_id: of a row by its number.
        """
        rows = len(self.bits)
        of_rows = [self._count(name, (self.bits >> bit) & 1) for bit, name in enumerate(names)]
        stops = Check(
            "no answer has an end of turn, so the student would not learn to stop",
            0 if self.any_ends else rows,
            rows,
            None if self.any_ends else 0,
        )
        respelled = self._count("held-out prompts in another spelling", self.respelled)
        too_long = rows - self.learned
        too_many = too_long if too_long > rows * MAX_SHARE_LEFT_OUT else 0
        length = Check("most rows are too long to learn", too_many, rows, unit="rows")
        labels, rest, cut = of_rows[:_LABELS], of_rows[_LABELS:-1], of_rows[-1]
        checks = [*labels, stops, *rest, respelled, cut, length]
        return [c if c.first is None else replace(c, first_prompt=prompt_id(c.first)) for c in checks]

    @staticmethod
    def _count(fault: str, flags: npt.NDArray[Any]) -> Check:
        count = int(np.count_nonzero(flags))
        return Check(fault, count, len(flags), int(np.argmax(flags != 0)) if count else None)


# Names of `RowChecker` that are about labels; they come first.
_LABELS = 5


class RowChecker:
    """Look for the faults that a row can have by itself.

    Args:
        vocabulary: rows of the student's embedding.
        keeps_reasoning: whether the student is taught to begin its answers with reasoning.

    Attributes:
        names: the faults, in the order of the bits.
    """

    def __init__(self, renderer: Renderer, vocabulary: int, *, keeps_reasoning: bool) -> None:
        self._renderer = renderer
        self._vocabulary = vocabulary
        self._keeps_reasoning = keeps_reasoning
        self._template, _ = published_template.template_to_publish(renderer, thinking=keeps_reasoning)
        added = renderer.tokenizer.added_tokens_decoder.items()
        self._special = {i for i, token in added if token.special}
        shape = renderer.chat_shape
        self._of_reasoning = _ids_of(renderer.tokenizer, shape.reasoning) if shape.reasoning else frozenset()
        self.names = (
            "no supervised token",
            "end of turn is not learned",
            "begins with two BOS tokens",
            f"token ids outside the model's {vocabulary}",
            "labels are not the answer (a token was masked by its id)",
            "the teacher's text is not verbatim",
            "control tokens inside the answer",
            "unknown tokens in the answer",
            "the chat template leaves out text of the prompt",
            "the prompt learned is not the prompt served",
            "cut by the token limit, but learned as complete",
        )

    def bits(
        self,
        samples: Sequence[Sample],
        conversations: Sequence[Conversation],
        answers: Sequence[str],
        thoughts: Sequence[str | None],
        examples: Sequence[Example],
    ) -> npt.NDArray[np.uint16]:
        """Return [rows] uint16 with a bit for each fault of each row."""
        texts = published_template.served_texts(self._renderer, self._template, conversations)
        served = published_template.served_prompts(self._renderer, texts, conversations)
        rows = np.zeros(len(samples), dtype=np.uint16)
        are_labels_right = _are_labels_right(examples)
        for number, (sample, conversation, answer, thought, example) in enumerate(
            zip(samples, conversations, answers, thoughts, examples, strict=True)
        ):
            faults = (
                *self._label_faults(example),
                not are_labels_right and example.supervised > 0 and not _are_labels_right([example]),
                *self._text_faults(example, answer, thought),
                bool(self._renderer.text_lost(conversation, texts[number])),
                example.ids[: example.prompt_length].tolist()
                != self._as_served(served[number], conversation, thought),
                sample.finish_reason == "length" and sample.outcome != "truncated",
            )
            rows[number] = sum(1 << bit for bit, is_faulty in enumerate(faults) if is_faulty)
        return rows

    def _label_faults(self, example: Example) -> tuple[bool, ...]:
        ids, bos = example.ids, self._renderer.tokenizer.bos_token_id
        return (
            example.supervised <= 0,
            example.terminated and int(ids[-1]) != self._renderer.chat_shape.stop_id,
            bos is not None and list(ids[:2]) == [bos, bos],
            int(ids.max()) >= self._vocabulary or int(ids.min()) < 0,
        )

    def _text_faults(self, example: Example, answer: str, thought: str | None) -> tuple[bool, ...]:
        """Check that the ids of an answer decode to its text and hold no control or unknown token."""
        shape, unknown = self._renderer.chat_shape, self._renderer.tokenizer.unk_token_id
        tail = len(shape.end_of_turn) if example.terminated else 0
        ids = example.ids[example.prompt_length : len(example.ids) - tail].tolist()
        text, allowed = shape.lead + answer, frozenset[int]()
        if thought and shape.reasoning:
            before, after = shape.reasoning
            text, allowed = f"{before}{thought}{after}{answer}", self._of_reasoning
        return (
            self._renderer.decode(ids) != text,
            bool(self._special & set(ids) - {unknown} - allowed),
            unknown is not None and unknown in ids,
        )

    def _as_served(
        self, served: list[int] | None, conversation: Conversation, thought: str | None
    ) -> list[int]:
        """Return the ids of a prompt as a server makes them.

        A server can't tell text from control tokens, and a student that was taught to think before some
        answers only decides so itself: such prompts are compared with our own rendering.
        """
        if served is None or (self._keeps_reasoning and not thought):
            [ids] = self._renderer.prompts([conversation], [bool(thought)])
            return ids
        return served


def _are_labels_right(examples: Sequence[Example]) -> bool:
    """Whether the collator predicts every id after the prompts of all examples, and nothing else."""
    longest_first = sorted((e for e in examples if e.supervised > 0), key=lambda e: -len(e.ids))
    if not longest_first:
        return True
    expected = np.concatenate([e.ids[e.prompt_length :] for e in longest_first])
    return np.array_equal(collate(longest_first).targets.numpy(), expected)


def _ids_of(tokenizer: Any, texts: Sequence[str]) -> frozenset[int]:
    return frozenset(i for text in texts if text for i in tokenizer.encode(text, add_special_tokens=False))


def control_ids(renderer: Renderer) -> frozenset[int]:
    """Return the control tokens of a tokenizer."""
    added = renderer.tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.special) | set(renderer.tokenizer.all_special_ids)


def token_check(read: Collection[int], renderer: Renderer, base: Path, trained: Collection[str]) -> Check:
    """Look for control tokens that the student reads or generates, but whose rows were never trained.

    Args:
        read: control tokens that occur in the rows. trained: tokens whose rows the adapter trains.
    """
    generated = set(renderer.chat_shape.end_of_turn) & control_ids(renderer)
    ids = token_rows.untrained_tokens(base, set(read), generated)
    tokens = [str(token) for token in renderer.tokenizer.convert_ids_to_tokens(ids)]
    tokens = [token for token in tokens if token not in trained]
    fault = "control tokens whose embedding was never trained"
    if tokens:
        fault += f" ({', '.join(tokens)}: list them in [lora] trainable_tokens, or take a chat model as base)"
    return Check(fault, len(tokens), len(read), unit="control tokens")
