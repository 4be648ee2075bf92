"""Check the rendered examples and the corpus for fatal faults; count each fault and name its first row."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import TrainConfig
from trainer.data import dataset, published_template
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
        tuple(dataset.answer_of(s, config.data) for s in rows.train),
        tuple(dataset.reasoning_of(s, config.data) for s in rows.train),
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
    checks = [
        *_label_checks(rendered.examples, renderer, vocabulary),
        *_text_checks(rendered, renderer),
        *_prompt_checks(rendered, renderer),
        *_corpus_checks(rendered.rows, learned),
        _token_check(rendered, renderer),
    ]
    rows = rendered.rows.train
    return [c if c.first is None else replace(c, first_prompt=rows[c.first].prompt_id) for c in checks]


def _count(items: Sequence[Any], tests: dict[str, Callable[[Any], bool]]) -> Iterator[Check]:
    for fault, test in tests.items():
        faulty = [number for number, item in enumerate(items) if test(item)]
        yield Check(fault, len(faulty), len(items), faulty[0] if faulty else None)


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
    yield Check(
        "no answer has an end of turn, so the student would not learn to stop",
        count,
        len(examples),
        None if ends else 0,
    )


def _text_checks(rendered: RenderedRows, renderer: Renderer) -> Iterator[Check]:
    """Check that the ids of each answer decode to its text and hold no control or unknown token."""
    tokenizer = renderer.tokenizer
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = tokenizer.unk_token_id
    bodies = []
    for example, answer, thought in zip(rendered.examples, rendered.answers, rendered.thoughts, strict=True):
        tail = len(renderer.chat_shape.end_of_turn) if example.terminated else 0
        ids = example.ids[example.prompt_length : len(example.ids) - tail].tolist()
        if thought and renderer.chat_shape.reasoning:
            before, after = renderer.chat_shape.reasoning
            bodies.append((ids, f"{before}{thought}{after}{answer}", _ids_of(tokenizer, (before, after))))
        else:
            bodies.append((ids, renderer.chat_shape.lead + answer, frozenset()))
    tests: dict[str, Callable[[Any], bool]] = {
        "the teacher's text is not verbatim": lambda b: renderer.decode(b[0]) != b[1],
        "control tokens inside the answer": lambda b: bool(control & set(b[0]) - {unknown} - b[2]),
        "unknown tokens in the answer": lambda b: unknown is not None and unknown in b[0],
    }
    yield from _count(bodies, tests)


def _ids_of(tokenizer: Any, texts: Sequence[str]) -> frozenset[int]:
    return frozenset(i for text in texts if text for i in tokenizer.encode(text, add_special_tokens=False))


def _prompt_checks(rendered: RenderedRows, renderer: Renderer) -> Iterator[Check]:
    """Check that each prompt has all that the teacher was asked, and the ids that a server would send."""
    template, _ = published_template.template_to_publish(renderer, thinking=rendered.keeps_reasoning)
    texts = published_template.served_texts(renderer, template, rendered.conversations)
    prompts = list(zip(rendered.conversations, texts, strict=True))
    fault = "the chat template leaves out text of the prompt"
    yield from _count(prompts, {fault: lambda p: bool(renderer.text_lost(*p))})
    served = published_template.served_prompts(renderer, texts, rendered.conversations)
    # A server can't tell text from control tokens, and a student that was taught to think before some answers
    # only decides so itself: such prompts are compared with our own rendering.
    for number, thought in enumerate(rendered.thoughts):
        if served[number] is None or (rendered.keeps_reasoning and not thought):
            [served[number]] = renderer.prompts([rendered.conversations[number]], [bool(thought)])
    pairs = list(zip(rendered.examples, served, strict=True))
    fault = "the prompt learned is not the prompt served"
    yield from _count(pairs, {fault: lambda p: p[0].ids[: p[0].prompt_length].tolist() != p[1]})


def _corpus_checks(rows: Rows, learned: int) -> Iterator[Check]:
    """Look for leaked held-out prompts, for cut answers, and for too many rows that are too long."""
    held_out = {_normalised(held.conversation.messages) for held in rows.held_out}
    tests: dict[str, Callable[[Any], bool]] = {
        "held-out prompts in another spelling": lambda s: (
            _normalised(conversation_of(s).messages) in held_out
        ),
        "cut by the token limit, but learned as complete": lambda s: (
            s.finish_reason == "length" and s.outcome != "truncated"
        ),
    }
    yield from _count(rows.train, tests)
    too_long = len(rows.train) - learned
    count = too_long if too_long > len(rows.train) * MAX_SHARE_LEFT_OUT else 0
    yield Check("most rows are too long to learn", count, len(rows.train), unit="rows")


def _token_check(rendered: RenderedRows, renderer: Renderer) -> Check:
    """Look for control tokens that the student reads or generates, but whose rows were never trained."""
    read = set(np.unique(np.concatenate([e.ids for e in rendered.examples])).tolist())
    control = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(renderer.tokenizer.all_special_ids)
    generated = set(renderer.chat_shape.end_of_turn) & control
    ids = token_rows.untrained_tokens(rendered.base, read & control, generated)
    tokens = [str(token) for token in renderer.tokenizer.convert_ids_to_tokens(ids)]
    tokens = [token for token in tokens if token not in rendered.trainable_tokens]
    fault = "control tokens whose embedding was never trained"
    if tokens:
        fault += f" ({', '.join(tokens)}: list them in [lora] trainable_tokens, or take a chat model as base)"
    return Check(fault, len(tokens), len(read & control), unit="control tokens")


def _normalised(messages: Sequence[Any]) -> str:
    """Return the text of a prompt with case, white space and Unicode form normalised."""
    text = "\n".join(str(m.get("content") or "") for m in messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
