"""Check the data before training (`trainer doctor`): find fatal faults, show samples token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.config import TrainConfig
from trainer.data import data_checks, dataset, published_template
from trainer.data.chat_template import Renderer
from trainer.data.data_checks import Check
from trainer.data.tokens import builder
from trainer.data.tokens.builder import Progress, no_progress
from trainer.data.tokens.stored_rows import Rendered
from trainer.errors import UsageError
from trainer.evaluation.distributions import ComparedToken, compare
from trainer.files import write_text
from trainer.model import model, weights
from trainer.training import requirements

SAMPLES_SHOWN = 5
# Tokens of a sample on the page; the middle of a longer prompt is left out.
MAX_TOKENS_SHOWN = 400
HISTOGRAM_BINS = 32
# What the decoder returns for bytes that are not a whole character.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Shown for a token whose bytes belong to the character of the token before it.
CONTINUED = "◂"


@dataclass(frozen=True, slots=True)
class ShownToken:
    """Hold one token of a sample. control: an added token of the tokenizer, which text can never produce."""

    text: str
    id: int
    supervised: bool
    control: bool


@dataclass(frozen=True, slots=True)
class ShownSample:
    """Hold a sample as tokens, and why it is shown: a fault that it has, or its rank by length."""

    prompt_id: str
    why: str
    is_faulty: bool
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Hold what the checks found.

    Attributes:
        findings: the fatal faults as lines; empty if the data can be learned.
        notices: lines about what is unusual, but not wrong.
        tokens, supervised: of all examples to learn.
        lengths: a histogram of tokens per example; each bin is (shortest, longest, examples, share of
            supervised tokens).
        compared: the teacher's and the untrained student's probabilities at chosen tokens; empty without soft
            targets.
    """

    findings: tuple[str, ...]
    notices: tuple[str, ...]
    checks: tuple[Check, ...]
    shown: tuple[ShownSample, ...]
    examples: int
    held_out: int
    tokens: int
    supervised: int
    excluded: dict[str, int]
    lengths: tuple[tuple[int, int, int, float], ...]
    compared: tuple[ComparedToken, ...] = ()


def diagnose(config: TrainConfig, on_progress: Progress = no_progress) -> Diagnosis:
    """Render the corpus and check every example. The student's weights are loaded for soft targets only.

    Args:
        on_progress: called while the token store of a large corpus is made.

    Raises:
        DataError: no corpus, or no row to learn from.
        StudentError: the base's tokenizer or chat template can't be used.
    """
    weights.check_base(config.base, config.student.sha256)
    renderer: Renderer | None = None
    if dataset.is_stored(config):
        renderer = Renderer(model.load_tokenizer(config.base, config.template))
        store = builder.prepare(config, renderer, on_progress)
        trained = config.lora.trainable_tokens
        checks = [*store.checks, data_checks.token_check(store.control, renderer, config.base, trained)]
        rendered: Rendered = store.rendered
        data, soft = store.data, store.soft
    else:
        rows = dataset.read(config)
        renderer = Renderer(model.load_tokenizer(config.base, config.template))
        rendered, data = data_checks.render_rows(rows, renderer, config)
        vocabulary = weights.vocabulary_size(config.base)
        checks = data_checks.run_checks(rendered, renderer, vocabulary=vocabulary, learned=len(data.examples))
        soft = rendered.soft
    student_notes, refusals = _check_training(config, rendered, renderer)
    faults = (*(str(check) for check in checks if check.count), *(soft.faults if soft else ()))
    compared = compare(rendered, renderer, config) if soft and not refusals else ()
    return Diagnosis(
        findings=(*faults, *refusals),
        notices=(
            *_notices(rendered, renderer, config),
            *rendered.rows.mixed,
            *(soft.notes() if soft else ()),
            *dataset.context_notes(data.lengths, config),
            *student_notes,
        ),
        checks=tuple(checks),
        shown=tuple(_pick_samples(rendered, checks, renderer)),
        examples=len(data.examples),
        held_out=len(rendered.rows.held_out),
        tokens=data.tokens + len(data.examples),
        supervised=data.supervised,
        excluded=dict(data.excluded),
        lengths=_length_histogram(rendered),
        compared=compared,
    )


def _check_training(
    config: TrainConfig, rendered: Rendered, renderer: Renderer
) -> tuple[list[str], list[str]]:
    """Check settings, held-out rows, and the student without its weights; return notes and refusals."""
    notes: list[str] = []
    refusals: list[str] = []
    checks: tuple[Callable[[], None], ...] = (
        lambda: requirements.check_settings(config),
        lambda: requirements.check_rows(config, rendered.rows, renderer),
        lambda: notes.extend(model.check_without_weights(config)),
        lambda: requirements.check_storable(config),
    )
    for check in checks:
        try:
            check()
        except UsageError as error:
            refusal = f"{error.message} ({error.remedy})" if error.remedy else error.message
            if refusal not in refusals:
                refusals.append(refusal)
    return notes, refusals


def write_page(diagnosis: Diagnosis, config: TrainConfig, path: Path) -> Path:
    """Write the diagnosis as one HTML file without scripts or remote assets; return its path."""
    environment = Environment(
        loader=PackageLoader("trainer.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("doctor.html.j2").render(
        diagnosis=diagnosis,
        config=config,
        highest=max((count for _, _, count, _ in diagnosis.lengths), default=1),
        samples=[(shown, _shortened(shown.tokens)) for shown in diagnosis.shown],
        visible=printable,
    )
    write_text(path, page)
    return path


def printable(text: str) -> str:
    """Return a token's text with marks for white space and escapes for control characters."""
    plain = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain) or "∅"


def _shortened(tokens: Sequence[ShownToken]) -> tuple[Sequence[ShownToken], int, Sequence[ShownToken]]:
    """Return the first tokens, the number of tokens left out, and the last tokens.

    The last tokens begin before the first supervised one, so that the end of the prompt is visible.
    """
    if len(tokens) <= MAX_TOKENS_SHOWN:
        return tokens, 0, ()
    border = next((i for i, token in enumerate(tokens) if token.supervised), len(tokens))
    head = MAX_TOKENS_SHOWN // 4
    begin = max(head, min(border - head, len(tokens) - head))
    return tokens[:head], begin - head, tokens[begin : begin + MAX_TOKENS_SHOWN - head]


def _pick_samples(rendered: Rendered, checks: Sequence[Check], renderer: Renderer) -> list[ShownSample]:
    """Pick the first row of every fault, then rows from the shortest to the longest."""
    by_length = np.argsort(rendered.lengths, kind="stable")
    why: dict[int, str] = {}
    for check in checks:
        if check.first is not None and check.first not in why:
            why[check.first] = check.fault
    faulty = len(why)
    names = ("shortest", "first quartile", "median", "third quartile", "longest")
    for place, name in enumerate(names):
        if len(why) < faulty + SAMPLES_SHOWN:
            why.setdefault(int(by_length[(len(by_length) - 1) * place // (SAMPLES_SHOWN - 1)]), name)
    for number in by_length[:SAMPLES_SHOWN].tolist():
        if len(why) >= SAMPLES_SHOWN:
            break
        why.setdefault(number, "")
    return [
        ShownSample(
            rendered.prompt_id(number),
            reason,
            rank < faulty,
            _tokens(rendered.examples[number], renderer),
        )
        for rank, (number, reason) in enumerate(why.items())
    ]


def _tokens(example: Any, renderer: Renderer) -> tuple[ShownToken, ...]:
    added = set(renderer.tokenizer.added_tokens_decoder)
    ids = example.ids.tolist()
    pieces = renderer.tokenizer.batch_decode([[token] for token in ids])
    for at, piece in enumerate(pieces):
        if piece.endswith(INCOMPLETE):  # a character of several tokens is shown in the first of them
            for end in range(at + 2, min(at + 5, len(ids) + 1)):
                text = renderer.tokenizer.decode(ids[at:end])
                if INCOMPLETE not in text:
                    pieces[at:end] = [text, *[CONTINUED] * (end - at - 1)]
                    break
    return tuple(
        ShownToken(piece, token, at >= example.prompt_length, token in added)
        for at, (piece, token) in enumerate(zip(pieces, ids, strict=True))
    )


def _length_histogram(rendered: Rendered) -> tuple[tuple[int, int, int, float], ...]:
    lengths, supervised = rendered.lengths, rendered.supervised
    longest = int(lengths.max())
    width = max(1, -(-longest // HISTOGRAM_BINS))
    edges = range(0, longest + width, width)
    bins = []
    for low, high in pairwise(edges):
        inside = (lengths > low) & (lengths <= high)
        tokens = int(lengths[inside].sum(dtype=np.int64))
        share = int(supervised[inside].sum(dtype=np.int64)) / tokens if tokens else 0.0
        bins.append((low + 1, high, int(inside.sum()), share))
    return tuple(bins)


def _notices(rendered: Rendered, renderer: Renderer, config: TrainConfig) -> list[str]:
    lines = []
    stop = renderer.chat_shape.stop_id
    eos = weights.read_json(config.base / "generation_config.json").get("eos_token_id")
    if eos is not None and stop not in (eos if isinstance(eos, list) else [eos]):
        name = renderer.tokenizer.convert_ids_to_tokens(stop)
        lines.append(
            f"the base's generation_config names {eos} as end of turn, "
            f"its chat template writes {stop} ({name}); "
            "the files of the student will name both"
        )
    kinds = rendered.kinds()
    if kinds.thinking:
        lines.append(
            f"{kinds.thinking:,} answers begin with <think>: this reasoning is learned as plain text"
        )
    if kinds.with_reasoning and config.data.reasoning == "drop":
        lines.append(f"reasoning is left out of {kinds.with_reasoning:,} rows ([data] reasoning)")
    if problem := published_template.serving_template(config, renderer)[1]:
        lines.append(problem)
    if kinds.without_end:
        lines.append(
            f"{kinds.without_end:,} answers cut by the token limit are learned without an end of turn"
        )
    return lines
