"""Train a student by `trainer train` and score it on the held-out prompts, each once for the same content.

trainings/KEY/train.toml, adapter, answers.jsonl, calibration.json, seconds.json (written last)
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.quality import cache, commands, full_divergence, held_out
from benchmarks.quality.harvests import SKILLS, Harvest, Harvests

# Of all trainings, unless a training says otherwise.
LORA = {"rank": 32, "alpha": 64}
TRAIN = {
    "batch_tokens": 2048,
    "max_length": 256,
    "lr": 3e-3,
    "lr_floor": 0.02,
    "warmup": 0.03,
    "threads": 1,
}
# Tokens after which an answer is cut; the longest reference takes 12 and 40. A base never ends its answers.
MAX_NEW_TOKENS = {"student": 16, "student_bpe": 48}


@dataclass(frozen=True)
class Training:
    """A student to train.

    Attributes:
        harvest: what it learns from.
        epochs: passes over the rows.
        student: a folder in data/skills.
        data, train: further keys of these tables of train.toml.
        knows_all: learn the teacher's whole distribution, read from its weights.
        has_scorecard: score by `trainer evaluate`, the base, too; else only the student, as `held_out` does.
    """

    harvest: Harvest
    epochs: int
    student: str = "student"
    seed: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    knows_all: bool = False
    has_scorecard: bool = False

    def with_seed(self, seed: int) -> Training:
        """Return the same training with another seed."""
        return replace(self, seed=seed)


class Trainings:
    """Trains and scores in a folder, in the processes of a pool."""

    def __init__(self, folder: Path, harvests: Harvests, pool: commands.Pool) -> None:
        self._folder = folder / "trainings"
        self._harvests = harvests
        self._pool = pool

    def folder_of(self, training: Training) -> Path:
        """Return the folder of a training."""
        rows = self._harvests.folder_of(training.harvest).name
        teacher = SKILLS / training.harvest.teacher if training.knows_all else "by HTTP"
        text = train_toml(training, Path("corpus"), Path("base"))
        return self._folder / cache.digest(SKILLS / training.student, rows, text, teacher)

    def start(self, training: Training) -> Future[Any] | None:
        """Start a training whose harvest is made; None if it is done already."""
        folder = self.folder_of(training)
        if (folder / "seconds.json").exists():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        corpus = self._harvests.folder_of(training.harvest) / "store"
        (folder / "train.toml").write_text(
            train_toml(
                training,
                Path(os.path.relpath(corpus, folder)),
                Path(os.path.relpath(SKILLS / training.student, folder)),
            )
        )
        teacher = SKILLS / training.harvest.teacher if training.knows_all else None
        return self._pool.start(train_and_score, folder, teacher, training.has_scorecard)


def train_toml(training: Training, corpus: Path, base: Path) -> str:
    """Return a train.toml whose output folder is its own."""
    return commands.toml(
        {
            "student": {"base": str(base)},
            "data": {"corpus": str(corpus), **training.data},
            "lora": LORA,
            "train": {**TRAIN, "epochs": training.epochs, "seed": training.seed, **training.train},
            "evaluate": {"max_new_tokens": MAX_NEW_TOKENS[training.student], "resamples": 200},
            "out": {"path": "."},
            "verify.'*'": {"kind": "exact"},
        }
    )


def train_and_score(folder: Path, teacher: Path | None, has_scorecard: bool) -> None:
    """Do what is missing in the folder of a training. Runs in a process of its own.

    Args:
        teacher: the folder of the teacher whose whole distribution is learned; None: what the corpus has.
        has_scorecard: as in `Training`.
    """
    config, log = folder / "train.toml", folder / "log.txt"
    began, spent = time.monotonic(), commands.cpu_s()
    if teacher is not None:
        full_divergence.train(config, teacher)
    else:
        commands.trainer(log, "train", config, "--json")
    trained = time.monotonic()
    if has_scorecard:
        held_out.Trained.load(config).write_calibration()
        commands.trainer(log, "evaluate", config, "--json")
    else:
        held_out.score(config)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    seconds = {
        "train": round(trained - began, 1),
        "all": round(time.monotonic() - began, 1),
        "cpu": round(commands.cpu_s() - spent, 1),
    }
    cache.write_json(folder / "seconds.json", seconds)


def answers_of(folder: Path) -> list[dict[str, Any]]:
    """Return the answers of student and teacher to the held-out prompts; with a scorecard the base's, too."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
