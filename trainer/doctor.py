"""Looks at what would be learned, before it is: fatal label faults, and samples to read oneself."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer import dataset, model, weights
from trainer.collator import collate
from trainer.config import TrainConfig
from trainer.dataset import Rows
from trainer.render import Example, Renderer

SHOWN = 5
MOST_LEFT_OUT = (
    0.5  # of the rows to learn; above it, the student would learn another corpus than was paid for
)


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample cut into tokens: text and whether each is supervised."""

    prompt_id: str
    tokens: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Findings are fatal; an empty list is a clean bill."""

    findings: tuple[str, ...]
    shown: tuple[Shown, ...]
    examples: int
    excluded: dict[str, int]


def diagnose(config: TrainConfig) -> Diagnosis:
    """Render the corpus and check every label.

    Raises:
        DataError, StudentError: there is nothing to look at.
    """
    rows = dataset.read(config)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    data = dataset.render(rows, renderer, config)
    answers = [dataset.answer_of(s, config.data) for s in rows.train]
    ends = [s.outcome != "truncated" for s in rows.train]
    thoughts = [dataset.thought_of(s, config.data) for s in rows.train]
    rendered = renderer.examples([s.messages for s in rows.train], answers, ends, thoughts)
    findings = [
        *check(rendered, renderer, vocabulary=weights.vocabulary_of(config.base)),
        *_texts(rendered, answers, renderer),
        *_borders(rendered, rows, renderer),
        *_corpus(rows, len(data.examples)),
    ]
    shown = tuple(
        Shown(sample.prompt_id, _tokens(example, renderer))
        for sample, example in list(zip(rows.train, rendered, strict=True))[:SHOWN]
    )
    return Diagnosis(tuple(findings), shown, len(data.examples), dict(data.excluded))


def check(examples: Sequence[Example], renderer: Renderer, *, vocabulary: int) -> list[str]:
    """Faults of ids and labels: one line for each kind, with the number of examples that have it."""
    stop = renderer.shape.stop_id
    bos = renderer.tokenizer.bos_token_id
    tests: dict[str, Any] = {
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
    return list(_said(examples, tests))


def _said(items: Sequence[Any], tests: dict[str, Any]) -> Iterator[str]:
    for said, test in tests.items():
        if count := sum(bool(test(item)) for item in items):
            yield f"{said}: {count:,} of {len(items):,} examples"


def _texts(examples: Sequence[Example], answers: Sequence[str], renderer: Renderer) -> Iterator[str]:
    """Faults of the answer's text on its way into ids."""
    tokenizer = renderer.tokenizer
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = tokenizer.unk_token_id
    bodies = []
    for example, answer in zip(examples, answers, strict=True):
        tail = len(renderer.shape.end_of_turn) if example.terminated else 0
        ids = example.ids[example.prompt_length : len(example.ids) - tail].tolist()
        bodies.append((ids, renderer.shape.lead + answer))
    yield from _said(
        bodies,
        {
            "the teacher's text is not verbatim": lambda b: (
                tokenizer.decode(b[0], skip_special_tokens=False, clean_up_tokenization_spaces=False) != b[1]
            ),
            "control tokens inside the answer": lambda b: bool(control & set(b[0]) - {unknown}),
            "unknown tokens in the answer": lambda b: unknown is not None and unknown in b[0],
        },
    )


def _borders(examples: Sequence[Example], rows: Rows, renderer: Renderer) -> Iterator[str]:
    """The prompt has to end exactly where the student will begin to answer."""
    served = renderer.prompts([s.messages for s in rows.train])
    yield from _said(
        list(zip(examples, served, strict=True)),
        {
            "the prompt learned is not the prompt served": lambda pair: (
                pair[0].ids[: pair[0].prompt_length].tolist() != pair[1]
            )
        },
    )


def _corpus(rows: Rows, learned: int) -> Iterator[str]:
    """Faults of the corpus itself."""
    judged = {_plain(held.messages) for held in rows.held_out}
    yield from _said(
        rows.train,
        {
            "held-out prompts under another spelling": lambda s: _plain(s.messages) in judged,
            "cut by the token limit, yet taught as whole": lambda s: (
                s.finish_reason == "length" and s.outcome != "truncated"
            ),
        },
    )
    if learned < len(rows.train) * (1 - MOST_LEFT_OUT):
        yield f"most rows are too long to learn: {len(rows.train) - learned:,} of {len(rows.train):,}"


def _plain(messages: Sequence[Any]) -> str:
    """A prompt's text without what spelling alone changes: case, white space, Unicode form."""
    text = "\n".join(str(m.get("content") or "") for m in messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _tokens(example: Example, renderer: Renderer) -> tuple[tuple[str, bool], ...]:
    pieces = [renderer.tokenizer.decode([token]) for token in example.ids.tolist()]
    return tuple((piece, at >= example.prompt_length) for at, piece in enumerate(pieces))
