"""Read everything a training learns from: the corpus, rendered to examples, in the order of the steps."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import TrainConfig, TrainSection
from trainer.data import data_checks, dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.dataset import Rows
from trainer.data.order import Order
from trainer.data.soft_targets import SoftReport
from trainer.data.tokens import builder
from trainer.data.tokens.builder import Progress, no_progress
from trainer.data.tokens.stored_rows import StoredRows
from trainer.data.tokens.token_store import TokenStore
from trainer.model import model, weights
from trainer.publish.adapter import rehearse

# Steps below which the defaults for large corpora hardly change a student.
FEW_STEPS = 30


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """Hold what a training learns from.

    Attributes:
        faults: fatal faults of the data, as lines; what `trainer doctor` finds.
        soft: how much of the teacher's log-probabilities is learned; None without `[train] soft_targets`.
    """

    rows: dataset.Rows | StoredRows
    renderer: Renderer
    dataset: dataset.Dataset
    order: Order
    faults: tuple[str, ...] = ()
    soft: SoftReport | None = None

    def packs(self, step: int) -> list[list[Example]]:
        """Return the examples of each pack of a step (0-based)."""
        return [[self.dataset.examples[number] for number in pack] for pack in self.order.packs(step)]

    def hint(self, train: TrainSection) -> str:
        """Return what to change when the training has a handful of steps only; empty otherwise."""
        steps, tokens = self.order.steps, self.dataset.tokens
        if steps >= FEW_STEPS or train.max_steps is not None:
            return ""
        wanted = max(tokens * train.epochs // 100, train.max_length)
        batch_tokens = 1 << (wanted.bit_length() - 1)
        advice = (
            f"batch_tokens = {batch_tokens} or more epochs"
            if batch_tokens < train.batch_tokens
            else "more epochs"
        )
        made = "1 optimiser step" if steps == 1 else f"{steps} optimiser steps"
        return (
            f"only {made}: an epoch has {tokens:,} tokens, a step takes up to {train.batch_tokens:,}; "
            f"{advice} would make more"
        )

    @property
    def learned_rows(self) -> Rows | StoredRows:
        """The rows that are learned, without those that are too long; the student's documents name them."""
        return self.rows if self.dataset.places is None else self.rows.only(self.dataset.places)

    @property
    def largest_pack(self) -> list[Example]:
        """The pack with the most tokens: the one that decides how much memory is needed."""
        return [self.dataset.examples[number] for number in self.order.largest()]


def read_inputs(
    config: TrainConfig,
    rows: dataset.Rows | TokenStore | None = None,
    on_progress: Progress = no_progress,
    *,
    rehearses: bool = True,
) -> TrainingInputs:
    """Read the corpus (unless `rows` has been read already), render it and look for fatal faults.

    Args:
        on_progress: called while the token store of a large corpus is made.
        rehearses: write what accompanies an adapter once, to a temporary folder, to see that it can be.

    Raises:
        DataError: no corpus, or no row to learn from.
        StudentError: the base is not the one that `[student] sha256` names, or its tokenizer or chat template
            can't be used, or the files that accompany an adapter can't be written.
        TermsRefused: a teacher's terms do not permit training.
    """
    weights.check_base(config.base, config.student.sha256)
    is_stored = rows is None and dataset.is_stored(config)
    if rows is None and not is_stored:
        rows = dataset.read(config)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    if is_stored:
        rows = builder.prepare(config, renderer, on_progress)
    if isinstance(rows, TokenStore):
        return _stored_inputs(config, renderer, rows, rehearses=rehearses)
    assert rows is not None, "read above"
    vocabulary = weights.vocabulary_size(config.base)
    rendered, data = data_checks.render_rows(rows, renderer, config, vocabulary)
    checks = data_checks.run_checks(rendered, renderer, vocabulary=vocabulary, learned=len(data.examples))
    soft = rendered.soft
    faults = (*(str(check) for check in checks if check.count), *(soft.faults if soft else ()))
    if rehearses:
        rehearse(renderer, config, rows, faults)
    order = Order(data.lengths, config.train, weights.query_channels(config.base))
    return TrainingInputs(rows, renderer, data, order, faults, soft)


def _stored_inputs(
    config: TrainConfig, renderer: Renderer, store: TokenStore, *, rehearses: bool
) -> TrainingInputs:
    """Read a large corpus from its token store."""
    dataset.require_embedded(store.highest_id, weights.vocabulary_size(config.base), config)
    tokens = data_checks.token_check(store.control, renderer, config.base, config.lora.trainable_tokens)
    faults = (
        *(str(check) for check in (*store.checks, tokens) if check.count),
        *(store.soft.faults if store.soft else ()),
    )
    if rehearses:
        rehearse(renderer, config, store.rows, faults)
    channels = weights.query_channels(config.base)
    order = Order(store.data.lengths, config.train, channels, kept_in=store.folder)
    return TrainingInputs(store.rows, renderer, store.data, order, faults, store.soft)
