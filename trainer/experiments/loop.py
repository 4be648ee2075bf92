"""Run rounds of choose, harvest, train and score (`trainer loop`), and compare with a random choice.

Everything is a function of the configuration, the pool and the stored answers. So a loop that was killed
goes through the same choices again; finished harvests, trainings and scores are found and not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from harvester.export.score import candidate_of
from harvester.quality.held_out import prompt_key
from harvester.quality.verifiers.verifiers import AnswerVerdict, Verifiers
from trainer.data import dataset, row_rules
from trainer.data.dataset import Rows
from trainer.errors import DataError
from trainer.evaluation.judging import verifiers_of
from trainer.experiments import macro_intervals
from trainer.experiments.harvests import Harvests
from trainer.experiments.loop_config import LoopFiles
from trainer.experiments.pool import (
    Choice,
    PoolPrompt,
    choose_hard,
    choose_random,
    in_order,
    read_pool,
)
from trainer.experiments.power_law import Floats, HeldOutScores, percentiles
from trainer.experiments.stages import Score, Stages, prompt_weights
from trainer.experiments.trainings import NO_DISPLAY, Display
from trainer.files import write_text

SCHEMA = "trainer.loop/1"
# Prompts that the student answers in a round, as a multiple of those that are chosen.
CANDIDATES_PER_ROW = 4
_COLUMNS = (
    *("key", "prompt_id", "messages", "completion", "outcome", "reference", "tags", "metadata_json"),
    *("purpose", "cost_microusd", "source_file"),
)


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row of the training split.

    Attributes:
        prompt: hash of the prompt's content.
        passed: whether the teacher's answer passed its verifier.
        is_chosen: whether a loop in this folder asked for it, in this run or before.
    """

    key: str
    prompt: str
    dollars: float
    passed: bool
    is_chosen: bool


@dataclass
class Arm:
    """One way of choosing: what it has chosen so far, and its students.

    Attributes:
        chosen: hashes of the chosen prompts.
        training: key of the newest student.
        rounds: facts of each round, for the report.
        scores: of the students, by round.
    """

    name: str
    chosen: set[str] = field(default_factory=set)
    training: str | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


class Loop:
    """Runs the rounds of one loop.

    Raises:
        DataError: the pool can't be used.
    """

    def __init__(self, files: LoopFiles, display: Display = NO_DISPLAY) -> None:
        self._files = files
        self._config = files.config
        self._display = display
        self._verifiers: Verifiers = verifiers_of(files.train)
        self._pool = read_pool(files.pool, files.system, files.train.data, self._verifiers)
        self._harvests = Harvests(files)
        self._chosen = files.folder / "chosen"
        self._held_out: Stages | None = None

    def run(self) -> dict[str, Any]:
        """Run all rounds; return the content of loop.json (see trainer/CONFIG.md).

        Raises:
            HarvestFailed: a harvest ended early. DataError: no held-out prompt, or nothing to learn.
            TermsRefused: the terms do not permit training.
        """
        ending = "complete" if self._harvests.run_own() else "budget"
        rows, held_out = self._read_store()
        started = {row.key for row in rows if not row.is_chosen}
        taken = held_out | {row.prompt for row in rows if not row.is_chosen}
        arms = [Arm(name) for name in self._files.arms]
        for number in range(1, self._config.rounds + 1):
            choices = [self._choose(arm, number, taken) for arm in arms] if ending == "complete" else []
            if not choices or not all(choice.prompts for choice in choices):
                ending = "pool" if ending == "complete" else ending
                break
            if not all(self._harvest(arm, number, c) for arm, c in zip(arms, choices, strict=True)):
                ending = "budget"
                if len(arms) > 1:  # the arms would no longer have the same number of rows
                    break
            rows, _ = self._read_store()
            for arm, choice in zip(arms, choices, strict=True):
                arm.chosen |= {prompt.key for prompt in choice.prompts}
                self._learn(arm, number, choice, rows, started)
        return {**self._result(arms, ending), "pool": len(in_order(self._pool, taken, 0))}

    def _read_store(self) -> tuple[list[StoredRow], set[str]]:
        """Read the rows of the training split, and the hashes of the prompts that are held out."""
        rows: list[StoredRow] = []
        held_out: set[str] = set()
        for sample in dataset.paid_samples(self._files.train, _COLUMNS):
            prompt = prompt_key(sample.messages)
            if row_rules.split_of(sample, prompt, self._files.train.data) != "train":
                held_out.add(prompt)
                continue
            passed = self._verifiers.judge(candidate_of(sample)).verdict == AnswerVerdict.PASSED
            source = (self._files.harvest.parent / sample.source_file).resolve()
            is_chosen = source.parent == self._chosen
            rows.append(StoredRow(sample.key, prompt, sample.cost_microusd / 1e6, passed, is_chosen))
        return [row for row in rows if row.prompt not in held_out], held_out

    def _choose(self, arm: Arm, number: int, taken: set[str]) -> Choice:
        """Choose the prompts of a round: random ones in the first round, as no student has learned yet."""
        ordered = in_order(self._pool, taken | arm.chosen, self._config.seed)
        count = self._config.rows_per_round
        if arm.name == "random" or number == 1:
            return choose_random(ordered, count)
        asked = ordered[: self._config.candidates or CANDIDATES_PER_ROW * count]
        return choose_hard(ordered, self._answered(arm, number, asked), count)

    def _answered(self, arm: Arm, number: int, asked: Sequence[PoolPrompt]) -> Mapping[str, float | None]:
        """Return which of these prompts the student of the round before answers correctly."""
        if not asked:
            return {}
        rows = dataset.read(self._files.train, self._learned_keys(arm))
        pool = replace(rows, held_out=tuple(prompt.as_held_out() for prompt in asked))
        stages = self._stages(pool, on_pool=True)
        score = stages.score(arm.training, f"round {number}, {arm.name}: student on the pool")
        return {prompt.key: value for prompt, value in zip(asked, score.values, strict=True)}

    def _stages(self, rows: Rows, *, on_pool: bool = False) -> Stages:
        if not on_pool and self._held_out is not None:
            return self._held_out
        stages = Stages(
            self._files.train,
            self._files.folder,
            rows,
            "accuracy",
            self._display,
        )
        if not on_pool:
            self._held_out = stages
        return stages

    def _learned_keys(self, arm: Arm) -> frozenset[str]:
        return frozenset(arm.rounds[-1]["keys"])

    def _harvest(self, arm: Arm, number: int, choice: Choice) -> bool:
        """Ask the teacher for the chosen prompts; return whether the budget sufficed."""
        self._display.note(f"round {number}, {arm.name}: harvesting {len(choice.prompts):,} prompts")
        name = "first" if number == 1 else f"{arm.name}-{number}"  # all arms share the first round
        path = self._chosen / f"{name}.jsonl"
        write_text(path, "".join(f"{prompt.line}\n" for prompt in choice.prompts))
        return self._harvests.run_chosen(path)

    def _learn(
        self, arm: Arm, number: int, choice: Choice, rows: Sequence[StoredRow], started: set[str]
    ) -> None:
        """Train on all rows so far whose answers are right, and score the student."""
        paid = [row for row in rows if row.key in started or row.prompt in arm.chosen]
        learned = frozenset(row.key for row in paid if row.passed)
        if not learned:
            raise DataError(
                f"none of {len(paid):,} answers passes its verifier, so there is nothing to learn",
                place=str(self._files.train.corpus),
                remedy="check [verify] of train.toml, and the references of the pool",
            )
        read = dataset.read(self._files.train, learned)
        stages = self._stages(read)
        title = f"round {number}, {arm.name}: training on {len(read.train):,} rows"
        arm.training, _ = stages.train(read, self._files.train.train.seed, title)
        arm.scores.append(stages.score(arm.training, f"round {number}, {arm.name}"))
        costs = {row.key: row.dollars for row in paid}
        arm.rounds.append(
            {
                "choose": arm.name,
                "round": number,
                "chosen": len(choice.prompts),
                "asked": choice.asked,
                "failed": choice.failed,
                "filled": choice.filled,
                "rows": len(costs),
                "learned": len(read.train),
                "dollars": sum(costs.values()) if all(costs.values()) else None,
                "keys": learned,
            }
        )

    def _result(self, arms: Sequence[Arm], ending: str) -> dict[str, Any]:
        if self._held_out is None:
            raise DataError(
                "the loop ended before its first round was complete",
                place=str(self._files.train.corpus),
                remedy="raise max_usd or max_tokens" if ending == "budget" else "add prompts to the pool",
            )
        stages, base = self._held_out, self._held_out.score(None, "the base")
        teacher = stages.teacher_score()
        assert teacher is not None
        scores = [base, teacher, *(score for arm in arms for score in arm.scores)]
        scored = self._scored_by_all(stages, scores)
        values = np.array([[[float(s.values[n] or 0.0) for n in scored]] for s in scores])
        table = HeldOutScores(values, *prompt_weights([stages.held_out[n].task for n in scored]))
        drawn = table.resampled(np.random.default_rng(self._config.seed), self._config.resamples)
        facts = [_facts(table, drawn, at) for at in range(len(scores))]
        count = len(arms[0].rounds)
        rounds = [
            {**{k: v for k, v in row.items() if k != "keys"}, **facts[2 + place * count + at]}
            for place, arm in enumerate(arms)
            for at, row in enumerate(arm.rounds)
        ]
        return {
            "schema": SCHEMA,
            "choose": self._config.choose,
            "seed": self._config.seed,
            "ending": ending,
            "held_out": {
                "split": stages.held_out[0].split,
                "prompts": len(stages.held_out),
                "scored": len(scored),
            },
            "base": facts[0],
            "teacher": facts[1],
            "rounds": rounds,
            "differences": _differences(table, drawn, count) if len(arms) > 1 else [],
            "resamples": self._config.resamples,
        }

    def _scored_by_all(self, stages: Stages, scores: Sequence[Score]) -> list[int]:
        """Return the numbers of the held-out prompts that every student's answer could be judged for.

        Raises:
            DataError: there is none.
        """
        scored = [n for n in range(len(stages.held_out)) if all(s.values[n] is not None for s in scores)]
        if not scored:
            raise DataError(
                "no held-out prompt can be judged",
                place=str(self._files.train.corpus),
                remedy="give held-out prompts a reference or a [verify] table",
            )
        return scored


def _facts(table: HeldOutScores, drawn: Floats, at: int) -> dict[str, float]:
    found = macro_intervals.accuracy(table.values[at, 0], table.strata, percentiles(drawn[:, at]))
    return {"score": found["value"], "low": found["low"], "high": found["high"]}


def _differences(table: HeldOutScores, drawn: Floats, rounds: int) -> list[dict[str, float]]:
    """Return by round how much better the choice is than the random one, paired over the prompts.

    The first round is one training, which both have: its difference is 0, without doubt.
    """
    differences = [{"round": 1, "value": 0.0, "low": 0.0, "high": 0.0}]
    for number in range(1, rounds):
        ours, control = 2 + number, 2 + rounds + number
        limits = percentiles(drawn[:, ours] - drawn[:, control])
        first, second = table.values[ours, 0], table.values[control, 0]
        found = macro_intervals.difference(first, second, table.strata, limits)
        differences.append({"round": number + 1, **found})
    return differences
