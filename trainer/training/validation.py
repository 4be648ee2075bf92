"""Evaluate the student while it trains: held-out loss, and which step has the lowest one so far.

The order of the rows, dropout and the weights are not touched: a training makes steps of the same bits with
and without evaluations.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data.chat_template import Example, Renderer
from trainer.data.dataset import Rows
from trainer.data.packing import pack
from trainer.data.spread import spread
from trainer.data.tokens.stored_rows import StoredRows
from trainer.errors import DataError
from trainer.training.distributed import World
from trainer.training.forward import pack_losses
from trainer.training.inputs import TrainingInputs
from trainer.training.logbook import Evaluation
from trainer.training.samples import Sampler, is_at_interval
from trainer.training.step import packs_of_rank
from trainer.training.student import TrainableStudent


@dataclass(frozen=True, slots=True)
class ValidationState:
    """Where the evaluations stand; a part of the checkpoint.

    Attributes:
        step: step of the last evaluation, 0 before the first.
        best_step: step with the lowest held-out loss, 0 before the first.
        best_loss: that loss in nats per supervised token.
        worse: evaluations in a row without a lower loss.
        rows: SHA-256 of the rows that the losses are of; "" in checkpoints of earlier versions.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    worse: int = 0
    rows: str = ""

    def after(self, step: int, loss: float) -> ValidationState:
        """Return the state after one more evaluation. A loss that is not finite never counts as lower."""
        if loss < self.best_loss:
            return ValidationState(step, step, loss, rows=self.rows)
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
        counts = (int(state["step"]), int(state["best_step"]), best_loss, int(state["worse"]))
        return ValidationState(*counts, rows=state.get("rows", ""))


def held_out_examples(config: TrainConfig, rows: Rows | StoredRows, renderer: Renderer) -> Sequence[Example]:
    """Return the held-out answers that a training may be evaluated with.

    Raises:
        DataError: there are none.
    """
    every = rows.held_out_examples(renderer, config)
    if not every:
        raise DataError(
            "no held-out answer to evaluate with during the training",
            place="evaluate.every",
            remedy="raise [data] eval_share, give rows another split than 'train', or set every = 0",
        )
    return every


class Validation:
    """Measure the loss on a fixed selection of held-out rows at regular steps of a training.

    Args:
        sampler: lets the student answer a few held-out prompts at each evaluation.
        state: where the evaluations stood at the checkpoint that the training resumes from.
        steps_done: at that checkpoint.

    Attributes:
        state: where the evaluations stand.
        note: why those before the checkpoint don't count; empty if they do.

    Raises:
        DataError: evaluations are asked for and no answer is held out.
    """

    def __init__(  # noqa: PLR0913 - the training, and where it stands
        self,
        config: TrainConfig,
        inputs: TrainingInputs,
        student: TrainableStudent,
        world: World,
        sampler: Sampler,
        state: ValidationState,
        steps_done: int,
    ) -> None:
        self._sampler = sampler
        self._config = config
        self._inputs = inputs
        self._student = student
        self._world = world
        self._steps = inputs.order.steps
        self._interval = config.evaluate.interval(self._steps)
        self.state = state
        self.note = ""
        self._packs: list[list[Example]] = []
        if self._interval:
            self._packs = self._select_rows()
        if steps_done < self._steps and not self.is_exhausted:  # else nothing is compared any more
            self._forget_what_can_not_be_compared()

    def _forget_what_can_not_be_compared(self) -> None:
        """Start anew where the best step so far can't be compared with those to come."""
        rows = _hash(self._packs)
        state = self.state
        if state.best_step:
            best = f"the evaluations so far, the best at step {state.best_step}, don't count: "
            if not self._interval:
                self.note = f"{best}[evaluate] every = 0, so the adapter of the last step is written"
            elif state.rows not in ("", rows):
                self.note = f"{best}they are of other held-out rows than those to come"
        if self.note:
            state = ValidationState(state.step)
        self.state = replace(state, rows=rows)

    def _select_rows(self) -> list[list[Example]]:
        config = self._config
        every = held_out_examples(config, self._inputs.rows, self._inputs.renderer)
        examples = spread(every, config.evaluate.loss_rows or len(every))
        packing = pack([len(example.ids) - 1 for example in examples], config.train.pack_budget)
        return [[examples[number] for number in numbers] for numbers in packing.packs]

    def is_due(self, steps_done: int) -> bool:
        """Whether an evaluation belongs after this many steps and has not been made yet."""
        return self.state.step < steps_done and is_at_interval(steps_done, self._interval, self._steps)

    @property
    def is_exhausted(self) -> bool:
        """Whether `[evaluate] patience` evaluations in a row found no lower loss."""
        patience = self._config.evaluate.patience
        return 0 < patience <= self.state.worse

    def run(self, steps_done: int) -> Evaluation:
        """Evaluate the student and note whether it is the best so far. Every rank must call this."""
        started = time.monotonic()
        with self._student.evaluating():
            loss = self._loss()
            answers = self._sampler.answers() if self._world.is_leader else ()
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


def _hash(packs: Sequence[Sequence[Example]]) -> str:
    """Return the SHA-256 of rows: their tokens, and from which one on they count."""
    digest = hashlib.sha256()
    for example in (example for examples in packs for example in examples):
        digest.update(f"{len(example.ids)} {example.prompt_length}\n".encode() + example.ids.tobytes())
    return digest.hexdigest() if packs else ""
