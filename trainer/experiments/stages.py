"""Train and score students for an experiment; both are done once for the same content.

A training is known by the hash of its base, template, settings and rows, a score by that of the student, the
held-out prompts and how they are judged. What is known is read instead of made again, so a killed experiment
goes on where it stopped, and a changed setting repeats only what depends on it.

    trainings/KEY/adapter/...     a student; trained.json is written last
    scores/KEY.json               scores of the held-out prompts
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.quality.verifiers.verifiers import AnswerVerdict
from harvester.system import failpoints
from trainer.config import OutSection, TrainConfig, TrainSection
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.dataset import HeldOut, Rows
from trainer.errors import DataError
from trainer.evaluation.evaluate import (
    HeldOutTest,
    answer_limit,
    generate_answers,
    judged_text,
    make_cheaper,
)
from trainer.evaluation.evaluated_rows import taught_lengths
from trainer.evaluation.judging import verifiers_of
from trainer.evaluation.scorecard import HEADLINE_SPLIT
from trainer.experiments.power_law import Floats
from trainer.files import read_json, write_json
from trainer.model import model, self_test, weights
from trainer.model.made_files import are_unchanged, made_files
from trainer.training.forward import pack_losses
from trainer.training.reporter import Callbacks
from trainer.training.train import train

# Version of what the keys are computed from: a new one repeats everything.
FORMAT = 1
# Settings that change no weight.
_FREE_SETTINGS = ("log_every", "log_every_s", "save_every", "trackers", "checkpointing", "shard")
Note = Callable[[str], None]
# Reports progress: units done, units in all, what is done.
Progress = Callable[[int, int, str], None]


def no_progress(_done: int, _total: int, _what: str) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class Score:
    """Scores of the held-out prompts, in their order.

    Attributes:
        values: 1 or 0, or nats per token of the teacher's answer; None for a prompt that can't be scored.
        weights: tokens of the teacher's answer for a loss, else 1.
    """

    values: tuple[float | None, ...]
    weights: tuple[float, ...]


def headline_split(held_out: Sequence[HeldOut]) -> tuple[HeldOut, ...]:
    """Return the prompts of the split that a scorecard shows first: "held_out", else the first by name."""
    splits = sorted({held.split for held in held_out})
    name = HEADLINE_SPLIT if HEADLINE_SPLIT in splits else next(iter(splits), "")
    return tuple(held for held in held_out if held.split == name)


def prompt_weights(tasks: Sequence[str]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return the weight of each prompt in a macro accuracy, and the number of its task."""
    names = sorted(set(tasks))
    share = np.array([1.0 / list(tasks).count(task) for task in names])
    strata = np.array([names.index(task) for task in tasks], dtype=np.int64)
    return share[strata], strata


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def rows_sha256(rows: Rows) -> str:
    """Return the SHA-256 of the rows that are learned, in their order, with their weights."""
    hashed = hashlib.sha256(repr(rows.weights).encode())
    for s in rows.train:
        row = (s.key, s.sample_index, s.messages, s.request_json, s.outcome, s.reasoning, s.completion)
        hashed.update(json.dumps(row).encode() + b"\n")
    return hashed.hexdigest()


# Keys of [evaluate] that choose no adapter.
_SCORECARD_ONLY = {"speed_prompts", "machine_usd_per_hour", "general_prompts"}


class Stages:
    """Trains and scores the students of one experiment in its folder.

    Args:
        config: the train.toml; its `[out] path` is not used.
        folder: of the experiment.
        held_out: prompts of one split, to score with.
        rows: the largest set of rows that is learned; it decides how long answers may be if no held-out
            prompt has an answer of the teacher.
        measure: "accuracy" or "loss".
        on_note: called with lines for the operator.
        on_progress: called with steps made, or prompts answered.

    Raises:
        DataError: no prompt can be scored.
        StudentError: the base can't be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        rows: Rows,
        measure: str,
        *,
        on_note: Note = lambda _: None,
        on_progress: Progress = no_progress,
    ) -> None:
        weights.check_base(config.base, config.student.sha256)
        self._config = model.fit_to_device(config)
        self._found: set[str] = set()
        self._folder = folder
        self._measure = measure
        self._on_note = on_note
        self._on_progress = on_progress
        self.held_out = headline_split(rows.held_out)
        self._renderer = Renderer(model.load_tokenizer(config.base, config.template))
        self._verifiers = verifiers_of(config)
        if not self.held_out:
            raise DataError(
                "no prompt is held out to score students with",
                place=str(config.corpus),
                remedy=f"give rows a {config.data.split_field!r} other than 'train', or set eval_share",
            )
        targets = dataset.held_out_examples(self.held_out, self._renderer, config)
        limit = answer_limit(
            config,
            self.held_out,
            lambda: taught_lengths(targets, rows, self._renderer, config),
            self._renderer,
        )
        self._test = HeldOutTest(config, self._renderer, self.held_out, targets, limit)

    @cached_property
    def _base_sha256(self) -> str:
        return weights.base_sha256(self._config.base)

    @cached_property
    def _held_out_sha256(self) -> str:
        return digest([asdict(held) for held in self.held_out])

    @cached_property
    def _judging(self) -> dict[str, Any]:
        """Everything a score depends on besides the student."""
        judging: dict[str, Any] = {
            "format": FORMAT,
            "base": self._base_sha256,
            "template": self._renderer.template_sha256,
            "measure": self._measure,
            "held_out": self._held_out_sha256,
            "reasoning": self._config.data.reasoning,
        }
        if self._measure == "loss":
            return {**judging, "max_length": self._config.train.max_length}
        verify = {task: table.model_dump(mode="json") for task, table in self._config.verify.items()}
        functions = {table.function for table in self._config.verify.values() if table.kind == "python"}
        sources = {name: self._source_of(name) for name in sorted(map(str, functions))}
        return {**judging, "limit": self._test.limit, "verify": verify, "functions": sources}

    def _source_of(self, function: str) -> str:
        """Return the text of the file beside train.toml that a verifier's function is in; else ""."""
        module = function.partition(":")[0].replace(".", "/")
        path = self._config.root / f"{module}.py"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def _settings(self, seed: int, steps: int | None) -> TrainSection:
        """Return `[train]` for a seed and, if they are given, for exactly so many steps."""
        settings: dict[str, Any] = {"seed": seed}
        if steps is not None:
            # An epoch has a step at least.
            settings |= {"epochs": steps, "max_steps": steps}
        return self._config.train.model_copy(update=settings)

    def training_key(self, rows: Rows, seed: int, steps: int | None = None) -> str:
        """Return what a training is known by: the hash of its base, template, settings and rows."""
        config = self._config
        settings = self._settings(seed, steps).model_dump(mode="json", exclude=set(_FREE_SETTINGS))
        chooses = config.evaluate.every != 0  # then evaluations choose the adapter
        return digest(
            {
                "format": FORMAT,
                "base": self._base_sha256,
                "template": self._renderer.template_sha256,
                "data": config.data.model_dump(mode="json", exclude={"corpus"}),
                "lora": config.lora.model_dump(mode="json"),
                "train": settings,
                "evaluate": config.evaluate.model_dump(mode="json", exclude=_SCORECARD_ONLY)
                if chooses
                else None,
                "held_out": self._held_out_sha256 if chooses else None,
                "rows": rows_sha256(rows),
            }
        )

    def train(
        self, rows: Rows, seed: int, title: str, steps: int | None = None
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
            self._on_note(f"{title}: done before")
            self._found.add(key)
            return key, done
        self._on_note(title)
        out = OutSection(path=str(folder), name=self._config.name, licence=self._config.out.licence)
        config = self._config.model_copy(update={"train": self._settings(seed, steps), "out": out})
        # The folder is named after the content, so only the number of cores can have changed.
        callbacks = Callbacks(
            on_step=lambda log: self._on_progress(log.step, log.steps, f"{title}, loss {log.loss:.3f}")
        )
        trained = train(config, callbacks, rows=rows, allow_change=True)
        summary = {"key": key, **asdict(trained)}
        failpoints.reach("stages.trained")
        write_json(folder / "trained.json", {**summary, "files": made_files(folder, [config.student_path])})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return key, summary

    def was_found(self, training: str) -> bool:
        """Return whether this training was finished before `train` was asked for it."""
        return training in self._found

    def adapter_of(self, training: str) -> Path:
        """Return the folder of a student's adapter, or of its model where all weights were trained."""
        return self._folder / "trainings" / training[:16] / self._config.student_path.name

    def score(self, training: str | None, title: str) -> Score:
        """Score a student, or find its score.

        Args:
            training: its key; None for the base.
            title: of the student, for the operator.

        Raises:
            StudentError, OutOfMemory: see `trainer.evaluation.evaluate.evaluate`.
        """
        key = digest({**self._judging, "training": training})
        path = self._folder / "scores" / f"{key[:16]}.json"
        if (stored := _stored_score(path, key, len(self.held_out))) is not None:
            return stored
        config = self._config
        model.set_threads(config.train)
        device = model.select_device(config.train)
        if training is None:
            student = model.load_base_of(config, device)
        else:
            student = model.load_trained_student(config, self.adapter_of(training), device)
            if self._measure == "accuracy":
                make_cheaper(student, config, device)
        score = self._loss(student) if self._measure == "loss" else self._accuracy(student, title)
        failpoints.reach("stages.scored")
        write_json(path, {"key": key, "training": training, **asdict(score)})
        return score

    def teacher_score(self) -> Score | None:
        """Judge the teacher's own answers; None for a loss, which a teacher's text does not give."""
        if self._measure == "loss":
            return None
        return self._judged([held.teacher for held in self.held_out])

    def _accuracy(self, student: Any, title: str) -> Score:
        count = len(self.held_out)
        answers = generate_answers(
            self._test,
            student,
            self._on_note,
            lambda done: self._on_progress(done, count, f"answers of {title}"),
        )
        texts = [judged_text(self._renderer.decode(a.ids), self._renderer, self._config) for a in answers]
        return self._judged(texts)

    def _judged(self, texts: Sequence[str | None]) -> Score:
        passed: list[float | None] = []
        for held, text in zip(self.held_out, texts, strict=True):
            outcome = "ok" if text is not None else "missing"
            judged = self._verifiers.judge(replace(held.candidates[0], text=text, outcome=outcome)).verdict
            passed.append(None if judged == AnswerVerdict.UNVERIFIABLE else judged == AnswerVerdict.PASSED)
        return Score(tuple(None if value is None else float(value) for value in passed), (1.0,) * len(passed))

    def _loss(self, student: Any) -> Score:
        import torch

        device = next(student.parameters()).device
        student.requires_grad_(False)
        forward = self_test.check_student(student, self._config.base)
        values: list[float | None] = []
        tokens: list[float] = []
        with torch.no_grad(), self_test.attention_of(student, forward.layout):
            for held in self.held_out:
                examples = dataset.held_out_examples([held], self._renderer, self._config)
                count = sum(example.supervised for example in examples)
                losses = pack_losses(student, examples, device, forward) if examples else ()
                summed = sum(float(loss) for loss, _ in losses)
                values.append(summed / count if count else None)
                tokens.append(float(count))
        return Score(tuple(values), tuple(tokens))


def _stored_score(path: Path, key: str, prompts: int) -> Score | None:
    stored = read_json(path)
    if not isinstance(stored, Mapping) or stored.get("key") != key or len(stored["values"]) != prompts:
        return None
    return Score(tuple(stored["values"]), tuple(stored["weights"]))
