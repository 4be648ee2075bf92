"""Read what a finished student is evaluated with: held-out prompts, and the rows that it learned.

A large corpus is read from its token store: neither rows nor held-out prompts nor their ids are held in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.dataset import Rows
from trainer.data.held_out import HeldOut, held_out_targets
from trainer.data.tokens import builder, corpus_rows
from trainer.data.tokens.builder import Progress, no_progress
from trainer.data.tokens.stored_rows import StoredRows
from trainer.errors import DataError
from trainer.evaluation import on_demand
from trainer.evaluation.learned_texts import LearnedTexts, TextsInMemory, TextsOfCorpus


@dataclass(frozen=True, slots=True)
class EvaluatedRows:
    """Hold what a student is evaluated with.

    Attributes:
        held_out: prompts that it never saw.
        answered: those of them with an answer of the teacher that is whole and not too long.
        targets: these answers as examples, in the order of `answered`.
        taught: returns the tokens of each taught answer, see `taught_lengths`.
        learned: texts of the rows that it learned.
    """

    held_out: Sequence[HeldOut]
    answered: Sequence[HeldOut]
    targets: Sequence[Example]
    taught: Callable[[], Sequence[int]]
    learned: LearnedTexts


def read(config: TrainConfig, renderer: Renderer, on_progress: Progress = no_progress) -> EvaluatedRows:
    """Read the corpus, or its token store where it is large.

    Args:
        on_progress: called while a token store is made, because there is none.

    Raises:
        DataError: no prompt is held out; and what `dataset.read` and `builder.prepare` raise.
    """
    if dataset.is_stored(config):
        return _stored(config, renderer, on_progress)
    rows = dataset.read(config, learns=False)
    _require_held_out(rows.held_out, config)
    pairs = held_out_targets(rows.held_out, renderer, config)
    targets = tuple(example for _, example in pairs)
    return EvaluatedRows(
        rows.held_out,
        tuple(held for held, _ in pairs),
        targets,
        lambda: taught_lengths(targets, rows, renderer, config),
        TextsInMemory(rows.train),
    )


def read_held_out(
    config: TrainConfig, renderer: Renderer, on_progress: Progress = no_progress
) -> Sequence[HeldOut]:
    """Read the held-out prompts alone, which may be none.

    Raises:
        DataError: what `dataset.read` and `builder.prepare` raise.
    """
    if not dataset.is_stored(config):
        return dataset.read(config, learns=False).held_out
    rows = builder.prepare(config, renderer, on_progress).rows
    return corpus_rows.held_out_prompts(config, rows, config.out_path)


def _stored(config: TrainConfig, renderer: Renderer, on_progress: Progress) -> EvaluatedRows:
    rows = builder.prepare(config, renderer, on_progress).rows
    _require_held_out(rows.held_out, config)
    targets = rows.held_out_examples(renderer, config)
    held_out = corpus_rows.held_out_prompts(config, rows, config.out_path)
    return EvaluatedRows(
        held_out,
        on_demand.some(held_out, np.flatnonzero(rows.are_targets(config))),
        targets,
        lambda: _stored_lengths(targets, rows),
        TextsOfCorpus(config, rows),
    )


def _require_held_out(held_out: Sequence[HeldOut], config: TrainConfig) -> None:
    if not held_out:
        raise DataError(
            "no prompt is held out to evaluate with",
            place=str(config.corpus),
            remedy=f"give rows a {config.data.split_field!r} other than 'train', or set [data] eval_share",
        )


def taught_lengths(
    targets: Sequence[Example], rows: Rows, renderer: Renderer, config: TrainConfig
) -> Sequence[int]:
    """Return the tokens of the teacher's held-out answers; without any, those of the learned answers.

    Reasoning and end of turn are included.
    """
    examples = targets or dataset.render_samples(rows.train, renderer, config.data)
    return [example.supervised for example in examples]


def _stored_lengths(targets: Sequence[Example], rows: StoredRows) -> Sequence[int]:
    """Return the same from the records of a token store."""
    if targets:
        return [example.supervised for example in targets]
    gather = rows.reader.gather
    lengths: list[int] = (gather(rows.chosen, "length") - gather(rows.chosen, "prompt_length")).tolist()
    return lengths
