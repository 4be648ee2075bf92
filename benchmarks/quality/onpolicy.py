"""Distil on-policy by `trainer onpolicy` (E13), from the students of "E2 small".

The student answers prompts of the harvest pool, the weaker teacher scores its tokens over HTTP, and each
round makes one step on the reverse KL divergence. Before and after, the student is scored as all others are.

    onpolicy/KEY/onpolicy.toml, out/adapter, out/answers.jsonl, seconds.json (written last)
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.quality import cache, commands, held_out
from benchmarks.quality.harvests import (
    SKILLS,
    Harvest,
    Harvests,
    harvest_toml,
    scored_rows,
    train_rows,
)
from benchmarks.quality.trainings import Training, Trainings, train_toml


@dataclass(frozen=True)
class Rounds:
    """How much is answered and scored.

    Attributes:
        pool: prompts to choose from.
        top_logprobs: tokens that the teacher lists at each token of the student.
        lr: constant; the one of 3e-3, 1e-3 and 3e-4 with the lowest divergence on the prompts that were
            learned, in a trial with a seed of its own.
    """

    pool: int = 4000
    rounds: int = 15
    prompts_per_round: int = 96
    samples: int = 4
    top_logprobs: int = 20
    lr: float = 3e-4
    held_out_prompts: int = 100
    held_out_samples: int = 2


class OnPolicy:
    """Runs the on-policy distillations in a folder, in the processes of a pool."""

    def __init__(
        self,
        folder: Path,
        harvests: Harvests,
        trainings: Trainings,
        pool: commands.Pool,
        rounds: Rounds = Rounds(),
    ) -> None:
        self._rounds = rounds
        self._folder = folder / "onpolicy"
        self._harvests = harvests
        self._trainings = trainings
        self._pool = pool

    def folder_of(self, start: Training) -> Path:
        """Return the folder of a distillation that begins with a trained student."""
        before = self._trainings.folder_of(start).name
        teacher = SKILLS / start.harvest.teacher
        return self._folder / cache.digest(before, asdict(self._rounds), teacher, SKILLS / start.student)

    def is_done(self, start: Training) -> bool:
        """Return whether a distillation has ended."""
        return (self.folder_of(start) / "seconds.json").exists()

    def start(self, start: Training) -> Future[Any] | None:
        """Start a distillation; None if it is done already.

        Its teacher is served at the port of the harvests until it has ended.
        """
        folder = self.folder_of(start)
        if self.is_done(start):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        before, rounds, teacher = self._trainings.folder_of(start), self._rounds, start.harvest.teacher
        pool = self.pool_of(start)
        (folder / "harvest.toml").write_text(harvest_toml(pool, self._harvests.port, "prompts.jsonl"))
        cache.write_lines(folder / "prompts.jsonl", [*train_rows(pool), *scored_rows(pool)])
        settings = {**start.train, "lr": rounds.lr}
        base = Path(os.path.relpath(SKILLS / start.student, folder))
        learning = train_toml(replace(start, train=settings), Path("store"), base)
        (folder / "train.toml").write_text(learning.replace('path = "."', 'path = "student"'))
        corpus = Path(os.path.relpath(self._harvests.folder_of(start.harvest) / "store", folder))
        (folder / "evaluate.toml").write_text(
            train_toml(start, corpus, base).replace('path = "."', 'path = "out"')
        )
        values = asdict(rounds)
        del values["pool"]
        values |= {
            "harvest": "harvest.toml",
            "train": "train.toml",
            "prompts": ["prompts.jsonl"],
            "start": os.path.relpath(before / "adapter", folder),
            "teacher_tokenizer": os.path.relpath(SKILLS / teacher, folder),
            "max_new_tokens": 16,
            "seed": start.seed,
            "held_out_every": 0,
            "out": "out",
        }
        (folder / "onpolicy.toml").write_text(commands.toml(values))
        return self._pool.start(distil, folder)

    def pool_of(self, start: Training) -> Harvest:
        """Return the prompts that are chosen from; they are never asked as a whole."""
        harvest = start.harvest
        return Harvest(harvest.teacher, self._rounds.pool, splits=harvest.splits, test_each=harvest.test_each)

    def facts(self, starts: Sequence[Training]) -> list[dict[str, Any]]:
        """Return the content of onpolicy.json of each."""
        return [cache.read_json(self.folder_of(start) / "out" / "onpolicy.json") for start in starts]


def distil(folder: Path) -> None:
    """Distil and score in the folder of a distillation. Runs in a process of its own."""
    began, spent = time.monotonic(), commands.cpu_s()
    commands.trainer(folder / "log.txt", "onpolicy", folder / "onpolicy.toml", "--json")
    held_out.score(folder / "evaluate.toml")
    seconds = {"all": round(time.monotonic() - began, 1), "cpu": round(commands.cpu_s() - spent, 1)}
    cache.write_json(folder / "seconds.json", seconds)
