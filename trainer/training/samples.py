"""Let the student answer a few held-out prompts while it trains, for whoever watches.

Answers are greedy and cut at a limit. Neither weights nor the order of the rows, random numbers or dropout
are touched: a training makes steps of the same bits with and without them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data import published_template
from trainer.data.dataset import Rows
from trainer.data.held_out import HeldOut
from trainer.data.spread import spread
from trainer.data.tokens.stored_rows import StoredRows
from trainer.errors import DataError, OutOfMemory, StudentError
from trainer.model import self_test
from trainer.model.forward import segment_attention, varlen_attention
from trainer.model.generate import Limits, generate
from trainer.model.structure import base_model_of
from trainer.publish import serving
from trainer.training.distributed import World
from trainer.training.inputs import TrainingInputs
from trainer.training.logbook import Sampled
from trainer.training.student import TrainableStudent

# Tokens after which a sampled answer is cut, when `[evaluate] max_new_tokens` is absent.
MAX_NEW_TOKENS = 256


def require_prompts(rows: Rows | StoredRows) -> None:
    """Refuse to sample answers without a prompt for it.

    Raises:
        DataError: no prompt with a usable answer is held out.
    """
    if not rows.answered:
        raise DataError(
            "no held-out prompt to sample answers to during the training",
            place="evaluate.sample_every",
            remedy="raise [data] eval_share, give rows another split than 'train', or set it to 0",
        )


class Sampler:
    """Let the student answer the same few held-out prompts at regular steps of a training.

    Raises:
        DataError: samples are asked for and no prompt with a usable answer is held out.
    """

    def __init__(
        self, config: TrainConfig, inputs: TrainingInputs, student: TrainableStudent, world: World
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._student = student
        self._world = world
        self._steps = inputs.order.steps
        self._interval = config.evaluate.sample_interval(self._steps)
        if self._interval:
            require_prompts(inputs.rows)

    @property
    def note(self) -> str:
        """Why no answers are sampled although they were asked for; empty if they are."""
        if not self._interval or not self._student.sharded:
            return ""
        return "no answers are sampled: the base is split over the processes"

    def is_due(self, steps_done: int) -> bool:
        """Whether `[evaluate] sample_every` asks for answers after this many steps."""
        return not self._student.sharded and is_at_interval(steps_done, self._interval, self._steps)

    def run(self, steps_done: int) -> Sampled:
        """Return what the student answers now. Every rank must call this; only the leading one generates."""
        started = time.monotonic()
        answers: tuple[dict[str, str | None], ...] = ()
        if self._world.is_leader:
            with self._student.evaluating():
                answers = self.answers()
        self._world.barrier()  # the others wait here, and not inside the next step
        return Sampled(steps_done, self._steps, answers, time.monotonic() - started)

    @cached_property
    def _asked(self) -> list[HeldOut]:
        return spread(self._inputs.rows.answered, self._config.evaluate.sample_answers)

    def answers(self) -> tuple[dict[str, str | None], ...]:
        """Generate the answers; the student must be in evaluation mode.

        Returns:
            prompt_id, prompt (its last message), answer, reference and teacher's answer of each prompt; none
            where memory runs out or the student can't generate: samples are for the eye and end no training.
        """
        if self._student.sharded or not self._asked:
            return ()
        renderer, config = self._inputs.renderer, self._config
        thinks = published_template.keeps_reasoning(config, renderer)
        prompts = renderer.prompts([held.conversation for held in self._asked], [thinks] * len(self._asked))
        limits = Limits(
            stop_id=renderer.chat_shape.stop_id,
            max_new_tokens=config.evaluate.max_new_tokens or MAX_NEW_TOKENS,
            batch=config.evaluate.batch,
            pad_id=renderer.tokenizer.pad_token_id,
            positions=self_test.position_limit(config.base),
            other_stops=serving.other_stops(config, renderer),
        )
        try:
            with attention_for_generation(self._student.model), torch.compiler.set_stance("force_eager"):
                made = generate(self._student.model, prompts, limits)
        except (OutOfMemory, StudentError):
            return ()
        return tuple(
            {
                "prompt_id": held.prompt_id,
                "prompt": _last_text(held),
                "answer": renderer.decode(answer.ids),
                "reference": held.reference,
                "teacher": held.teacher,
            }
            for held, answer in zip(self._asked, made, strict=True)
        )


def _last_text(held: HeldOut) -> str:
    """Return the text of the last message of a prompt."""
    messages = held.conversation.messages
    return str(messages[-1].get("content") or "") if messages else ""


@contextmanager
def attention_for_generation(model: Any) -> Iterator[None]:
    """Run with an attention of transformers during the block: ours takes packed rows and no cache."""
    base = base_model_of(model)
    current = base.config._attn_implementation
    if current not in {segment_attention.ATTENTION_NAME, varlen_attention.ATTENTION_NAME}:
        yield
        return
    try:
        base.set_attn_implementation("sdpa")
    except ValueError:  # some architectures have no such implementation
        base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(current)


def is_at_interval(steps_done: int, interval: int, steps: int) -> bool:
    """Whether what is done every `interval` steps and after the last one is due; 0: it never is."""
    if not interval or not steps_done:
        return False
    return steps_done % interval == 0 or steps_done == steps
