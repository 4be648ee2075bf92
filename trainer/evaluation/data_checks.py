"""Check rendered examples and corpus for fatal faults: each has a name, a count and its first row."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.collator import collate
from trainer.data.dataset import Rows

MAX_SHARE_LEFT_OUT = 0.5  # of the rows to learn; above it, another corpus would be learned than was paid for


@dataclass(frozen=True, slots=True)
class Check:
    """One fault that was looked for.

    Attributes:
        fault: what would be wrong. count: how many of `of` have it. unit: what was counted.
        first: number of the first row that has it, None where none has.
    """

    fault: str
    count: int
    of: int
    first: int | None = None
    unit: str = "examples"

    def __str__(self) -> str:
        """The finding as a line."""
        return f"{self.fault}: {self.count:,} of {self.of:,} {self.unit}"


@dataclass(frozen=True, slots=True)
class RenderedRows:
    """The rows to learn as the student will see them; all four in the same order."""

    rows: Rows
    answers: tuple[str, ...]
    thoughts: tuple[str | None, ...]
    examples: tuple[Example, ...]


def render_rows(rows: Rows, renderer: Renderer, config: TrainConfig) -> RenderedRows:
    """Render every row to learn, also those that would be left out."""
    answers = tuple(dataset.answer_of(s, config.data) for s in rows.train)
    thoughts = tuple(dataset.reasoning_of(s, config.data) for s in rows.train)
    ends = [s.outcome != "truncated" for s in rows.train]
    made = renderer.examples([s.messages for s in rows.train], answers, ends, thoughts)
    return RenderedRows(rows, answers, thoughts, tuple(made))


def run_checks(seen: RenderedRows, renderer: Renderer, *, vocabulary: int, learned: int) -> list[Check]:
    """Every fault that is looked for, found or not.

    Args:
        vocabulary: rows of the student's embedding.
        learned: examples that fit and will be learned.
    """
    return [
        *_label_checks(seen.examples, renderer, vocabulary),
        *_text_checks(seen, renderer),
        *_boundary_checks(seen, renderer),
        *_corpus_checks(seen.rows, learned),
    ]


def _count(items: Sequence[Any], tests: dict[str, Callable[[Any], bool]]) -> Iterator[Check]:
    for fault, test in tests.items():
        having = [number for number, item in enumerate(items) if test(item)]
        yield Check(fault, len(having), len(items), having[0] if having else None)


def _label_checks(examples: Sequence[Example], renderer: Renderer, vocabulary: int) -> Iterator[Check]:
    stop = renderer.chat_shape.stop_id
    bos = renderer.tokenizer.bos_token_id
    tests: dict[str, Callable[[Example], bool]] = {
        "no supervised token": lambda e: e.supervised <= 0,
        "end of turn is not learned": lambda e: e.terminated and int(e.ids[-1]) != stop,
        "begins with two BOS tokens": lambda e: bos is not None and list(e.ids[:2]) == [bos, bos],
        f"token ids outside the model's {vocabulary}": lambda e: (
            int(e.ids.max()) >= vocabulary or int(e.ids.min()) < 0
        ),
        "labels are not the answer (a token was masked by its id)": lambda e: (
            e.supervised > 0 and collate([e]).targets.tolist() != e.ids[e.prompt_length :].tolist()
        ),
    }
    yield from _count(examples, tests)
    ends = any(e.terminated for e in examples)
    count = 0 if ends else len(examples)
    yield Check("no answer ends: nobody learns to stop", count, len(examples), None if ends else 0)


def _text_checks(seen: RenderedRows, renderer: Renderer) -> Iterator[Check]:
    """Faults of the answer's text on its way into ids."""
    tokenizer = renderer.tokenizer
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = tokenizer.unk_token_id
    bodies = []
    for example, answer, thought in zip(seen.examples, seen.answers, seen.thoughts, strict=True):
        tail = len(renderer.chat_shape.end_of_turn) if example.terminated else 0
        ids = example.ids[example.prompt_length : len(example.ids) - tail].tolist()
        if thought and renderer.chat_shape.reasoning:
            before, after = renderer.chat_shape.reasoning
            bodies.append((ids, f"{before}{thought}{after}{answer}", _ids_of(tokenizer, (before, after))))
        else:
            bodies.append((ids, renderer.chat_shape.lead + answer, frozenset()))
    tests: dict[str, Callable[[Any], bool]] = {
        "the teacher's text is not verbatim": lambda b: (
            tokenizer.decode(b[0], skip_special_tokens=False, clean_up_tokenization_spaces=False) != b[1]
        ),
        "control tokens inside the answer": lambda b: bool(control & set(b[0]) - {unknown} - b[2]),
        "unknown tokens in the answer": lambda b: unknown is not None and unknown in b[0],
    }
    yield from _count(bodies, tests)


def _ids_of(tokenizer: Any, texts: Sequence[str]) -> frozenset[int]:
    return frozenset(i for text in texts if text for i in tokenizer.encode(text, add_special_tokens=False))


def _boundary_checks(seen: RenderedRows, renderer: Renderer) -> Iterator[Check]:
    """The prompt has to end exactly where the student will begin to answer."""
    served = renderer.prompts(
        [s.messages for s in seen.rows.train], [bool(thought) for thought in seen.thoughts]
    )
    pairs = list(zip(seen.examples, served, strict=True))
    fault = "the prompt learned is not the prompt served"
    yield from _count(pairs, {fault: lambda p: p[0].ids[: p[0].prompt_length].tolist() != p[1]})


def _corpus_checks(rows: Rows, learned: int) -> Iterator[Check]:
    """Faults of the corpus itself."""
    judged = {_normalised(held.messages) for held in rows.held_out}
    tests: dict[str, Callable[[Any], bool]] = {
        "held-out prompts under another spelling": lambda s: _normalised(s.messages) in judged,
        "cut by the token limit, yet taught as whole": lambda s: (
            s.finish_reason == "length" and s.outcome != "truncated"
        ),
    }
    yield from _count(rows.train, tests)
    lost = len(rows.train) - learned
    many = lost > len(rows.train) * MAX_SHARE_LEFT_OUT
    yield Check("most rows are too long to learn", lost if many else 0, len(rows.train), unit="rows")


def _normalised(messages: Sequence[Any]) -> str:
    """A prompt's text without what spelling alone changes: case, white space, Unicode form."""
    text = "\n".join(str(m.get("content") or "") for m in messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
