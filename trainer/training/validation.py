"""Evaluate the student while it trains: held-out loss, a few answers of its own, the best step so far.

The order of the rows, dropout and the weights are not touched: a training makes steps of the same bits with
and without evaluations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from trainer.config import TrainConfig
from trainer.data import published_template
from trainer.data.chat_template import Example
from trainer.data.dataset import HeldOut
from trainer.data.packing import pack
from trainer.errors import DataError, OutOfMemory, StudentError
from trainer.model import segment_attention, varlen_attention
from trainer.model.generate import Limits, generate
from trainer.model.structure import base_model_of
from trainer.training.distributed import World
from trainer.training.forward import pack_losses
from trainer.training.inputs import TrainingInputs
from trainer.training.logbook import Evaluation
from trainer.training.step import packs_of_rank
from trainer.training.student import TrainableStudent

T = TypeVar("T")

# Tokens after which a sampled answer is cut, when `[evaluate] max_new_tokens` is absent.
MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ValidationState:
    """Where the evaluations stand; a part of the checkpoint.

    Attributes:
        step: step of the last evaluation, 0 before the first.
        best_step: step with the lowest held-out loss, 0 before the first.
        best_loss: that loss in nats per supervised token.
        worse: evaluations in a row without a lower loss.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    worse: int = 0

    def after(self, step: int, loss: float) -> ValidationState:
        """Return the state after one more evaluation. A loss that is not finite never counts as lower."""
        if loss < self.best_loss:
            return ValidationState(step, step, loss)
        return replace(self, step=step, worse=self.worse + 1)

    def as_state(self) -> dict[str, Any]:
        """Return the values for a checkpoint's state.json; JSON has no infinity."""
        return {**asdict(self), "best_loss": self.best_loss if self.best_step else None}

    @staticmethod
    def from_state(state: Mapping[str, Any] | None) -> ValidationState:
        """Return what `as_state` stored; the initial state for None."""
        if not state:
            return ValidationState()
        best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
        return ValidationState(int(state["step"]), int(state["best_step"]), best_loss, int(state["worse"]))


class Validation:
    """Measure the loss on a fixed selection of held-out rows at regular steps of a training.

    Args:
        state: where the evaluations stood at the checkpoint that the training resumes from.

    Attributes:
        state: where the evaluations stand.

    Raises:
        DataError: evaluations are asked for and no answer is held out.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: TrainingInputs,
        student: TrainableStudent,
        world: World,
        state: ValidationState,
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._student = student
        self._world = world
        self._steps = inputs.order.steps
        self._interval = config.evaluate.interval(self._steps)
        self.state = state
        self._packs: list[list[Example]] = []
        self._asked: list[HeldOut] = []
        if self._interval:
            self._packs = self._select_rows()
            self._asked = _spread(inputs.rows.answered, config.evaluate.sample_answers)

    def _select_rows(self) -> list[list[Example]]:
        config = self._config
        every = self._inputs.rows.held_out_examples(self._inputs.renderer, config)
        if not every:
            raise DataError(
                "no held-out answer to evaluate with during the training",
                place="evaluate.every",
                remedy="raise [data] eval_share, give rows another split than 'train', or set every = 0",
            )
        examples = _spread(every, config.evaluate.loss_rows or len(every))
        packing = pack([len(example.ids) - 1 for example in examples], config.train.pack_budget)
        return [[examples[number] for number in numbers] for numbers in packing.packs]

    def is_due(self, steps_done: int) -> bool:
        """Whether an evaluation belongs after this many steps and has not been made yet."""
        if not self._interval or not steps_done or self.state.step >= steps_done:
            return False
        return steps_done % self._interval == 0 or steps_done == self._steps

    @property
    def is_exhausted(self) -> bool:
        """Whether `[evaluate] patience` evaluations in a row found no lower loss."""
        patience = self._config.evaluate.patience
        return 0 < patience <= self.state.worse

    def run(self, steps_done: int) -> Evaluation:
        """Evaluate the student and note whether it is the best so far. Every rank must call this."""
        started = time.monotonic()
        model = self._student.model
        model.eval()
        try:
            loss = self._loss()
            answers = self._answers() if self._world.is_leader and not self._student.sharded else ()
        finally:
            model.train()
        self.state = self.state.after(steps_done, loss)
        self._world.barrier()  # the others wait here for the leader's answers, and not inside the next step
        return Evaluation(
            step=steps_done,
            steps=self._steps,
            held_out_loss=loss,
            best_step=self.state.best_step,
            best_loss=self.state.best_loss,
            answers=answers,
            seconds=time.monotonic() - started,
        )

    def _loss(self) -> float:
        """Return the loss in nats per supervised token over all ranks' packs."""
        total = torch.zeros((), device=self._student.device)
        with torch.no_grad():
            for number, weight in packs_of_rank(len(self._packs), self._world, self._student):
                losses = pack_losses(
                    self._student.model,
                    self._packs[number],
                    self._student.device,
                    self._student.forward,
                    self._student.row_loss,
                )
                total += sum(loss for loss, _ in losses) * weight
        self._world.sum_in_place([total])
        return float(total) / sum(example.supervised for examples in self._packs for example in examples)

    def _answers(self) -> tuple[dict[str, str | None], ...]:
        if not self._asked:
            return ()
        renderer, config = self._inputs.renderer, self._config
        thinks = published_template.keeps_reasoning(config, renderer)
        prompts = renderer.prompts([held.conversation for held in self._asked], [thinks] * len(self._asked))
        limits = Limits(
            stop_id=renderer.chat_shape.stop_id,
            max_new_tokens=config.evaluate.max_new_tokens or MAX_NEW_TOKENS,
            batch=config.evaluate.batch,
            pad_id=renderer.tokenizer.pad_token_id,
        )
        try:
            with attention_for_generation(self._student.model), torch.compiler.set_stance("force_eager"):
                made = generate(self._student.model, prompts, limits)
        except (OutOfMemory, StudentError):
            return ()  # sampled answers are for the eye only and end no training
        return tuple(
            {
                "prompt_id": held.prompt_id,
                "answer": renderer.decode(answer.ids),
                "reference": held.reference,
                "teacher": held.teacher,
            }
            for held, answer in zip(self._asked, made, strict=True)
        )


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


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items at equal distances, so that no part of the list is left out."""
    if count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]
