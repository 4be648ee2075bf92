"""Train and score students for an experiment; both are done once for the same content.

A score is known by the hash of the student, the held-out prompts and how they are judged; trainings: see
`trainings`. What is known is read instead of made again.

    trainings/KEY/adapter/...     a student
    scores/KEY.json               scores of the held-out prompts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.quality.verifiers.verifiers import AnswerVerdict
from harvester.system import failpoints
from trainer.config import TrainConfig
from trainer.data.dataset import Rows
from trainer.data.held_out import HeldOut, held_out_examples
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
from trainer.experiments.trainings import (
    FORMAT,
    NO_DISPLAY,
    Display,
    Trainings,
    digest,
    held_out_sha256,
    require_held_out,
)
from trainer.files import read_json, write_json
from trainer.model import model, self_test
from trainer.publish import serving
from trainer.training.forward import pack_losses


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


class Stages(Trainings):
    """Trains and scores the students of one experiment in its folder.

    Args:
        config: the train.toml; its `[out] path` is not used.
        folder: of the experiment.
        held_out: prompts of one split, to score with.
        rows: the largest set of rows that is learned; it decides how long answers may be if no held-out
            prompt has an answer of the teacher.
        measure: "accuracy" or "loss".
        display: what is told meanwhile.

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
        display: Display = NO_DISPLAY,
    ) -> None:
        super().__init__(
            config,
            folder,
            lambda: held_out_sha256(self.held_out),
            display,
        )
        self._measure = measure
        self.held_out = headline_split(rows.held_out)
        self._verifiers = verifiers_of(config)
        require_held_out(self.held_out, config)
        targets = held_out_examples(self.held_out, self._renderer, config)
        limit = answer_limit(
            config,
            self.held_out,
            lambda: taught_lengths(targets, rows, self._renderer, config),
            self._renderer,
        )
        self._test = HeldOutTest(config, self._renderer, self.held_out, targets, limit)

    @cached_property
    def _judging(self) -> dict[str, Any]:
        """Everything a score depends on besides the student."""
        judging: dict[str, Any] = {
            "format": FORMAT,
            **self._student_key,
            "measure": self._measure,
            "held_out": self._held_out_sha256,
            "reasoning": self._config.data.reasoning,
        }
        if self._measure == "loss":
            return {**judging, "max_length": self._config.train.max_length}
        verify = {task: table.model_dump(mode="json") for task, table in self._config.verify.items()}
        functions = {table.function for table in self._config.verify.values() if table.kind == "python"}
        sources = {name: self._source_of(name) for name in sorted(map(str, functions))}
        stops = serving.other_stops(self._config, self._renderer)
        return {
            **judging,
            "limit": self._test.limit,
            "verify": verify,
            "functions": sources,
            **({"stops": stops} if stops else {}),
        }

    def _source_of(self, function: str) -> str:
        """Return the text of the file beside train.toml that a verifier's function is in; else ""."""
        module = function.partition(":")[0].replace(".", "/")
        path = self._config.root / f"{module}.py"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

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
            self._display.note,
            lambda done: self._display.progress(done, count, f"answers of {title}"),
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
                examples = held_out_examples([held], self._renderer, self._config)
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
