"""Looks at what would be learned, before it is: fatal label faults, and samples to read oneself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer import dataset, model, weights
from trainer.config import TrainConfig
from trainer.render import Example, Renderer

SHOWN = 5


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
    rendered = renderer.examples([s.messages for s in rows.train], answers, [True] * len(answers))
    findings = [
        *check(data.examples, renderer, vocabulary=weights.vocabulary_of(config.base)),
        *_verbatim(rendered, answers, renderer),
    ]
    shown = tuple(
        Shown(sample.prompt_id, _tokens(example, renderer))
        for sample, example in list(zip(rows.train, rendered, strict=True))[:SHOWN]
    )
    return Diagnosis(tuple(findings), shown, len(data.examples), dict(data.excluded))


def check(examples: Sequence[Example], renderer: Renderer, *, vocabulary: int) -> list[str]:
    """One line for each kind of fault, with the number of examples that have it."""
    stop = renderer.shape.stop_id
    bos = renderer.tokenizer.bos_token_id
    tests: dict[str, Any] = {
        "no supervised token": lambda e: e.supervised <= 0,
        "end of turn is not learned": lambda e: e.terminated and int(e.ids[-1]) != stop,
        "begins with two BOS tokens": lambda e: bos is not None and list(e.ids[:2]) == [bos, bos],
        f"token ids outside the model's {vocabulary}": lambda e: (
            int(e.ids.max()) >= vocabulary or int(e.ids.min()) < 0
        ),
    }
    counts = {said: sum(bool(test(e)) for e in examples) for said, test in tests.items()}
    return [f"{said}: {count:,} of {len(examples):,} examples" for said, count in counts.items() if count]


def _verbatim(examples: Sequence[Example], answers: Sequence[str], renderer: Renderer) -> list[str]:
    wrong = 0
    tail = len(renderer.shape.end_of_turn)
    for example, answer in zip(examples, answers, strict=True):
        ids = example.ids[example.prompt_length : len(example.ids) - tail].tolist()
        wrong += renderer.tokenizer.decode(ids, skip_special_tokens=False) != renderer.shape.lead + answer
    return [f"the teacher's text is not verbatim: {wrong:,} of {len(examples):,} examples"] if wrong else []


def _tokens(example: Example, renderer: Renderer) -> tuple[tuple[str, bool], ...]:
    pieces = [renderer.tokenizer.decode([token]) for token in example.ids.tolist()]
    return tuple((piece, at >= example.prompt_length) for at, piece in enumerate(pieces))
