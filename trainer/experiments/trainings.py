"""Train students for an experiment, each once for the same content.

A training is known by the hash of its base, tokenizer, template, settings and rows. What is known is read
instead of made again, so a killed experiment goes on where it stopped, and a changed setting repeats what
depends on it.

    trainings/KEY/adapter/...     a student; trained.json is written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from harvester.store.shards.schema import Sample
from harvester.system import failpoints
from trainer.config import OutSection, TrainConfig, TrainSection
from trainer.data import answers
from trainer.data.chat_template import Renderer
from trainer.data.dataset import Rows
from trainer.data.held_out import HeldOut
from trainer.data.tokens.builder import Progress, no_progress
from trainer.data.tokens.token_store import TokenStore
from trainer.errors import DataError
from trainer.files import read_json, write_json
from trainer.model import model, weights
from trainer.model.made_files import are_unchanged, made_files
from trainer.training.logbook import Evaluation, Sampled, StepLog, TrainingStarted
from trainer.training.output_folders import CHECKPOINTS
from trainer.training.reporter import Callbacks
from trainer.training.train import train

# Version of what the keys are computed from: a new one repeats everything.
FORMAT = 2
# Settings that change no weight.
_FREE_SETTINGS = ("log_every", "log_every_s", "save_every", "trackers", "checkpointing", "shard")
Note = Callable[[str], None]
# Shows a training, given its configuration and title, by the events that the function of the block gets.
View = Callable[
    [TrainConfig, str],
    AbstractContextManager[Callable[[TrainingStarted | StepLog | Evaluation | Sampled], None]],
]


@contextmanager
def no_view(_config: TrainConfig, _title: str) -> Iterator[Callable[[object], None]]:
    """Show nothing of a training."""
    yield lambda _event: None


@dataclass(frozen=True, slots=True)
class Display:
    """Hold the functions that show what an experiment does.

    Attributes:
        note: called with lines for the operator.
        progress: called with prompts answered, or rows tokenised.
        view: shows each training.
    """

    note: Note = lambda _: None
    progress: Progress = no_progress
    view: View = no_view


NO_DISPLAY = Display()


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def held_out_sha256(held_out: Iterable[HeldOut]) -> str:
    """Return the SHA-256 of held-out prompts: that of `digest` for the list of them."""
    hashed = hashlib.sha256(b"[")
    for number, held in enumerate(held_out):
        text = json.dumps(asdict(held), sort_keys=True, ensure_ascii=True, default=str)
        hashed.update(f"{', ' if number else ''}{text}".encode())
    hashed.update(b"]")
    return hashed.hexdigest()


def rows_sha256(rows: Rows) -> str:
    """Return the SHA-256 of the rows that are learned, in their order, with their weights."""
    hashed = hashlib.sha256(repr(rows.weights).encode())
    for sample in rows.train:
        hashed.update(row_line(sample))
    return hashed.hexdigest()


def row_line(s: Sample) -> bytes:
    """Return what counts of a row in `rows_sha256`, as a line of JSON."""
    row = (s.key, s.sample_index, s.messages, s.request_json, s.outcome, s.reasoning, s.completion)
    return json.dumps(row).encode() + b"\n"


# Keys of [evaluate] that choose no adapter.
_SCORECARD_ONLY = {"speed_prompts", "machine_usd_per_hour", "general_prompts"}


def require_held_out(held_out: Sequence[HeldOut], config: TrainConfig) -> None:
    """Refuse to train students that can't be scored.

    Raises:
        DataError: no prompt is held out.
    """
    if not held_out:
        raise DataError(
            "no prompt is held out to score students with",
            place=str(config.corpus),
            remedy=f"give rows a {config.data.split_field!r} other than 'train', or set eval_share",
        )


class TaughtRows(Protocol):
    """The rows of a token store that a training learns."""

    @property
    def store(self) -> TokenStore:
        """The store, for `trainer.training.train.train`."""

    def sha256(self) -> str:
        """Return the SHA-256 of the rows that are learned, in their order, with their weights."""


class Trainings:
    """Trains the students of one experiment in its folder.

    Args:
        config: the train.toml; its `[out] path` is not used.
        folder: of the experiment.
        held_out_sha256: returns the hash of the prompts that choose an adapter; see `held_out_sha256`.
        display: what is told meanwhile.

    Raises:
        StudentError: the base can't be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        held_out_sha256: Callable[[], str],
        display: Display = NO_DISPLAY,
    ) -> None:
        weights.check_base(config.base, config.student.sha256)
        self._config = model.fit_to_device(config)
        self._found: set[str] = set()
        self._folder = folder
        self._hash_held_out = held_out_sha256
        self._display = display
        self._renderer = Renderer(model.load_tokenizer(config.base, config.template))

    @cached_property
    def _base_sha256(self) -> str:
        return weights.base_sha256(self._config.base)

    @cached_property
    def _student_key(self) -> dict[str, Any]:
        """What a student is before its training: base, how it is held, tokenizer and template."""
        return {
            "base": self._base_sha256,
            "quantise": self._config.student.quantise,
            "tokenizer": weights.tokenizer_sha256(self._config.base),
            "template": self._renderer.template_sha256,
        }

    @cached_property
    def _held_out_sha256(self) -> str:
        return self._hash_held_out()

    def _settings(self, seed: int, steps: int | None) -> TrainSection:
        """Return `[train]` for a seed and, if they are given, for exactly so many steps."""
        settings: dict[str, Any] = {"seed": seed}
        if steps is not None:
            # An epoch has a step at least.
            settings |= {"epochs": steps, "max_steps": steps}
        return self._config.train.model_copy(update=settings)

    def training_key(self, rows: Rows | TaughtRows, seed: int, steps: int | None = None) -> str:
        """Return what a training is known by: the hash of its base, tokenizer, settings and rows."""
        config = self._config
        settings = self._settings(seed, steps).model_dump(mode="json", exclude=set(_FREE_SETTINGS))
        chooses = config.evaluate.every != 0  # then evaluations choose the adapter
        return digest(
            {
                "format": FORMAT,
                **self._student_key,
                "data": config.data.model_dump(mode="json", exclude={"corpus"}),
                "lora": config.lora.model_dump(mode="json"),
                "train": settings,
                "evaluate": config.evaluate.model_dump(mode="json", exclude=_SCORECARD_ONLY)
                if chooses
                else None,
                "held_out": self._held_out_sha256 if chooses else None,
                "rows": rows_sha256(rows) if isinstance(rows, Rows) else rows.sha256(),
                **answers.version_of_weights(config.data),
            }
        )

    def train(
        self, rows: Rows | TaughtRows, seed: int, title: str, steps: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Train a student, go on with one that was interrupted, or find the finished one.

        Args:
            title: of the training, for the operator.
            steps: optimiser steps, over as many passes as they take; None: those of train.toml.

        Returns:
            the key of the training, and its summary (`trainer.training.train.Trained`).

        Raises:
            What `trainer.training.train.train` raises.
        """
        key = self.training_key(rows, seed, steps)
        folder = self._folder / "trainings" / key[:16]
        done = read_json(folder / "trained.json")
        # Earlier versions did not record the files.
        if isinstance(done, dict) and done.get("key") == key and are_unchanged(folder, done.pop("files", {})):
            self._display.note(f"{title}: done before")
            self._found.add(key)
            return key, done
        self._display.note(title)
        out = OutSection(path=str(folder), name=self._config.name, licence=self._config.out.licence)
        config = self._config.model_copy(update={"train": self._settings(seed, steps), "out": out})
        taught = rows if isinstance(rows, Rows) else rows.store
        with self._display.view(config, title) as show:

            def started(done: int, steps: int, notes: Sequence[str]) -> None:
                show(TrainingStarted(done, steps, tuple(notes)))

            # The folder is named after the content, so only the number of cores can have changed.
            trained = train(config, Callbacks(started, show, show, show), rows=taught, allow_change=True)
        summary = {"key": key, **asdict(trained)}
        failpoints.reach("stages.trained")
        write_json(folder / "trained.json", {**summary, "files": made_files(folder, [config.student_path])})
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return key, summary

    def was_found(self, training: str) -> bool:
        """Return whether this training was finished before `train` was asked for it."""
        return training in self._found

    def adapter_of(self, training: str) -> Path:
        """Return the folder of a student's adapter, or of its model where all weights were trained."""
        return self._folder / "trainings" / training[:16] / self._config.student_path.name
