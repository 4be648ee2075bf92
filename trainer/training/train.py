"""Train the adapter (`trainer train`): steps in order, checkpoints on the way, adapter files at the end."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.collator import padding_share
from trainer.errors import CheckpointError, FindingsError, Interrupted, ProcessLost, ResumeRefused, StoreFull
from trainer.model import adapter, lora_forward, model, weights
from trainer.process import lock_output_folder, stop_signals
from trainer.publish.adapter import write_adapter
from trainer.training import checkpoint, flops, optim, validation
from trainer.training.distributed import World, is_lost_connection, join_world
from trainer.training.inputs import TrainingInputs, read_inputs
from trainer.training.logbook import Evaluation, Logbook, StepLog
from trainer.training.step import Stepper, StepResult, check_first_gradient
from trainer.training.student import TrainableStudent, load_student
from trainer.training.validation import Validation

# Settings that do not change the weights, so they may differ when a training is resumed.
_FREE_SETTINGS = (
    *("train.log_every", "train.log_every_s", "train.save_every"),
    *("train.checkpointing", "train.shard", "data.corpus"),
)


@dataclass(frozen=True, slots=True)
class Trained:
    """Summary of a training.

    Attributes:
        adapter: folder of the adapter.
        steps: optimiser steps of the whole training; steps_now: those made by this call.
        examples: rendered rows; excluded: left-out rows by reason.
        tokens: tokens fed to the model by this call; tokens_per_s: while stepping.
        loss: last finite loss in nats per supervised token, None before the first step.
        wall_s: seconds of this call.
        notes: lines for the operator: device, resumed step, warnings.
        best_step: step of the adapter that was written, where evaluations chose it; None otherwise.
        held_out_loss: its held-out loss in nats per supervised token.
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


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Callbacks for a caller that shows progress.

    Attributes:
        on_start: called before the first step, with the steps done, the steps in all, and notes.
        on_evaluation: called after each evaluation that `[evaluate] every` asks for.
    """

    on_start: Callable[[int, int, Sequence[str]], None] = lambda _done, _steps, _notes: None
    on_evaluation: Callable[[Evaluation], None] = lambda _: None


NO_CALLBACKS = Callbacks()


def train(
    config: TrainConfig,
    on_step: Callable[[StepLog], None] = lambda _: None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    rows: dataset.Rows | None = None,
    allow_change: bool = False,
    force_faults: bool = False,
) -> Trained:
    """Train the adapter, or continue where the last run stopped.

    Args:
        on_step: called with each line of the log.
        callbacks: further callbacks.
        rows: the corpus, if it has been read already.
        allow_change: resume although settings differ from those of the checkpoint.
        force_faults: train although the data has fatal faults; the model card names them.

    Raises:
        FindingsError: the data has fatal faults; nothing was started.
        DataError, StudentError, ConfigError, TermsRefused: nothing was started.
        ResumeRefused: the output folder holds a training with another configuration or corpus.
        Interrupted: SIGTERM or SIGINT; the step was finished and checkpointed.
        TrainingDiverged, OutOfMemory: the last checkpoint is good.
        ProcessLost: another process of the training ended; the steps done were checkpointed.
    """
    with (
        stop_signals() as signals,
        join_world() as world,
        lock_output_folder(config.out_path) if world.is_leader else nullcontext(),
    ):
        started = time.monotonic()
        config = model.fit_to_device(config, world.size)
        model.set_threads(config.train)
        inputs = read_inputs(config, rows)
        if inputs.faults and not force_faults:
            raise FindingsError(
                "; ".join(inputs.faults),
                place=str(config.corpus),
                remedy="`trainer doctor` shows them by token; repair them, or train with --force-faults",
            )
        student = load_student(config, inputs.largest_pack, world)
        run = TrainingRun(config, inputs, student, world, on_step, callbacks.on_evaluation)
        first = run.resume(allow_change=allow_change)
        callbacks.on_start(first, run.steps, run.notes)
        try:
            run.make_steps(first, signals)
            run.finish(first)
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise run.save_after_loss() from None
        return run.summary(steps_now=run.steps_done - first, wall_s=time.monotonic() - started)


class TrainingRun:
    """One training on this process: it makes steps, logs them, and saves and restores its state.

    Args:
        on_step: called with each line of the log, on the leading process.
        on_evaluation: called after each evaluation, on the leading process.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: TrainingInputs,
        student: TrainableStudent,
        world: World,
        on_step: Callable[[StepLog], None],
        on_evaluation: Callable[[Evaluation], None],
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._student = student
        self._world = world
        self._optimiser = optim.adamw(student.parameters.items(), config.train, config.lora)
        self._stepper = Stepper(student, self._optimiser, config.train, world)
        self._flop_of_pack = flops.flop_counter(student.model)
        self._checkpoints = config.out_path / "checkpoints"
        peak = fleet_peak_flops(student.device, world)
        self._logbook = Logbook(config.out_path, on_step, peak) if world.is_leader else None
        hint = inputs.hint(config.train)
        self._notes = [*setup_notes(student, world), *([f"hint: {hint}"] if hint else [])]
        self._validation = Validation(config, inputs, student, world)
        self._on_evaluation = on_evaluation
        self._loss: float | None = None
        self._stepping_s = 0.0
        self._steps_done = self._steps_saved = 0
        # On the CPU reading a value is free. On a GPU it makes the host wait, so only log lines do it.
        self.reads_every_step = student.device.type == "cpu"

    @property
    def steps_done(self) -> int:
        """Optimiser steps done, those before a resume included."""
        return self._steps_done

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the operator so far: device, resumed step, warnings."""
        return tuple(self._notes)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self._inputs.order.steps

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether `[train] save_every` asks for a checkpoint after this step (0-based)."""
        every = self._config.train.save_every
        return every > 0 and (step + 1) % every == 0

    def make_steps(self, first: int, signals: Sequence[int]) -> None:
        """Make the steps from `first` (0-based) to the last, with checkpoints on the way.

        After each step the ranks agree whether one of them was asked to stop.

        Args:
            signals: numbers of the signals received so far; grows while steps are made.

        Raises:
            Interrupted: a rank received a signal; the step was finished and checkpointed.
        """
        if self._validation.is_due(first):
            self.evaluate()  # a signal came before it could be made
            self.save(first)
        for step in range(first, self.steps):
            if self._validation.is_exhausted:
                break
            self.step(step)
            signal_number = self._world.highest(signals[0] if signals else 0)
            is_best = not signal_number and self._validation.is_due(step + 1) and self.evaluate()
            if signal_number or is_best or self.is_checkpoint_due(step):
                self.save(step + 1)
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
        if self._logbook is not None:
            self._logbook.write_evaluation(evaluation)
            self._on_evaluation(evaluation)
        return evaluation.best_step == evaluation.step

    def step(self, step: int) -> None:
        """Make one optimiser step (0-based), or skip it when its numbers are not finite."""
        started = time.monotonic()
        train = self._config.train
        packs = self._inputs.packs(step)
        lr = optim.set_lr(self._optimiser, optim.lr_factor(step, self.steps, train))
        result = self._stepper.learn(step, packs)
        self._steps_done = step + 1
        if step == 0:
            check_first_gradient(float(result.norm))
        if self._logbook is not None:
            flop = sum(map(self._flop_of_pack, packs)) if self._flop_of_pack else 0.0
            self._logbook.add_step(result.tokens, result.supervised, flop)
        is_logged = (
            (step + 1) % train.log_every == 0
            or step + 1 == self.steps
            or self._validation.is_due(step + 1)
            or (self._logbook is not None and 0 < train.log_every_s <= self._logbook.seconds_since_line)
        )
        reads = is_logged or self.reads_every_step
        if reads:
            self._read_loss(result)
        if is_logged:
            self._log(step, result, lr, padding_share(packs))
        if reads:
            self._stepper.check(step, str(self._checkpoints))
        self._stepping_s += time.monotonic() - started

    def _read_loss(self, result: StepResult) -> None:
        """Keep the loss of a step whose numbers are finite."""
        loss = float(result.loss)
        if math.isfinite(loss) and math.isfinite(float(result.norm)):
            self._loss = loss

    def _log(self, step: int, result: StepResult, lr: float, padding: float) -> None:
        if self._logbook is None:
            return
        self._logbook.write_line(
            {
                "step": step + 1,
                "steps": self.steps,
                "epoch": self._inputs.order.epoch_of(step),
                "loss": math.nan if self._loss is None else self._loss,
                "accuracy": float(result.accuracy),
                "grad_norm": float(result.norm),
                "lr": lr,
                "skipped": self._stepper.skipped,
                "padding": padding,
                "memory_bytes": peak_memory_bytes(self._student.device),
            }
        )

    def resume(self, *, allow_change: bool) -> int:
        """Restore the newest valid checkpoint, if there is one.

        Returns:
            The number of steps that are done already.

        Raises:
            ResumeRefused: the checkpoint was made under other settings, and `allow_change` is false.
            CheckpointError: the checkpoint belongs to a student of another shape.
        """
        found, skipped = checkpoint.newest_valid(self._checkpoints)
        self._notes += [f"checkpoint skipped: {line}" for line in skipped]
        done = 0
        if found is not None:
            self._restore(found, allow_change=allow_change)
            done = self._steps_done = self._steps_saved = min(found.step, self.steps)
        if self._logbook is not None:
            self._logbook.drop_lines_after(done)
        return done

    def _restore(self, found: checkpoint.Checkpoint, *, allow_change: bool) -> None:
        changes = checkpoint.describe_changes(found.state.get("settings", {}), self._settings)
        if changes and not allow_change:
            raise ResumeRefused(
                f"the training in this folder had other settings: {'; '.join(changes)}",
                place=str(self._checkpoints),
                remedy="set them back, choose another [out] path, or add --allow-change",
            )
        self._notes += [f"changed on the way: {line}" for line in changes]
        checkpoint.restore(found, self._optimiser, self._student.parameters)
        self._stepper.restore_skipped(int(found.state.get("skipped", 0)))
        self._loss = found.state.get("loss")
        self._validation.progress = validation.ValidationState.from_state(found.state.get("validation"))
        self._notes.append(f"resumed at step {found.step} of {self.steps}")

    def save(self, steps_done: int) -> None:
        """Write a checkpoint. If the disk is full the older one stays and training continues."""
        if not self._world.is_leader:
            return
        progress = self._validation.progress
        state = {
            "settings": self._settings,
            "skipped": self._stepper.skipped,
            "loss": self._loss,
            "validation": progress.as_state(),
        }
        parameters = self._student.parameters
        moments = checkpoint.optimiser_moments(self._optimiser, parameters)
        try:
            current = checkpoint.Checkpoint(steps_done, state, parameters, moments)
            checkpoint.save(self._checkpoints, current, keep_step=progress.best_step)
            self._steps_saved = steps_done
        except (StoreFull, CheckpointError) as error:
            self._notes.append(f"warning: {error.message}; the last good checkpoint is kept")

    def save_after_loss(self) -> ProcessLost:
        """Checkpoint the steps done after another process was lost; return the error to end with."""
        if self._steps_done > self._steps_saved:
            self.save(self._steps_done)
        return ProcessLost(
            "another process of this training ended; "
            f"checkpointed after step {self._steps_done} of {self.steps}",
            remedy="the same command resumes from here",
        )

    def finish(self, first: int) -> None:
        """Write the last checkpoint and the adapter, unless a finished training has done so already.

        Args:
            first: the step at which this call began.
        """
        has_trained = first < self._steps_done
        if has_trained and self._steps_saved < self._steps_done:
            self.save(self._steps_done)
        self._take_best()
        adapter = self._config.out_path / "adapter"
        if self._world.is_leader and (has_trained or not (adapter / "adapter_config.json").exists()):
            write_adapter(
                self._student.model,
                self._inputs.renderer,
                self._config,
                self._inputs.rows,
                self._inputs.faults,
            )
        self._world.barrier()

    def _take_best(self) -> None:
        """Put the weights of the best evaluation into the student, for the adapter that is written."""
        progress = self._validation.progress
        if not progress.best_step:
            return
        if self._validation.is_exhausted and self._steps_done < self.steps:
            self._notes.append(
                f"stopped after step {self._steps_done} of {self.steps}: "
                f"{progress.worse} evaluations in a row found no lower held-out loss"
            )
        best = f"step {progress.best_step}, held-out loss {progress.best_loss:.4f}"
        if progress.best_step != self._steps_done:
            weights_of_best = checkpoint.adapter_of_step(self._checkpoints, progress.best_step)
            if weights_of_best is None:
                self._notes.append(f"warning: no checkpoint of the best {best}; the last step is written")
                return
            with torch.no_grad():
                for name, parameter in self._student.parameters.items():
                    parameter.copy_(weights_of_best[name])
        self._notes.append(f"adapter of the best {best}")

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Everything the weights depend on, by dotted name. Hashes the base, so it is computed once."""
        sections = self._config.model_dump(mode="json")
        settings = {
            f"{section}.{key}": sections[section][key]
            for section in ("data", "lora", "train")
            for key in sections[section]
        }
        for key in _FREE_SETTINGS:
            del settings[key]
        dataset = self._inputs.dataset
        return {
            **settings,
            "train.threads": torch.get_num_threads() if self._student.device.type == "cpu" else 0,
            "corpus": dataset.sha256,
            "corpus.examples": len(dataset.examples),
            "corpus.tokens": sum(dataset.lengths),
            "base": weights.base_sha256(self._config.base),
            "template": self._inputs.renderer.template_sha256,
        }

    def summary(self, *, steps_now: int, wall_s: float) -> Trained:
        """Return the counts and notes of this call."""
        tokens = self._logbook.tokens if self._logbook else 0
        progress = self._validation.progress
        notes = list(self._notes)
        if self._logbook and self._logbook.problem:
            notes.append(f"warning: {self._logbook.problem}")
        return Trained(
            adapter=str(self._config.out_path / "adapter"),
            steps=self.steps,
            steps_now=steps_now,
            examples=len(self._inputs.dataset.examples),
            excluded=dict(self._inputs.dataset.excluded),
            tokens=tokens,
            loss=self._loss,
            tokens_per_s=tokens / self._stepping_s if self._stepping_s else 0.0,
            wall_s=wall_s,
            notes=tuple(notes),
            best_step=progress.best_step or None,
            held_out_loss=progress.best_loss if progress.best_step else None,
        )


def fleet_peak_flops(device: torch.device, world: World) -> float | None:
    """Return the peak arithmetic of all ranks' devices together in FLOP/s, None if unknown."""
    peak = model.peak_flops(device)
    return None if peak is None else peak * world.size


def setup_notes(student: TrainableStudent, world: World) -> list[str]:
    """Describe device, dtypes, sharding and checkpointing for the operator."""
    dtype = str(model.base_dtype(student.device)).removeprefix("torch.")
    notes = [f"{student.device.type}, base {dtype}, adapter float32"]
    if student.sharded:
        mebibytes = student.base_bytes / 2**20
        notes.append(f"base sharded: {mebibytes:,.1f} MiB of it in each of {world.size} processes")
    notes += [adapter.describe_adapted(student.model), *adapter.describe_left_out(student.model)]
    if student.forward.note:
        notes.append(student.forward.note)
    slow, layers = lora_forward.slow_layers(student.model)
    if slow:
        notes.append(
            f"{slow:,} of {layers:,} LoRA layers run PEFT's own, slower forward (dropout, DoRA, experts, "
            "transposed or biased layers)"
        )
    if student.checkpointing:
        notes.append("activations are recomputed in the backward pass: they would not fit otherwise")
    return notes


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak so far: allocated on CUDA, resident set on the CPU (getrusage counts KiB on Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
