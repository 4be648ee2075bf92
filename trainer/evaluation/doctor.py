"""Check what would be learned before a training: fatal faults, notices, and samples to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.evaluation import data_checks
from trainer.evaluation.data_checks import Check, RenderedRows
from trainer.model import model, weights
from trainer.publish import serving

SAMPLES_SHOWN = 5
MAX_TOKENS_SHOWN = 400  # tokens of a sample on the page; the middle of a longer prompt is left out
HISTOGRAM_BINS = 32
BROKEN, REST = "\N{REPLACEMENT CHARACTER}", "◂"


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token as text. control: it belongs to template or tokenizer, not to anybody's words."""

    text: str
    id: int
    supervised: bool
    control: bool


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A sample cut into tokens, and why it was picked."""

    prompt_id: str
    why: str
    is_faulty: bool
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Findings are fatal; an empty list is a clean bill.

    Attributes:
        notices: what is worth knowing and stops nothing.
        lengths: lower edge, upper edge, examples, supervised share: bins of the tokens of an example.
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


def diagnose(config: TrainConfig) -> Diagnosis:
    """Render the corpus and check every label.

    Raises:
        DataError, StudentError: there is nothing to look at.
    """
    rows = dataset.read(config)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    data = dataset.render(rows, renderer, config)
    seen = data_checks.render_rows(rows, renderer, config)
    vocabulary = weights.vocabulary_size(config.base)
    found = data_checks.run_checks(seen, renderer, vocabulary=vocabulary, learned=len(data.examples))
    return Diagnosis(
        findings=tuple(str(check) for check in found if check.count),
        notices=tuple(_notices(seen, renderer, config)),
        checks=tuple(found),
        shown=tuple(_pick_samples(seen, found, renderer)),
        examples=len(data.examples),
        held_out=len(rows.held_out),
        tokens=sum(len(e.ids) for e in data.examples),
        supervised=sum(e.supervised for e in data.examples),
        excluded=dict(data.excluded),
        lengths=_length_histogram(seen),
    )


def write_page(found: Diagnosis, config: TrainConfig, path: Path) -> Path:
    """The diagnosis as one HTML file without remote assets or scripts; returns its path."""
    environment = Environment(
        loader=PackageLoader("trainer.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("doctor.html.j2").render(
        found=found,
        config=config,
        highest=max((count for _, _, count, _ in found.lengths), default=1),
        samples=[(shown, _shortened(shown.tokens)) for shown in found.shown],
        visible=printable,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def printable(text: str) -> str:
    """A token's text with its white space and control characters to be seen."""
    plain = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain) or "∅"


def _shortened(tokens: Sequence[ShownToken]) -> tuple[Sequence[ShownToken], int, Sequence[ShownToken]]:
    """Head, tokens left out, tail; the tail reaches back over the border between prompt and answer."""
    if len(tokens) <= MAX_TOKENS_SHOWN:
        return tokens, 0, ()
    border = next((i for i, token in enumerate(tokens) if token.supervised), len(tokens))
    head = MAX_TOKENS_SHOWN // 4
    begin = max(head, min(border - head, len(tokens) - head))
    return tokens[:head], begin - head, tokens[begin : begin + MAX_TOKENS_SHOWN - head]


def _pick_samples(seen: RenderedRows, found: Sequence[Check], renderer: Renderer) -> list[ShownSample]:
    """The first row of every fault; then the shortest, the longest and some between."""
    by_length = sorted(range(len(seen.examples)), key=lambda i: len(seen.examples[i].ids))
    why: dict[int, str] = {}
    for check in found:
        if check.first is not None and check.first not in why:
            why[check.first] = check.fault
    faulty = len(why)
    names = ("shortest", "a quarter is shorter", "median", "three quarters are shorter", "longest")
    for place, name in enumerate(names):
        if len(why) < faulty + SAMPLES_SHOWN:
            why.setdefault(by_length[(len(by_length) - 1) * place // (SAMPLES_SHOWN - 1)], name)
    for number in by_length:
        if len(why) >= SAMPLES_SHOWN:
            break
        why.setdefault(number, "")
    return [
        ShownSample(
            seen.rows.train[number].prompt_id, said, at < faulty, _tokens(seen.examples[number], renderer)
        )
        for at, (number, said) in enumerate(why.items())
    ]


def _tokens(example: Any, renderer: Renderer) -> tuple[ShownToken, ...]:
    added = set(renderer.tokenizer.added_tokens_decoder)
    ids = example.ids.tolist()
    pieces = renderer.tokenizer.batch_decode([[token] for token in ids])
    for at, piece in enumerate(pieces):
        if piece.endswith(BROKEN):  # a character of several tokens is shown in the first of them
            for end in range(at + 2, min(at + 5, len(ids) + 1)):
                whole = renderer.tokenizer.decode(ids[at:end])
                if BROKEN not in whole:
                    pieces[at:end] = [whole, *[REST] * (end - at - 1)]
                    break
    return tuple(
        ShownToken(piece, token, at >= example.prompt_length, token in added)
        for at, (piece, token) in enumerate(zip(pieces, ids, strict=True))
    )


def _length_histogram(seen: RenderedRows) -> tuple[tuple[int, int, int, float], ...]:
    longest = max(len(e.ids) for e in seen.examples)
    width = max(1, -(-longest // HISTOGRAM_BINS))
    edges = range(0, longest + width, width)
    bins = []
    for low, high in pairwise(edges):
        inside = [e for e in seen.examples if low < len(e.ids) <= high]
        tokens = sum(len(e.ids) for e in inside)
        share = sum(e.supervised for e in inside) / tokens if tokens else 0.0
        bins.append((low + 1, high, len(inside), share))
    return tuple(bins)


def _notices(seen: RenderedRows, renderer: Renderer, config: TrainConfig) -> list[str]:
    said = []
    stop = renderer.chat_shape.stop_id
    told = weights.read_json(config.base / "generation_config.json").get("eos_token_id")
    if told is not None and stop not in (told if isinstance(told, list) else [told]):
        name = renderer.tokenizer.convert_ids_to_tokens(stop)
        said.append(
            f"the base's generation_config ends at token {told}, its chat template at {stop} ({name}); "
            "what is written here says the latter"
        )
    thinking = sum(
        s.completion is not None and s.completion.lstrip().startswith("<think>") for s in seen.rows.train
    )
    if thinking:
        said.append(f"reasoning inside the answer: {thinking:,} begin with <think> and are learned as text")
    dropped = sum(bool(s.reasoning) for s in seen.rows.train) if config.data.reasoning == "drop" else 0
    if dropped:
        said.append(f"reasoning is left out of {dropped:,} rows ([data] reasoning)")
    if odd := serving.serving_template(config, renderer)[1]:
        said.append(odd)
    unended = sum(not e.terminated for e in seen.examples)
    if unended:
        said.append(f"answers cut by the token limit, learned without an end: {unended:,}")
    return said
