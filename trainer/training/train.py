"""Train the adapter (`trainer train`): steps in order, checkpoints on the way, adapter files at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

from harvester.system.background import StopRequests
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.tokens.token_store import TokenStore
from trainer.errors import FindingsError, Interrupted, ProcessLost, TrainingDiverged
from trainer.model import model
from trainer.process import end_before_first_step, lock_output_folder, stop_signals
from trainer.publish.adapter import is_written, require_storable, write_adapter
from trainer.training import optim, requirements
from trainer.training.agreement import leader_first, require_equal_inputs
from trainer.training.checkpointer import Checkpointer, Progress
from trainer.training.distributed import World, is_lost_connection, join_world, lost_connections_named
from trainer.training.inputs import TrainingInputs, read_inputs
from trainer.training.reporter import NO_CALLBACKS, Callbacks, Reporter
from trainer.training.samples import Sampler
from trainer.training.step import Stepper, StepResult, check_first_gradient
from trainer.training.student import TrainableStudent, describe_setup, load_student
from trainer.training.validation import Validation


@dataclass(frozen=True, slots=True)
class Trained:
    """Summary of a training.

    Attributes:
        adapter: folder of the adapter, or of the model where all weights were trained.
        steps: optimiser steps of the whole training; steps_now: those made by this call.
        examples: rendered rows; excluded: left-out rows by reason.
        tokens: tokens fed to the model by this call; tokens_per_s: while stepping.
        loss: last finite loss in nats per supervised token, None before the first step.
        wall_s: seconds of this call.
        notes: lines for the operator: device, resumed step, warnings.
        best_step: step of the adapter that was written, where evaluations chose it; None otherwise.
        held_out_loss: its held-out loss in nats per supervised token.
        steps_done: steps made by this and earlier calls; fewer than `steps` where evaluations ended it.
    """

    adapter: str
    steps: int
    steps_now: int
    examples: int
    excluded: dict[str, int]
    tokens: int
    loss: float | None
    tokens_per_s: float
    wall_s: float
    notes: tuple[str, ...]
    best_step: int | None = None
    held_out_loss: float | None = None
    steps_done: int | None = None


def train(
    config: TrainConfig,
    callbacks: Callbacks = NO_CALLBACKS,
    *,
    rows: dataset.Rows | TokenStore | None = None,
    allow_change: bool = False,
    force_faults: bool = False,
    requests: StopRequests | None = None,
) -> Trained:
    """Train the adapter, or continue where the last run stopped.

    Args:
        callbacks: called when the steps begin, with each line of the log and after each evaluation.
        rows: the corpus, if it has been read already.
        allow_change: resume although settings differ from those of the checkpoint.
        force_faults: train although the data has fatal faults; the model card names them.
        requests: how another thread ends the training; signals are left alone then.

    Raises:
        FindingsError: the data has fatal faults; nothing was started.
        DataError, StudentError, ConfigError, TermsRefused: nothing was started.
        ResumeRefused: the output folder holds a training with another configuration or corpus.
        Interrupted: SIGTERM, SIGINT or a request; the step was finished and checkpointed, if one had begun.
        TrainingDiverged, OutOfMemory: the last checkpoint is good.
        ProcessLost: another process of the training ended; the steps done were checkpointed.
    """
    with (
        join_world() as world,
        lock_output_folder(config.out_path) if world.is_leader else nullcontext(),
        ExitStack() as computing,
    ):
        started = time.monotonic()
        with lost_connections_named("before the first step"), end_before_first_step(requests):
            requirements.check_settings(config)
            config = model.fit_to_device(config, world.size)
            model.set_threads(config.train, world.local_size)
            with leader_first(world, config.cache, rows is None and dataset.is_stored(config)):
                inputs = read_inputs(config, rows, callbacks.on_rows, rehearses=world.is_leader)
            if inputs.faults and not force_faults:
                raise FindingsError(
                    "; ".join(inputs.faults),
                    place=str(config.corpus),
                    remedy="`trainer doctor` shows them by token; repair them, or train with --force-faults",
                )
            device = model.select_device(config.train)
            computing.enter_context(model.arithmetic(config.train, device))
            student = load_student(config, inputs.largest_pack, world)
            require_storable(student.model, config)
            run = TrainingRun(config, inputs, student, world, callbacks, allow_change=allow_change)
        try:
            with stop_signals(requests) as signals:
                callbacks.on_start(run.steps_done, run.steps, run.notes)
                run.make_steps(signals)
                run.finish()
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise run.save_after_loss() from None
        finally:
            run.close()
        return run.summary(wall_s=time.monotonic() - started)


class TrainingRun:
    """Make the steps of one training on this process, evaluate, checkpoint, and write the adapter."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: TrainingInputs,
        student: TrainableStudent,
        world: World,
        callbacks: Callbacks,
        *,
        allow_change: bool,
    ) -> None:
        """Restore the newest checkpoint, if the output folder has one, into the student and a new optimiser.

        Raises:
            ResumeRefused, CheckpointError: the training in the output folder is another one.
            DataError: evaluations or samples are asked for and no answer is held out.
            ConfigError: another process has other inputs.
        """
        self._config = config
        self._inputs = inputs
        self._student = student
        self._world = world
        self._optimiser = optim.adamw(student.parameters.items(), config.train, config.lora)
        self._checkpointer = Checkpointer(config, inputs, student, self._optimiser, world)
        if world.size > 1:  # hashes the base
            require_equal_inputs(config, self._checkpointer.settings, world)
        start = self._checkpointer.restore(allow_change=allow_change)
        self._stepper = Stepper(student, self._optimiser, config.train, world, skipped=start.skipped)
        self._sampler = Sampler(config, inputs, student, world)
        self._validation = Validation(
            config, inputs, student, world, self._sampler, start.validation, start.steps_done
        )
        self._reporter = Reporter(config, inputs.order, student, world, callbacks, first=start.steps_done)
        hint = inputs.hint(config.train)
        soft = inputs.soft.notes() if inputs.soft else []
        said = (self._validation.note, self._sampler.note, f"hint: {hint}" if hint else "")
        hints = [line for line in said if line]
        context = dataset.context_notes(inputs.dataset.lengths, config)
        self._setup_notes = [*describe_setup(student, world), *inputs.rows.mixed, *soft, *context, *hints]
        self._notes: list[str] = []
        self._first = self._steps_done = start.steps_done
        self._loss = start.loss
        self._stepping_s = 0.0

    @property
    def steps_done(self) -> int:
        """Optimiser steps done, those before a resume included."""
        return self._steps_done

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the operator so far: device, resumed step, warnings."""
        problem = [f"warning: {self._reporter.problem}"] if self._reporter.problem else []
        return (*self._setup_notes, *self._checkpointer.notes, *self._notes, *problem)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self._inputs.order.steps

    @property
    def reads_every_step(self) -> bool:
        """Whether the loss of each step is read: free on the CPU, while a GPU makes the host wait."""
        return self._student.device.type == "cpu"

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether `[train] save_every` asks for a checkpoint after this step (0-based)."""
        every = self._config.train.save_every
        return every > 0 and (step + 1) % every == 0

    def make_steps(self, signals: Sequence[int]) -> None:
        """Make the steps that are left, with evaluations and checkpoints on the way.

        After each step the ranks agree whether one of them was asked to stop.

        Args:
            signals: numbers of the signals received so far; grows while steps are made.

        Raises:
            Interrupted: a rank received a signal; the step was finished and checkpointed.
        """
        if self._validation.is_due(self._steps_done):
            self.evaluate()  # a signal came before it could be made
            self.save()
        for step in range(self._steps_done, self.steps):
            if self._validation.is_exhausted:
                break
            self.step(step)
            signal_number = self._world.highest(signals[0] if signals else 0)
            is_evaluated = not signal_number and self._validation.is_due(step + 1)
            is_best = is_evaluated and self.evaluate()
            if signal_number or is_best or self.is_checkpoint_due(step):
                self.save()
            if not (signal_number or is_evaluated) and self._sampler.is_due(step + 1):
                self._reporter.write_samples(self._sampler.run(step + 1))
            if signal_number:
                self._world.barrier()  # the checkpoint is complete before any rank ends
                raise Interrupted(
                    f"stopped after step {step + 1} of {self.steps}, checkpointed",
                    signal_number=signal_number,
                    remedy="the same command resumes from here",
                )

    def evaluate(self) -> bool:
        """Evaluate the student on held-out rows; return whether it is the best so far."""
        evaluation = self._validation.run(self._steps_done)
        self._reporter.write_evaluation(evaluation)
        return evaluation.best_step == evaluation.step

    def step(self, step: int) -> None:
        """Make one optimiser step (0-based), or skip it when its numbers are not finite."""
        started = time.monotonic()
        packs = self._inputs.packs(step)
        lr = optim.set_lr(self._optimiser, optim.lr_factor(step, self.steps, self._config.train))
        result = self._stepper.learn(step, packs)
        self._steps_done = step + 1
        if step == 0:
            check_first_gradient(float(result.norm))
        self._reporter.count(result, packs)
        is_logged = self._reporter.is_line_due(step) or self._validation.is_due(step + 1)
        reads = is_logged or self.reads_every_step
        if reads:
            self._read_loss(result)
        if is_logged:
            skipped = self._stepper.skipped
            self._reporter.write_step(step, result, packs, loss=self._loss, lr=lr, skipped=skipped)
        if reads:
            self._stepper.check(step, str(self._checkpointer.folder))
        self._stepping_s += time.monotonic() - started

    def _read_loss(self, result: StepResult) -> None:
        """Keep the loss of a step whose numbers are finite."""
        loss = float(result.loss)
        if math.isfinite(loss) and math.isfinite(float(result.norm)):
            self._loss = loss

    def save(self) -> None:
        """Write a checkpoint after the steps done. If the disk is full the older one stays."""
        self._checkpointer.save(
            Progress(self._steps_done, self._loss, self._stepper.skipped, self._validation.state)
        )

    def save_after_loss(self) -> ProcessLost:
        """Checkpoint the steps done after another process was lost; return the error to end with."""
        if self._steps_done > self._checkpointer.steps_saved:
            self.save()
        return ProcessLost(
            "another process of this training ended; "
            f"checkpointed after step {self._steps_done} of {self.steps}",
            remedy="the same command resumes from here",
        )

    def finish(self) -> None:
        """Write the last checkpoint and the adapter, unless a finished training has done so already.

        The adapter in the folder may be that of fewer steps: a kill or a full disk may have come between the
        last checkpoint and the adapter. So its weights are compared.
        """
        has_trained = self._first < self._steps_done
        if has_trained and self._checkpointer.steps_saved < self._steps_done:
            self.save()
        self._report_skipped()
        self._load_best()
        if self._world.is_leader and (has_trained or not is_written(self._student.model, self._config)):
            write_adapter(
                self._student.model,
                self._inputs.renderer,
                self._config,
                self._inputs.learned_rows,
                self._inputs.faults,
                _soft_summary(self._config, self._inputs),
            )
        self._world.barrier()

    def _report_skipped(self) -> None:
        """Say how many steps were skipped.

        Raises:
            TrainingDiverged: all of them were, so nothing was learned.
        """
        skipped, last = self._stepper.skipped, self._stepper.skipped_last
        if not skipped:
            return
        if skipped >= self._steps_done:
            raise TrainingDiverged(
                f"loss or gradient was not finite in all {self._steps_done} steps: nothing was learned",
                place=str(self._config.out_path),
                remedy="lower [train] lr, or look for odd rows with `trainer doctor`",
            )
        ends = f", the last {last:,} among them: what was learned before may be too large; lower [train] lr"
        self._notes.append(
            f"warning: {skipped:,} of {self._steps_done:,} steps were skipped, loss or gradient not finite"
            + (ends if last else "")
        )

    def close(self) -> None:
        """End what the log keeps open."""
        self._reporter.close()

    def _load_best(self) -> None:
        """Put the weights of the best evaluation into the student, for the adapter that is written."""
        state = self._validation.state
        if not state.best_step:
            return
        if self._validation.is_exhausted and self._steps_done < self.steps:
            self._notes.append(
                f"stopped after step {self._steps_done} of {self.steps}: "
                f"{state.worse} evaluations in a row found no lower held-out loss"
            )
        best = f"step {state.best_step}, held-out loss {state.best_loss:.4f}"
        if state.best_step != self._steps_done and not self._checkpointer.load_adapter(state.best_step):
            self._notes.append(f"warning: no checkpoint of the best {best}; the last step is written")
            return
        self._notes.append(f"adapter of the best {best}")

    def summary(self, *, wall_s: float) -> Trained:
        """Return the counts and notes of this call."""
        tokens = self._reporter.tokens
        state = self._validation.state
        return Trained(
            adapter=str(self._config.student_path),
            steps=self.steps,
            steps_now=self._steps_done - self._first,
            examples=len(self._inputs.dataset.examples),
            excluded=dict(self._inputs.dataset.excluded),
            tokens=tokens,
            loss=self._loss,
            tokens_per_s=tokens / self._stepping_s if self._stepping_s else 0.0,
            wall_s=wall_s,
            notes=self.notes,
            best_step=state.best_step or None,
            held_out_loss=state.best_loss if state.best_step else None,
            steps_done=self._steps_done,
        )


def _soft_summary(config: TrainConfig, inputs: TrainingInputs) -> str:
    """Describe the soft targets that were learned, for the model card; empty without any."""
    if inputs.soft is None or not inputs.soft.rows:
        return ""
    train = config.train
    temperature = f", temperature {train.soft_temperature:g}" if train.soft_temperature != 1 else ""
    tail = "" if train.soft_tail == "bucket" else ", renormalised over the listed tokens (biased)"
    summary = str(inputs.soft).removeprefix("soft targets: ")
    return f"{summary}; weight {train.soft_weight:g}{temperature}{tail}"
