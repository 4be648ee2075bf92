"""Generate answers in batches: greedy ones, or samples that do not depend on their batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trainer.errors import OutOfMemory
from trainer.model import rotary
from trainer.model.continuous_batch import ContinuousBatch, padded
from trainer.model.generation_mode import GenerationMode, cannot_generate, choose_mode
from trainer.model.loading import kind_and_first_line
from trainer.model.out_of_memory import is_out_of_memory
from trainer.model.structure import base_model_of

# Rows join and leave when one of so many places is free or has ended. Each time costs a forward of the new
# prompts and a copy of the cache, about as much as a token of the whole batch.
REFILL_SHARE = 8
# Factor between the lengths of prompts that count as about the same: they are padded to the longest one.
SIMILAR_LENGTHS = 1.25
_SHARED_IDS: dict[int, int] = {}


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold one generated answer.

    Attributes:
        ids: its token ids, without the end of turn.
        is_cut: whether it has no end of turn: it reached the token limit, or a token of `Limits.cuts`.
    """

    ids: tuple[int, ...]
    is_cut: bool


class SeededNoise(LogitsProcessor):  # type: ignore[misc]
    """Add Gumbel noise to logits, so that their argmax is a sample at temperature 1 (Gumbel-max trick).

    Each row has a generator of its own on the host, so a sample depends neither on its batch nor on the
    device's random numbers.

    Args:
        seeds: one for each row of the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._draws = [generator_of(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next tokens, [rows, vocabulary], with noise."""
        return with_noise(scores, self._draws)


class KnownTokens(LogitsProcessor):  # type: ignore[misc]
    """Let no token be chosen that the tokenizer doesn't have.

    Args:
        count: tokens that it has.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next tokens, [rows, vocabulary], -inf for those it doesn't have."""
        return of_known_tokens(scores, self._count)


def of_known_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return logits [rows, vocabulary] with -inf from token `count` on; as they are where it is 0."""
    if not 0 < count < scores.shape[1]:
        return scores
    return torch.cat([scores[:, :count], torch.full_like(scores[:, count:], -torch.inf)], dim=1)


def generator_of(seed: int) -> torch.Generator:
    """Return the random numbers of one sample."""
    return torch.Generator().manual_seed(seed)


def with_noise(scores: torch.Tensor, draws: Sequence[torch.Generator]) -> torch.Tensor:
    """Return logits [rows, vocabulary] with Gumbel noise from each row's generator."""
    noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=draw) for draw in draws])
    return scores.float() - noise.log().to(scores.device)


@dataclass(frozen=True, slots=True)
class Limits:
    """Configure how answers end and are batched.

    Attributes:
        stop_id: the token that ends an answer.
        max_new_tokens: tokens after which an answer is cut.
        batch: prompts answered together.
        pad_id: the token to pad with; None: `stop_id`.
        expected: a length for each prompt that its answer may have, in any unit: of prompts of about the same
            length, those with longer answers begin first, so that few answers are left alone at the end.
            Empty: unknown.
        positions: tokens that the student can read, prompt and answer together; an answer that reaches them
            is cut. 0: no limit.
        other_stops: further tokens that end an answer.
        cuts: tokens after which an answer is cut: they belong to it.
        tokens: that the tokenizer has; no other one is chosen. Many bases embed some more. 0: any is.
    """

    stop_id: int
    max_new_tokens: int
    batch: int
    pad_id: int | None = None
    expected: Sequence[int] = ()
    positions: int = 0
    other_stops: Sequence[int] = ()
    cuts: Sequence[int] = ()
    tokens: int = 0

    @property
    def last(self) -> tuple[int, ...]:
        """All tokens after which nothing more is generated."""
        return (self.stop_id, *self.other_stops, *self.cuts)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    seeds: Sequence[int] | None = None,
    on_done: Callable[[int], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Answer prompts greedily or with samples. The base's own generation_config has no influence.

    Prompts are batched by length and padded on the left, so that all answers of a batch have their next token
    in the same column. Where an answer ends, the next prompt takes its place (`continuous_batch`). A class
    whose cache can't be cut by rows gets batches that end with their last answer, and one that can't be
    padded gets batches of equal length (see `generation_mode`). When memory runs out, the batch is halved and
    its answers begin anew. Prompts whose answers may pass the tokens that the student can read, or a length
    from which on its rotary embedding is another one for all rows together, are answered alone.

    Args:
        prompts: token ids of each prompt.
        seeds: of a sample at temperature 1 for each prompt; None: answer greedily.
        on_done: called with the number of prompts answered so far.
        on_note: called with lines for the operator: a batch that was halved, a class with a slower way.

    Returns:
        One answer for each prompt, in the order of the prompts.

    Raises:
        OutOfMemory: a single prompt does not fit.
        StudentError: the model's class can't generate, or computes other logits while it does.
    """
    if not prompts:
        return []
    work = _Work(prompts, limits, seeds, on_done, on_note)
    with _own_generation_config_ignored(model), torch.inference_mode():
        mode = choose_mode(model)
        if mode.note:
            on_note(mode.note)
        work.alone = _numbers_alone(model, work)
        if mode.refills:
            _answer_refilling(model, work)
        else:
            _answer_in_batches(model, work, mode)
        _answer_alone(model, work, mode)
    return [work.answers[i] for i in range(len(prompts))]


@dataclass(slots=True)
class _Work:
    """Hold prompts, how they are answered, and the answers so far by the number of their prompt.

    Attributes:
        alone: numbers of the prompts that are answered one by one.
    """

    prompts: Sequence[Sequence[int]]
    limits: Limits
    seeds: Sequence[int] | None
    on_done: Callable[[int], None]
    on_note: Callable[[str], None]
    answers: dict[int, Answer] = field(default_factory=dict)
    alone: Collection[int] = ()

    @property
    def together(self) -> list[int]:
        """Numbers of the prompts that are answered in batches."""
        return [number for number in range(len(self.prompts)) if number not in self.alone]

    @property
    def pad_id(self) -> int:
        return self.limits.stop_id if self.limits.pad_id is None else self.limits.pad_id

    def processors(self, numbers: Sequence[int]) -> list[LogitsProcessor]:
        """Return what changes the logits of the next tokens of some prompts."""
        made: list[LogitsProcessor] = []
        if self.seeds is not None:
            made.append(SeededNoise([self.seeds[number] for number in numbers]))
        if self.limits.tokens:
            made.append(KnownTokens(self.limits.tokens))
        return made

    def halved(self, numbers: Sequence[int], rows: int) -> int:
        """Return how many prompts are answered together after memory ran out.

        Args:
            numbers: of the prompts that were being answered.
            rows: their rows, and those of answers that had ended.

        Raises:
            OutOfMemory: it was one row alone.
        """
        if rows == 1:
            length, most = len(self.prompts[numbers[0]]), self.limits.max_new_tokens
            raise OutOfMemory(
                f"not enough memory to answer one prompt of {length:,} tokens with up to {most:,} new ones",
                remedy="lower [evaluate] max_new_tokens, or use a device with more memory",
            )
        batch = rows // 2
        self.on_note(f"memory ran out: now {batch:,} prompts are answered together")
        return batch

    def in_order(self) -> list[int]:
        """Return the numbers of the prompts in the order in which answers that are refilled begin."""
        lengths, expected = [len(prompt) for prompt in self.prompts], self.limits.expected
        if not expected:
            return sorted(self.together, key=lambda i: lengths[i])
        step = math.log(SIMILAR_LENGTHS)
        return sorted(self.together, key=lambda i: (math.log(lengths[i] + 1) // step, -expected[i]))


def _numbers_alone(model: Any, work: _Work) -> set[int]:
    """Return the numbers of the prompts that no other prompt may be answered with, and say why."""
    limits = work.limits
    border = rotary.border_of(base_model_of(model))
    ends = {number: len(prompt) + limits.max_new_tokens for number, prompt in enumerate(work.prompts)}
    too_long = {number for number, end in ends.items() if limits.positions and end > limits.positions}
    if too_long:
        work.on_note(
            f"{len(too_long):,} of {len(ends):,} answers are cut where prompt and answer reach the "
            f"{limits.positions:,} tokens that this student can read"
        )
    beyond = {number for number, end in ends.items() if border is not None and end > border.tokens}
    if beyond and border is not None:
        work.on_note(
            f"{len(beyond):,} of {len(ends):,} prompts are answered alone: in rows of more than "
            f"{border.tokens:,} tokens this student's rotary embedding is another one"
        )
    return too_long | beyond


def _answer_alone(model: Any, work: _Work, mode: GenerationMode) -> None:
    """Answer prompts one by one, each up to the tokens that the student can read."""
    for number in sorted(work.alone):
        prompt, most = work.prompts[number], work.limits.max_new_tokens
        if work.limits.positions:
            most = min(most, work.limits.positions - len(prompt))
        if most <= 0:
            work.answers[number] = Answer((), is_cut=True)
        else:
            rows = _generate_batch(model, [prompt], _settings(work, mode, most), work.processors([number]))
            if rows is None:
                work.halved([number], 1)  # refuses: a single prompt does not fit
            else:
                work.answers[number] = _answer(rows[0], work.limits)
        work.on_done(len(work.answers))


def _answer_refilling(model: Any, work: _Work) -> None:
    """Answer all prompts in one batch that rows leave and join."""
    waiting = deque(work.in_order())
    rows = _Rows(model, work)
    capacity = work.limits.batch
    while waiting or rows.unfinished:
        room = capacity - len(rows.unfinished)
        joining: list[int] = []
        if room * REFILL_SHARE >= capacity:
            joining = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        done = len(work.answers)
        if not rows.advance(joining):
            again = [*rows.unfinished, *(i for i in joining if i not in rows.numbers)]
            capacity = work.halved(again, len({*rows.numbers, *joining}))
            waiting.extendleft(reversed(again))
            rows.clear()
        if len(work.answers) > done:
            work.on_done(len(work.answers))


class _Rows:
    """Holds the answers in progress, a row of the batch each, and those that ended in it.

    Attributes:
        numbers: of the prompt that each row answers.
    """

    def __init__(self, model: Any, work: _Work) -> None:
        self._work = work
        self._batch = ContinuousBatch(model, work.pad_id)
        self._tokens: list[list[int]] = []
        self._draws: list[torch.Generator] = []
        # Tokens that each row has got since it joined; those after the end of its answer count.
        self._ages: list[int] = []
        self._newest = torch.zeros(0, dtype=torch.int64, device=self._batch.device)
        self.numbers: list[int] = []

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the prompts whose answers are not complete."""
        return [number for number in self.numbers if number not in self._work.answers]

    def advance(self, joining: Sequence[int]) -> bool:
        """Add a token to each answer, or begin further ones; return False when memory ran out.

        Args:
            joining: numbers of the prompts whose answers begin; rows that have ended make room.

        Raises:
            StudentError: the model's class can't generate.
        """
        try:
            unfinished = self.unfinished
            ended = len(self.numbers) - len(unfinished)
            # A row that goes on beyond its limit would leave the positions that a model has learned.
            is_at_limit = self._work.limits.max_new_tokens in self._ages
            if joining or is_at_limit or ended * REFILL_SHARE >= len(self.numbers):
                self._keep(unfinished)
            if joining:
                self._admit(joining)
            elif unfinished:  # what follows the end of an answer in its row is dropped
                self._newest = self._chosen(self._batch.step(self._newest), 0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise cannot_generate(kind_and_first_line(error, 200)) from error
        else:
            return True
        return False  # only here the traceback, and with it the tensors of the failed call, has been released

    def _admit(self, numbers: Sequence[int]) -> None:
        logits = self._batch.admit([self._work.prompts[number] for number in numbers])
        first = len(self.numbers)
        self.numbers += numbers
        self._tokens += [[] for _ in numbers]
        self._ages += [0] * len(numbers)
        if self._work.seeds is not None:
            self._draws += [generator_of(self._work.seeds[number]) for number in numbers]
        self._newest = torch.cat([self._newest, self._chosen(logits, first)])

    def _keep(self, numbers: Sequence[int]) -> None:
        """Let all rows but those of some prompts leave."""
        if len(numbers) == len(self.numbers):
            return
        kept = [self.numbers.index(number) for number in numbers]
        self._batch.keep(kept)
        self._newest = self._newest[kept]
        self.numbers = list(numbers)
        self._tokens = [self._tokens[place] for place in kept]
        self._ages = [self._ages[place] for place in kept]
        self._draws = [self._draws[place] for place in kept] if self._draws else []

    def clear(self) -> None:
        """Let all rows leave, and begin unfinished answers anew when they come back."""
        self._batch.clear()
        self._newest = self._newest[:0]
        self.numbers, self._tokens, self._draws, self._ages = [], [], [], []
        if self._batch.device.type == "cuda":
            torch.cuda.empty_cache()

    def _chosen(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """Choose the next token of each row from `first` on, and note it on the host."""
        limits = self._work.limits
        scores = with_noise(logits, self._draws[first:]) if self._draws else logits.float()
        chosen = of_known_tokens(scores, limits.tokens).argmax(dim=-1)
        for place, token in enumerate(chosen.tolist(), first):
            number, tokens = self.numbers[place], self._tokens[place]
            self._ages[place] += 1
            if number in self._work.answers:
                continue
            tokens.append(token)
            if token in limits.last or len(tokens) == limits.max_new_tokens:
                self._work.answers[number] = _answer(tokens, limits)
        return chosen


def _answer_in_batches(model: Any, work: _Work, mode: GenerationMode) -> None:
    """Answer all prompts in batches that each last as long as their longest answer."""
    settings = _settings(work, mode, work.limits.max_new_tokens)
    prompts = work.prompts
    by_length = sorted(work.together, key=lambda i: len(prompts[i]))
    batch = work.limits.batch
    while len(work.answers) < len(by_length):
        numbers = by_length[len(work.answers) : len(work.answers) + batch]
        numbers = numbers[: mode.batch([len(prompts[i]) for i in numbers])]
        rows = _generate_batch(model, [prompts[i] for i in numbers], settings, work.processors(numbers))
        if rows is None:
            batch = work.halved(numbers, len(numbers))
            continue
        for i, row in zip(numbers, rows, strict=True):
            work.answers[i] = _answer(row, work.limits)
        work.on_done(len(work.answers))


def _settings(work: _Work, mode: GenerationMode, max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(work.limits.last),
        pad_token_id=work.pad_id,
        use_cache=mode.caches,
    )


def _answer(row: list[int], limits: Limits) -> Answer:
    end = next((place for place, token in enumerate(row) if token in limits.last), None)
    is_cut = end is None or row[end] in limits.cuts
    ids = row[:end] if end is None or not is_cut else row[: end + 1]
    # One object for each id of the vocabulary: torch makes one for each token, of 28 bytes.
    return Answer(tuple(_SHARED_IDS.setdefault(token, token) for token in ids), is_cut=is_cut)


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    processors: Sequence[LogitsProcessor],
) -> list[list[int]] | None:
    """Return the new ids of each prompt, or None when memory ran out."""
    device = next(model.parameters()).device
    ids, mask = padded(prompts, int(settings.pad_token_id))
    try:
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise cannot_generate(kind_and_first_line(error, 200)) from error
    else:
        rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return rows
    # Only here the traceback, and with it the tensors of the failed call, has been released.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


@contextmanager
def _own_generation_config_ignored(model: Any) -> Iterator[None]:
    """Replace the model's own generation_config by an empty one during the block.

    transformers fills every field that the caller leaves unset from it: penalties, suppressed tokens, beams,
    minimum lengths, stop strings. Any of them would change greedy answers.
    """
    base = base_model_of(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
