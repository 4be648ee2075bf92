"""Generate answers in batches: greedy ones, or samples that do not depend on their batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trainer.errors import OutOfMemory
from trainer.model.generation_mode import cannot_generate, choose_mode, padded
from trainer.model.loading import kind_and_first_line
from trainer.model.out_of_memory import is_out_of_memory
from trainer.model.structure import base_model_of


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold one generated answer.

    Attributes:
        ids: its token ids, without the end of turn.
        is_cut: whether it reached the token limit before its end of turn.
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
        self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next tokens, [rows, vocabulary], with noise."""
        noise = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=draw) for draw in self._draws]
        )
        return scores.float() - noise.log().to(scores.device)


@dataclass(frozen=True, slots=True)
class Limits:
    """Configure how answers end and are batched.

    Attributes:
        stop_id: the token that ends an answer.
        max_new_tokens: tokens after which an answer is cut.
        batch: prompts answered together.
        pad_id: the token to pad with; None: `stop_id`.
    """

    stop_id: int
    max_new_tokens: int
    batch: int
    pad_id: int | None = None


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

    Prompts are batched by length and padded on the left, so that all answers of a batch begin in the same
    column; a class that can't be padded gets batches of equal length (see `generation_mode`). A batch ends
    when its last answer does. When memory runs out, the batch is halved and repeated.

    Args:
        prompts: token ids of each prompt.
        seeds: of a sample at temperature 1 for each prompt; None: answer greedily.
        on_done: called with the number of prompts answered so far.
        on_note: called with lines for the operator: a batch that was halved, a class that can't be padded.

    Returns:
        One answer for each prompt, in the order of the prompts.

    Raises:
        OutOfMemory: a single prompt does not fit.
        StudentError: the model's class can't generate, or computes other logits while it does.
    """
    if not prompts:
        return []
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limits.max_new_tokens,
        eos_token_id=limits.stop_id,
        pad_token_id=limits.stop_id if limits.pad_id is None else limits.pad_id,
    )
    batch = limits.batch
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    with _own_generation_config_ignored(model), torch.inference_mode():
        mode = choose_mode(model)
        settings.use_cache = mode.caches
        if mode.note:
            on_note(mode.note)
        while len(answers) < len(prompts):
            numbers = by_length[len(answers) : len(answers) + batch]
            numbers = numbers[: mode.batch([len(prompts[i]) for i in numbers])]
            noise = None if seeds is None else SeededNoise([seeds[i] for i in numbers])
            rows = _generate_batch(model, [prompts[i] for i in numbers], settings, noise)
            if rows is None:
                longest = max(len(prompts[i]) for i in numbers)
                if len(numbers) == 1:
                    raise OutOfMemory(
                        f"not enough memory to answer one prompt of {longest:,} tokens with up to "
                        f"{limits.max_new_tokens:,} new ones",
                        remedy="lower [evaluate] max_new_tokens, or use a device with more memory",
                    )
                batch = len(numbers) // 2
                on_note(f"memory ran out: now {batch:,} prompts are answered together")
                continue
            for i, row in zip(numbers, rows, strict=True):
                answers[i] = _answer(row, limits.stop_id)
            on_done(len(answers))
    return [answers[i] for i in range(len(prompts))]


def _answer(row: list[int], stop_id: int) -> Answer:
    if stop_id not in row:
        return Answer(tuple(row), is_cut=True)
    return Answer(tuple(row[: row.index(stop_id)]), is_cut=False)


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    noise: SeededNoise | None = None,
) -> list[list[int]] | None:
    """Return the new ids of each prompt, or None when memory ran out."""
    device = next(model.parameters()).device
    ids, mask = padded(prompts, int(settings.pad_token_id))
    try:
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([noise] if noise is not None else []),
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
