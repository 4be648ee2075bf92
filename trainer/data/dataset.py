"""Read a corpus, split it by prompt, and render the training examples. Loads no torch.

A prompt is identified by its content, so the same text under two ids is never both learned and held out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.api.types import OF_TEXTS, Outcome
from harvester.export.cards.curation import decontaminated_share
from harvester.quality.held_out import prompt_key
from harvester.quality.verifiers.verifiers import Verifiers
from harvester.store.mixing import COLUMNS as MIXING_COLUMNS
from harvester.store.mixing import Mixing
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from harvester.store.where import REMEDY as WHERE_REMEDY
from harvester.store.where import Where
from harvester.terms.lineage import FACT_COLUMNS, Lineage
from trainer.config import DataSection, TrainConfig
from trainer.data import answers, shared_questions, soft_targets
from trainer.data.chat_template import Example, Renderer
from trainer.data.conversation import (
    conversation_of,
    request_beyond_columns,
    why_not_restored,
)
from trainer.data.held_out import HeldOut, held_out_examples, prompts_of_samples
from trainer.data.row_rules import (
    answer_of,
    exclusion_reason,
    longest_row,
    reasoning_of,
    split_of,
    teacher_text,
)
from trainer.data.soft_targets import SoftReport
from trainer.data.split_names import UnknownSplits
from trainer.data.teacher_tokens import TeacherSignal, read_signal
from trainer.errors import DataError, StudentError
from trainer.model import weights
from trainer.provenance import fingerprint, terms_check
from trainer.provenance.fingerprint import Leaf

# Columns that are kept in memory.
COLUMNS = [
    *("key", "prompt_id", "sample_index", "messages", "completion", "reasoning", "outcome", "finish_reason"),
    *("reference", "tags", "metadata_json", "purpose", "terms_id", "teacher_id", "mock", "run_id"),
]

# The same and the request, of which what `messages` lacks is kept.
COLUMNS_AND_REQUEST = (*COLUMNS, "request_json")

# Rows from which a corpus has a token store. Fewer are rendered anew by each command, in some seconds.
STORED_ROWS = 10_000

# Columns that log-probabilities are read from.
LOGPROB_COLUMNS = ("key", "logprobs", "request_json")

# Columns that are read for the hash of a row's origin only, with the value that replaces them afterwards.
_CLEARED_COLUMNS: dict[str, Any] = {
    name: ""
    for name in fingerprint.ORIGIN_COLUMNS
    if name not in COLUMNS and name not in {"created_at", "mock"}
}


@dataclass(frozen=True, slots=True)
class Rows:
    """The corpus split into samples to learn and held-out prompts, before anything is tokenised.

    Attributes:
        train: samples to learn from.
        held_out: prompts for evaluation, in order of prompt id.
        excluded: number of samples in neither part, by reason.
        lineages: teachers of the rows, and the terms they were asked under.
        origins: hash of each row's origin, by key (`fingerprint.origin_sha256`).
        weights: of the samples of `train` in the loss; empty: all count alike.
        signal: log-probabilities of the samples of `train`; None: they were not read.
        mixed: what may be other than it was meant, a line each: settings in which the rows differ, splits of
            unusual names, and rows that repeat held-out prompts or may do so.
    """

    train: tuple[Sample, ...]
    held_out: tuple[HeldOut, ...]
    excluded: Mapping[str, int]
    lineages: tuple[Lineage, ...]
    origins: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    signal: TeacherSignal | None = None
    mixed: tuple[str, ...] = ()

    @property
    def learned(self) -> int:
        """Number of the samples to learn, those too long included."""
        return len(self.train)

    def leaves(self) -> Iterator[Leaf]:
        """Yield the leaves of the samples to learn, in the order of the hash tree."""
        yield from fingerprint.sorted_leaves(self.train, self.origins)

    def teachers(self) -> Mapping[tuple[str, str, bool], int]:
        """Return the number of samples by teacher, terms record and whether the teacher is a mock."""
        return Counter((s.teacher_id, s.terms_id, s.mock) for s in self.train)

    def first(self, count: int) -> Rows:
        """Return the first samples only."""
        return replace(self, train=self.train[:count])

    def only(self, places: npt.NDArray[np.int32]) -> Rows:
        """Return the samples at some places only."""
        weights = tuple(self.weights[place] for place in places) if self.weights else ()
        return replace(self, train=tuple(self.train[place] for place in places), weights=weights)

    @property
    def answered(self) -> Sequence[HeldOut]:
        """Held-out prompts to which the teacher has a usable answer."""
        return [held for held in self.held_out if held.teacher is not None]

    def held_out_examples(self, renderer: Renderer, config: TrainConfig) -> Sequence[Example]:
        """Render the teacher's held-out answers, those that are not too long."""
        return held_out_examples(self.held_out, renderer, config)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rendered training examples.

    Attributes:
        lengths: [examples] int32, tokens that each example feeds to the model: its last id is a target only.
        supervised: supervised tokens of all examples.
        excluded: number of samples that are not learned, by reason.
        sha256: hash of ids, prompt lengths, weights, soft targets and order; a training resumes only if it is
            unchanged.
        places: of the examples among the rows to learn; None: all of these are learned.
    """

    examples: Sequence[Example]
    lengths: npt.NDArray[np.int32]
    supervised: int
    excluded: Mapping[str, int]
    sha256: str
    places: npt.NDArray[np.int32] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that all examples feed to the model."""
        return int(self.lengths.sum(dtype=np.int64))


def context_notes(lengths: npt.NDArray[np.int32], config: TrainConfig) -> list[str]:
    """Say which rows are longer than what the base was made for, and which it can't read at all.

    Args:
        lengths: tokens that each learned example feeds to the model.
    """
    most = longest_row(config)
    if most < config.train.max_length:
        return [
            f"rows of more than {most:,} tokens are left out: the base has no positions for more, whatever "
            f"[train] max_length says ({config.train.max_length:,})"
        ]
    context = weights.context_length(config.base)
    longer = int((lengths > context).sum()) if context else 0
    if not longer:
        return []
    return [
        f"{longer:,} of {len(lengths):,} rows have more tokens than the {context:,} that the base was made "
        f"for (max_position_embeddings): [train] max_length = {context} leaves them out"
    ]


def is_stored(config: TrainConfig) -> bool:
    """Whether a corpus is so large that it has a token store (`trainer.data.tokens`).

    Raises:
        DataError: there is no corpus. StoreError: it can't be read.
    """
    require_folder(config)
    return Corpus.open(config.corpus).count() >= STORED_ROWS


def require_folder(config: TrainConfig) -> None:
    """Refuse a corpus whose folder is absent.

    Raises:
        DataError: names the folder.
    """
    if not config.corpus.is_dir():
        raise DataError(
            "is a file, and a corpus is a folder"
            if config.corpus.exists()
            else "there is no corpus: no such folder",
            place=str(config.corpus),
            remedy="harvest first, or set [data] corpus",
        )


def read(config: TrainConfig, only: Collection[str] | None = None, *, learns: bool = True) -> Rows:
    """Read the corpus and split it by prompt. Loads no torch.

    Args:
        only: keys of the rows of the training split to take; None for all. Held-out prompts are all taken.
        learns: also read the log-probabilities, where `[train] soft_targets` asks for them.

    Raises:
        DataError: no corpus, an empty one, or no row to learn from.
        TermsRefused: see `terms_check.require_permission`.
        StoreError, StoreCorrupt: a shard is missing or damaged; its name is in the error.
    """
    require_folder(config)
    corpus = Corpus.open(config.corpus)
    origins: dict[str, str] = {}
    excluded: Counter[str] = Counter()
    mixing, unknown = Mixing(config.corpus), UnknownSplits(config.data.split_field)
    entries: list[tuple[Sample, str, str]] = []
    are_any = False
    for sample in _read_samples(corpus, config, origins, excluded, mixing):
        are_any = True
        unknown.add(sample)
        key = prompt_key(sample.messages)
        split = split_of(sample, key, config.data)
        if only is not None and split == "train" and sample.key not in only:
            origins.pop(sample.key, None)  # a small part of a large corpus takes little memory
        else:
            entries.append((sample, key, split))
    if not are_any:
        raise nothing_chosen(config, excluded.total())
    entries.sort(key=lambda entry: (entry[0].prompt_id, entry[0].sample_index, entry[0].key))
    lineages = tuple(corpus.lineages())
    terms_check.require_permission(config, lineages, corpus.distinct(FACT_COLUMNS))
    samples, splits = [sample for sample, _, _ in entries], [split for _, _, split in entries]
    held_out_keys = {key for _, key, split in entries if split != "train"}
    train: list[Sample] = []
    train_prompts: list[str] = []
    learned_keys: set[str] = set()
    for sample, key, split in entries:
        if split != "train":
            if why_not := why_not_restored(sample):
                excluded[why_not] += 1
            continue
        reason = exclusion_reason(sample, config.data) or ("leaked" if key in held_out_keys else "")
        reason = reason or ("shared answer" if sample.key in learned_keys else "")
        if reason:
            excluded[reason] += 1
            continue
        learned_keys.add(sample.key)
        train.append(sample)
        train_prompts.append(key)
    verifiers = Verifiers(config.verify, config.root)
    verifiers.require_functions()
    chosen = answers.choose(train, train_prompts, config.data, verifiers)
    excluded.update(chosen.excluded)
    if not chosen.samples:
        raise nothing_to_learn(config, excluded)
    held_out = prompts_of_samples(samples, splits, config.data)
    signal = None
    if learns and config.train.soft_targets == "auto":
        signal = read_signal(corpus.batches(LOGPROB_COLUMNS), {sample.key for sample in chosen.samples})
    repeated = shared_questions.count(
        (conversation_of(sample).messages for sample in chosen.samples),
        [held.conversation.messages for held in held_out],
    )
    mixed = (
        *mixing.notes(),
        *unknown.notes(),
        *shared_questions.notes(repeated, len(chosen.samples)),
        *beyond_decontamination(config),
    )
    return Rows(chosen.samples, held_out, +excluded, lineages, origins, chosen.weights, signal, mixed)


def paid_samples(config: TrainConfig, columns: Sequence[str]) -> Iterator[Sample]:
    """Yield the answers of the corpus that were asked as `[data] where` says, of every split.

    An answer that it leaves out for its outcome, or for the model or provider that gave it, is one of them:
    it was paid for as the others were, and so will be further ones.

    Args:
        columns: that are needed; those of the condition are read, too.

    Raises:
        StoreError, StoreCorrupt: a shard is missing or damaged.
    """
    where = None
    if config.data.where:
        where = Where.parse(config.data.where).of_requests().bind(config.corpus)
    wanted = dict.fromkeys(("outcome", *columns, *(where.columns if where else ())))
    for sample in Corpus.open(config.corpus).samples(list(wanted)):
        if sample.outcome not in OF_TEXTS and (where is None or where.matches(sample)):
            yield sample


def beyond_decontamination(config: TrainConfig) -> Iterator[str]:
    """Say that more prompts are held out than those against which the corpus was decontaminated."""
    share, drawn = decontaminated_share(config.corpus), config.data.eval_share
    if share is not None and drawn > share:
        yield (
            f"the corpus was decontaminated against {share:.0%} of the prompts, which a draw holds out, and "
            f"[data] eval_share holds out {drawn:.0%}: rows may repeat held-out prompts; set [decontaminate] "
            f"eval_share = {drawn:g} in curate.toml and curate again"
        )


def nothing_chosen(config: TrainConfig, left_out: int) -> DataError:
    """Return the error of a corpus without rows.

    Args:
        left_out: rows that `[data] where` doesn't choose.
    """
    if left_out:
        return DataError(
            f"[data] where chooses none of {left_out:,} rows", place=str(config.corpus), remedy=WHERE_REMEDY
        )
    return DataError(
        "the corpus is empty", place=str(config.corpus), remedy="`harvester run harvest.toml` fills it"
    )


def nothing_to_learn(config: TrainConfig, excluded: Mapping[str, int]) -> DataError:
    """Return the error of a corpus of which no row can be learned."""
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(excluded.items()) if n)
    return DataError(
        f"no row can be learned: {counts or 'all rows are held out'}",
        place=str(config.corpus),
        remedy=f"rows need a completion and {config.data.split_field!r} = 'train' (or none)",
    )


def nothing_fits(config: TrainConfig) -> DataError:
    """Return the error of rows of which none has a token to learn, or all are too long."""
    most = longest_row(config)
    return DataError(
        f"no row can be learned: all have more than {most} tokens, or none to learn",
        place=str(config.corpus),
        remedy="raise [train] max_length"
        if most == config.train.max_length
        else "take a base that reads longer rows: this one has no positions for more",
    )


def _read_samples(
    corpus: Corpus, config: TrainConfig, origins: dict[str, str], excluded: Counter[str], mixing: Mixing
) -> Iterator[Sample]:
    """Yield the answers that `[data] where` chooses, and clear the columns that are not needed afterwards.

    Args:
        origins: gets the hash of each one's origin. excluded: counts those that are not chosen. mixing:
            counts the settings of the chosen ones.
    """
    data, store = config.data, config.corpus
    where = Where.parse(data.where).bind(store) if data.where else None
    wanted = (*COLUMNS, *fingerprint.ORIGIN_COLUMNS, *MIXING_COLUMNS, *(where.columns if where else ()))
    for sample in corpus.samples(list(dict.fromkeys(wanted))):
        if sample.outcome in OF_TEXTS:
            continue
        if where is not None and not where.matches(sample):
            excluded["not chosen by where"] += 1
            continue
        origins[sample.key] = fingerprint.origin_sha256(sample)
        mixing.add(sample)
        yield replace(sample, **{**_CLEARED_COLUMNS, "request_json": request_beyond_columns(sample)})


def render(rows: Rows, renderer: Renderer, config: TrainConfig, vocabulary: int = 0) -> Dataset:
    """Render the samples to learn.

    Args:
        vocabulary: rows of the student's embedding; 0: ids are not checked.

    Raises:
        DataError, StudentError: see `select`.
    """
    examples, _ = with_soft_targets(rows, render_samples(rows.train, renderer, config.data), renderer, config)
    return select(rows, examples, config, vocabulary)


def with_soft_targets(
    rows: Rows, examples: Sequence[Example], renderer: Renderer, config: TrainConfig
) -> tuple[Sequence[Example], SoftReport | None]:
    """Add the teacher's log-probabilities to examples that are short enough to be learned.

    Args:
        examples: of all rows to learn, in their order.

    Returns:
        The examples, and the coverage; None without `[train] soft_targets`.
    """
    if rows.signal is None:
        return examples, None
    most = longest_row(config)
    keys = [
        "" if _unlearnable(example, most) else sample.key
        for sample, example in zip(rows.train, examples, strict=True)
    ]
    answers = [teacher_text(sample, config.data) for sample in rows.train]
    return soft_targets.attach(examples, keys, answers, rows.signal, renderer)


def select(rows: Rows, examples: Sequence[Example], config: TrainConfig, vocabulary: int = 0) -> Dataset:
    """Select the examples that are learned, and count the others by reason.

    Args:
        examples: from `render_samples`.
        vocabulary: rows of the student's embedding; 0: ids are not checked.

    Raises:
        DataError: every row is too long or has no token to learn.
        StudentError: the tokenizer produces ids that the student has no embedding for.
    """
    most = longest_row(config)
    reasons = [_unlearnable(e, most) for e in examples]
    if rows.weights:
        weights = rows.weights
        if config.data.weights == "prompt":
            prompts = ["" if r else prompt_key(s.messages) for s, r in zip(rows.train, reasons, strict=True)]
            weights = answers.shared_by_prompt(prompts)
        examples = [replace(e, weight=w) for e, w in zip(examples, weights, strict=True)]
    fitting = tuple(e for e, reason in zip(examples, reasons, strict=True) if not reason)
    excluded = Counter(rows.excluded) + Counter(reason for reason in reasons if reason)
    if not fitting:
        raise nothing_fits(config)
    require_embedded(max(int(e.ids.max()) for e in fitting), vocabulary, config)
    digest = hashlib.sha256()
    for example in fitting:
        hash_example(digest, example)
    lengths = np.array([len(example.ids) - 1 for example in fitting], dtype=np.int32)
    supervised = sum(example.supervised for example in fitting)
    places = None
    if any(reasons):
        places = np.array([place for place, reason in enumerate(reasons) if not reason], dtype=np.int32)
    return Dataset(fitting, lengths, supervised, excluded, digest.hexdigest(), places)


def require_embedded(highest: int, vocabulary: int, config: TrainConfig) -> None:
    """Refuse token ids that the student has no embedding for.

    Args:
        highest: largest id. vocabulary: rows of the student's embedding; 0: unknown.

    Raises:
        StudentError: names both.
    """
    if vocabulary and highest >= vocabulary:
        raise StudentError(
            f"the tokenizer produces id {highest}, but the student embeds ids below {vocabulary} only",
            place=str(config.base),
            remedy="use the tokenizer that belongs to these weights",
        )


def hash_example(digest: hashlib._Hash, example: Example) -> None:
    """Add one example to the hash of a dataset."""
    digest.update(f"{len(example.ids)} {example.prompt_length} ".encode())
    digest.update(example.ids.tobytes())
    if example.weight != 1.0:  # rows that count alike keep the hash of earlier versions
        digest.update(f" weight {example.weight!r} ".encode())
    if (soft := example.soft) is not None:
        digest.update(f" soft {soft.ids.shape} ".encode())
        for array in (soft.positions, soft.ids, soft.log_probs):
            digest.update(array.tobytes())


def render_samples(samples: Sequence[Sample], renderer: Renderer, data: DataSection) -> list[Example]:
    """Render samples, each with all that the teacher was asked.

    Raises:
        StudentError: the chat template refuses a row; the message counts such rows and names the first.
    """
    columns = (
        [conversation_of(s) for s in samples],
        [answer_of(s, data) for s in samples],
        [s.outcome != Outcome.TRUNCATED for s in samples],
        [reasoning_of(s, data) for s in samples],
    )
    try:
        return renderer.examples(*columns)
    except StudentError as error:
        refused = [
            sample.prompt_id
            for sample, conversation in zip(samples, columns[0], strict=True)
            if not renderer.accepts(conversation)
        ]
        if not refused:
            raise
        message = f"{error.message}: {len(refused):,} of {len(samples):,} rows, the first is {refused[0]!r}"
        raise StudentError(message, place=error.place, remedy=error.remedy) from None


def _unlearnable(example: Example, max_length: int) -> str:
    # A long example is not cut: a cut answer would teach to stop in the middle.
    if len(example.ids) > max_length:
        return "too long"
    return "" if example.supervised > 0 and example.prompt_length > 0 else "nothing supervised"
