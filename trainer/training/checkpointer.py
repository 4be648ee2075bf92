"""Save the state of a training at its checkpoints, and restore the newest valid one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.errors import ResumeRefused, StoreError
from trainer.model import weights
from trainer.model.model import thread_count
from trainer.training import checkpoint
from trainer.training.distributed import World
from trainer.training.inputs import TrainingInputs
from trainer.training.output_folders import CHECKPOINTS
from trainer.training.student import TrainableStudent
from trainer.training.validation import ValidationState

# Settings that do not change the weights, so they may differ when a training is resumed.
_FREE_SETTINGS = (
    *("train.log_every", "train.log_every_s", "train.save_every", "train.trackers"),
    *("train.checkpointing", "train.shard", "data.corpus", "data.cache"),
    # What these choose shows in the hash of the corpus, weights included.
    *("data.where", "data.answers", "data.per_prompt", "data.weights"),
)

# Settings that decide, with the lengths of the rows, which rows a step learns.
_ORDER_SETTINGS = ("train.batch_tokens", "train.pack_tokens", "train.seed")

# How many rows there are. The hash `corpus` can't tell whether their order changed: it holds weights, too.
_COUNTS = ("corpus.examples", "corpus.tokens")

# Member of state.json: hash of the rows' lengths in order. Earlier checkpoints lack it.
_LENGTHS = "lengths"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: what its checkpoint holds besides weights and moments.

    Attributes:
        steps_done: optimiser steps of the whole training.
        loss: last finite loss in nats per supervised token, None before the first step.
        skipped: steps whose numbers were not finite.
        validation: where the evaluations stand.
    """

    steps_done: int = 0
    loss: float | None = None
    skipped: int = 0
    validation: ValidationState = field(default_factory=ValidationState)

    def as_state(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values for a checkpoint's state.json."""
        return {
            "settings": settings,
            "skipped": self.skipped,
            "loss": self.loss,
            "validation": self.validation.as_state(),
        }

    @staticmethod
    def from_checkpoint(stored: checkpoint.Checkpoint, steps: int) -> Progress:
        """Return what a checkpoint holds, for a training of `steps` steps."""
        return Progress(
            min(stored.step, steps),
            stored.state.get("loss"),
            int(stored.state.get("skipped", 0)),
            ValidationState.from_state(stored.state.get("validation")),
        )


class Checkpointer:
    """Saves one training in the folder `checkpoints` of its output folder, and restores it.

    Only the leading process writes. The one that finds the newest checkpoint sends it to the others: other
    machines need not see the folder, and another one may lead when a training is resumed.

    Attributes:
        folder: where the checkpoints are.
        notes: lines for the operator: what was restored, skipped or could not be written.
        steps_saved: steps done at the newest checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: TrainingInputs,
        student: TrainableStudent,
        optimiser: torch.optim.Optimizer,
        world: World,
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._student = student
        self._optimiser = optimiser
        self._world = world
        self.folder = config.out_path / CHECKPOINTS
        self.notes: list[str] = []
        self.steps_saved = 0

    def restore(self, *, allow_change: bool) -> Progress:
        """Load the newest valid checkpoint into student and optimiser; without one, start from step 0.

        Raises:
            ResumeRefused: the checkpoint was made under other settings, and `allow_change` is false.
            CheckpointError: the checkpoint belongs to a student of another shape.
        """
        newest = self._shared_newest()
        if newest is None:
            return Progress()
        changes = checkpoint.describe_changes(newest.state.get("settings", {}), self.settings)
        if changes and not allow_change:
            raise ResumeRefused(
                f"the training in this folder had other settings: {'; '.join(changes)}",
                place=str(self.folder),
                remedy="set them back, choose another [out] path, or add --allow-change",
            )
        self.notes += [f"changed on the way: {line}" for line in changes]
        checkpoint.restore(newest, self._optimiser, self._student.parameters)
        steps = self._inputs.order.steps
        self.notes.append(f"resumed at step {newest.step} of {steps}")
        self.notes += self._notes_of_order(newest, steps)
        progress = Progress.from_checkpoint(newest, steps)
        self.steps_saved = progress.steps_done
        return progress

    def _notes_of_order(self, newest: checkpoint.Checkpoint, steps: int) -> list[str]:
        """Say what becomes of the rows where the steps before were made of others than those to come."""
        before = newest.state.get("settings", {})
        is_same = all(
            before.get(name) == self.settings.get(name) for name in (*_ORDER_SETTINGS, *_COUNTS)
        ) and newest.state.get(_LENGTHS) in (None, self._lengths_sha256)
        if is_same:
            if before.get("corpus") == self.settings.get("corpus"):
                return []
            return [
                "there are as many rows and tokens as before; if the rows themselves changed, and not only "
                "their weights or soft targets, some may be learned again and others left out"
            ]
        if newest.step >= steps:
            return [
                f"warning: {newest.step:,} steps were made of other rows or sizes, and there are {steps:,} "
                "now: none is made, whatever was not learned; choose another [out] path to learn these rows"
            ]
        return [
            f"warning: steps go on from number {newest.step:,} in an order of other rows or sizes: some rows "
            "of this pass are learned again, others are left out"
        ]

    def _shared_newest(self) -> checkpoint.Checkpoint | None:
        """Return the newest valid checkpoint that any process finds, on every process."""
        newest, skipped = checkpoint.newest_valid(self.folder)
        self.notes += [f"checkpoint skipped: {line}" for line in skipped]
        world = self._world
        step = -1 if newest is None else newest.step
        has_it = step == world.highest(step) and step >= 0
        if world.local_size == world.size and not world.any_rank(not has_it):
            return newest  # on one machine: all have read the same files
        source = world.size - world.highest(world.size - world.rank if has_it else 0)
        if source == world.size:
            return None
        step, state = world.share_json([step, dict(newest.state) if newest else {}], source=source)
        adapter = world.share_tensors(newest.adapter if newest else {}, source=source)
        moments = world.share_tensors(newest.moments if newest else {}, source=source)
        return checkpoint.Checkpoint(step, state, adapter, moments)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint. If the disk is full or refuses, the older one stays and training continues."""
        if not self._world.is_leader:
            return
        parameters = self._student.parameters
        moments = checkpoint.optimiser_moments(self._optimiser, parameters)
        state = {**progress.as_state(self.settings), _LENGTHS: self._lengths_sha256}
        current = checkpoint.Checkpoint(progress.steps_done, state, parameters, moments)
        try:
            checkpoint.save(self.folder, current, keep_step=progress.validation.best_step)
            self.steps_saved = progress.steps_done
        except StoreError as error:
            kept = "the last good checkpoint is kept" if self.steps_saved else "there is none before it"
            self.notes.append(f"warning: {error.message}; {kept}")

    def load_adapter(self, step: int) -> bool:
        """Put the adapter of the checkpoint of `step` into the student; False if it is absent or damaged."""
        stored = checkpoint.adapter_of_step(self.folder, step)
        if stored is None:
            return False
        with torch.no_grad():
            for name, parameter in self._student.parameters.items():
                parameter.copy_(stored[name])
        return True

    @cached_property
    def _lengths_sha256(self) -> str:
        return hashlib.sha256(self._inputs.dataset.lengths.tobytes()).hexdigest()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything the weights depend on, by dotted name. Hashes the base, so it is computed once."""
        return settings_of(self._config, self._inputs, self._student.device)


def settings_of(config: TrainConfig, inputs: TrainingInputs, device: torch.device) -> dict[str, Any]:
    """Return everything that the weights of a training depend on, by dotted name. Hashes the base."""
    sections = config.model_dump(mode="json")
    settings = {
        f"{section}.{key}": sections[section][key]
        for section in ("data", "lora", "train")
        for key in sections[section]
    }
    for key in _FREE_SETTINGS:
        settings.pop(key, None)
    if config.student.quantise != "none":
        settings["student.quantise"] = config.student.quantise
    # Earlier checkpoints don't know these settings.
    if not config.train.deterministic:
        del settings["train.deterministic"]
    if config.train.soft_targets == "off":
        settings = {key: value for key, value in settings.items() if not key.startswith("train.soft_")}
    dataset = inputs.dataset
    return {
        **settings,
        # Of one process: several divide the cores among them, and may resume what one has begun.
        "train.threads": thread_count(config.train) if device.type == "cpu" else 0,
        "corpus": dataset.sha256,
        "corpus.examples": len(dataset.examples),
        "corpus.tokens": dataset.tokens,
        "base": weights.base_sha256(config.base),
        "template": inputs.renderer.template_sha256,
    }
