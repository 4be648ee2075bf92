"""Compute what the trainings show: accuracies, recoveries, losses and differences, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import calibration
from benchmarks.quality.bootstrap import Array, Bootstrap, Interval
from benchmarks.quality.cache import read_json
from benchmarks.quality.trainings import answers_of

# Pairs of arms whose accuracies are compared: the first minus the second.
PAIRS = (
    ("E2", "E1"),
    ("E3", "E3 greedy"),
    ("E3", "E3 budget"),
    ("E4", "E3"),
    ("E5", "E2 small"),
    ("E5", "E6"),
    ("E5 unsure", "E6 unsure"),
    ("E5 unsure", "E2 unsure"),
    ("E7", "E5"),
    ("E9", "E9 text"),
    ("E10 none", "E10 clean"),
    ("E10 majority", "E10 none"),
    ("E10 verified", "E10 none"),
    ("E13", "E2 small"),
)
# Pairs that are compared by loss and calibration error, too.
SURENESS_PAIRS = (
    ("E5", "E2 small"),
    ("E5", "E6"),
    ("E5 unsure", "E6 unsure"),
    ("E5 unsure", "E2 unsure"),
    ("E7", "E5"),
    ("E9", "E9 text"),
    ("E13", "E2 small"),
)
CONTENT, PHRASING, UNTAUGHT = "held_out", "held_out_phrasing", "held_out_task"


@dataclass
class Results:
    """Everything that is reported, by the name of an arm or pair.

    Attributes:
        accuracy, by_seed: mean over the tasks on new content; teacher: of the arm's teacher.
        recovery: accuracy over that of the teacher.
        splits: accuracy and recovery on other held-out splits, by split and arm.
        tasks: accuracy of the student and its teacher, by arm and task.
        loss, error: nats a token on right answers, and expected calibration error.
        differences: by measure and pair.
        loop: hard minus random by round, and accuracies by choice and round.
        curve: the content of curve.json.
        reverse_kl: of E13 before and after, by seed, in nats per token on held-out prompts.
    """

    accuracy: dict[str, Interval] = field(default_factory=dict)
    by_seed: dict[str, list[float]] = field(default_factory=dict)
    teacher: dict[str, Interval] = field(default_factory=dict)
    recovery: dict[str, Interval] = field(default_factory=dict)
    splits: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)
    tasks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    loss: dict[str, Interval] = field(default_factory=dict)
    error: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, dict[str, Interval]] = field(default_factory=dict)
    loop: dict[str, dict[str, Interval]] = field(default_factory=dict)
    curve: dict[str, Any] | None = None
    reverse_kl: list[tuple[float, float]] = field(default_factory=list)
    base: Interval | None = None


class Students:
    """The answers of all arms to the held-out prompts of one split, and what is computed from them.

    Args:
        folders: of the trainings of each arm, one a seed.
    """

    def __init__(self, folders: Mapping[str, Sequence[Path]], split: str) -> None:
        of_arms = {name: [_answers(folder, split) for folder in each] for name, each in folders.items()}
        first = next(iter(of_arms.values()))[0]
        self.prompts = list(first)
        self.bootstrap = Bootstrap([first[prompt]["task"] for prompt in self.prompts])
        self._weights = self.bootstrap.macro_weights()
        self._right = {
            who: {name: self._is_right(each, who) for name, each in of_arms.items()}
            for who in ("student", "teacher")
        }
        with_base = [each for each in of_arms.values() if all("base" in row for row in each[0].values())]
        self._right["base"] = {"E0": self._is_right(with_base[0][:1], "base")} if with_base else {}

    def _is_right(self, seeds: Sequence[Mapping[str, dict[str, Any]]], who: str) -> Array:
        return np.array(
            [[_passes(rows[prompt], who) for prompt in self.prompts] for rows in seeds], dtype=float
        )

    def totals(self, name: str, who: str = "student", seeds: int | None = None) -> Array:
        """Return accuracies: as measured, then of each resample; of the first so many seeds."""
        right: Array = self._right[who][name][:seeds]
        return self.bootstrap.totals((right * self._weights)[..., None])[:, 0]

    def base(self) -> Interval | None:
        """Return the accuracy of the base; None if no arm has a scorecard."""
        return self.bootstrap.interval(self.totals("E0", "base")) if self._right["base"] else None

    def by_seed(self, name: str) -> list[float]:
        """Return the accuracy of each seed."""
        return [float(value) for value in self._right["student"][name] @ self._weights]

    def by_task(self, name: str) -> dict[str, list[float]]:
        """Return the accuracies of student and teacher by task."""
        rows = {who: self._right[who][name].mean(axis=0) for who in ("student", "teacher")}
        is_of = {task: self.bootstrap.task_of == task for task in self.bootstrap.tasks}
        return {task: [float(rows[who][at].mean()) for who in rows] for task, at in is_of.items()}

    def sureness(self, folders: Sequence[Path]) -> Array:
        """Return the totals of `calibration.FEATURES` of an arm."""
        stored = [read_json(folder / "calibration.json") for folder in folders]
        return self.bootstrap.totals(np.array([[each[prompt] for prompt in self.prompts] for each in stored]))

    def of_loops(self, scores: Sequence[Mapping[tuple[str, int], Array]]) -> dict[tuple[str, int], Array]:
        """Return accuracies by choice and round: as measured, then of each resample."""
        return {
            key: self.bootstrap.totals((np.array([each[key] for each in scores]) * self._weights)[..., None])[
                :, 0
            ]
            for key in scores[0]
        }


def _answers(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    rows = sorted(answers_of(folder), key=lambda row: str(row["prompt_id"]))
    return {row["prompt_id"]: row for row in rows if row["split"] == split}


def _passes(row: Mapping[str, Any], who: str) -> bool:
    text = row[who]
    return text is not None and text.strip() == row["reference"].strip()


def compute(folders: Mapping[str, Sequence[Path]]) -> tuple[Results, Students]:
    """Return the results of all arms; those of the loop and the curve are added by the caller."""
    results = Results()
    students = Students(folders, CONTENT)
    interval = students.bootstrap.interval

    @cache
    def sums(name: str, seeds: int) -> Array:
        return students.sureness(folders[name][:seeds])

    measures: dict[str, Callable[[str, int], Array]] = {
        "accuracy": lambda name, seeds: students.totals(name, seeds=seeds),
        "loss": lambda name, seeds: calibration.loss(sums(name, seeds)),
        "error": lambda name, seeds: calibration.error(sums(name, seeds)),
    }
    for name, of in folders.items():
        right, teacher = students.totals(name), students.totals(name, "teacher")
        results.accuracy[name] = interval(right)
        results.by_seed[name] = students.by_seed(name)
        results.teacher[name] = interval(teacher)
        results.recovery[name] = interval(right / teacher)
        results.tasks[name] = students.by_task(name)
        results.loss[name] = interval(measures["loss"](name, len(of)))
        results.error[name] = interval(measures["error"](name, len(of)))
    results.base = students.base()
    for measure, pairs in (("accuracy", PAIRS), ("loss", SURENESS_PAIRS), ("error", SURENESS_PAIRS)):
        results.differences[measure] = {}
        for a, b in pairs:
            if a in folders and b in folders:
                # An arm with one seed is compared with that seed of the other.
                seeds = min(len(folders[a]), len(folders[b]))
                difference = measures[measure](a, seeds) - measures[measure](b, seeds)
                results.differences[measure][f"{a} - {b}"] = interval(difference)
    claimed = {name: of for name, of in folders.items() if name in ("E1", "E2")}
    for split in (PHRASING, UNTAUGHT) if claimed else ():
        results.splits[split] = _on_split(claimed, split)
    return results, students


def _on_split(folders: Mapping[str, Sequence[Path]], split: str) -> dict[str, dict[str, Interval]]:
    students = Students(folders, split)
    interval = students.bootstrap.interval
    found: dict[str, dict[str, Interval]] = {}
    for name in folders:
        right, teacher = students.totals(name), students.totals(name, "teacher")
        found[name] = {"accuracy": interval(right)}
        if teacher.min() > 0:
            found[name]["recovery"] = interval(right / teacher)
    return found
