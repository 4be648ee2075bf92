"""Run the stages from prompts to a student (`trainer distil`), each once for what it reads.

    stages/NAME-KEY.json        what a stage did; written when it is complete
    curated/KEY/                curated corpora
    trainings/KEY/              students, with scorecard.json and merged/; see `trainer.experiments.stages`
    student                     link to the merged student that was exported last

A stage is done if it has a record of what it reads now, and the files that it made are as it made them. A
stage whose files another setting overwrote, or that are damaged, or that was killed, is made again. A harvest
asks only for what its store lacks, and a training goes on from its checkpoint.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harvester.export.cards.curation import CURATION_NAME
from harvester.store.reader import holds_answers
from trainer import actions
from trainer.actions import HarnessTasks, Note, Update
from trainer.config import OutSection, TrainConfig
from trainer.data.answers import version_of_weights
from trainer.distil import report
from trainer.distil.config import DistilFiles
from trainer.distil.inputs import content_of, key_of, rows_of
from trainer.distil.mock import mock_teacher
from trainer.distil.records import Records, StageResult
from trainer.errors import CommandFailed, ConfigError, DataError, HarvestFailed
from trainer.evaluation import preferences
from trainer.files import read_json
from trainer.harvester_process import DONE, ending_of, run_harvester
from trainer.live.stage_view import StageView
from trainer.model.made_files import made_files

SCHEMA = "trainer.distil/1"
STAGES = ("harvest", "curate", "plan", "train", "evaluate", "export", "report")
# Fields of the summary of a harvest that are kept.
_HARVEST_FACTS = (
    *("ending", "exit_code", "rows_total", "requests_sent", "answers_stored", "from_cache", "dead"),
    *("cost_microusd", "input_tokens", "output_tokens", "warnings"),
)
_CARD_FACTS = ("split", "macro", "recovery", "recovery_low", "recovery_high", "loss", "judge_exit_code")
# Version of how a student is scored: a new one scores it again. 2: answers end where servers end them, two
# held-out prompts of one id are two, and the teacher's cost is that of the rows that `where` is about.
_SCORES = 2

# Set in the result of a stage that found its work done, though it has no record of it.
_FOUND = "found"


class Distillation:
    """Runs the stages of one distil.toml."""

    def __init__(self, files: DistilFiles, note: Note, update: Update) -> None:
        self._files = files
        self._note = note
        self._update = update
        self._records = Records(files.folder)
        self._done: dict[str, StageResult] = {}

    def run(self, first: str = STAGES[0], last: str = STAGES[-1]) -> dict[str, Any]:
        """Run the stages from `first` to `last`; write the page of all that is done.

        Args:
            first: those before it are not run: what they made last is used as it is.

        Returns:
            The content of distil.json.

        Raises:
            ConfigError: `last` comes before `first`, or a stage before `first` was never done.
            HarvestFailed, CommandFailed: a command of the harvester ended early; has its exit code.
            What the commands of the trainer raise.
        """
        if STAGES.index(last) < STAGES.index(first):
            raise ConfigError(
                f"{last} comes before {first}", place="--until", remedy=f"the order is {', '.join(STAGES)}"
            )
        for name in STAGES[: STAGES.index(last) + 1]:
            if name == "curate" and self._files.curate is None:
                continue
            if STAGES.index(name) < STAGES.index(first):
                self._done[name] = self._made_before(name)
                continue
            self._done[name] = self._stage(name)
        facts = {
            "schema": SCHEMA,
            "name": self._files.name,
            "stages": [done.as_dict() for done in self._done.values()],
        }
        page, file = report.write(facts, self._files.folder)
        return {**facts, "page": page, "file": file}

    def _made_before(self, name: str) -> StageResult:
        newest = self._records.newest(name)
        if newest is not None:
            if self._records.is_whole(newest):
                return newest
            raise ConfigError(
                f"the files that the stage {name} made last are damaged, or another setting's",
                place="--from",
                remedy=f"start with --from {name}, or leave it out",
            )
        if name == "harvest" and holds_answers(self._files.store):
            return StageResult(name, "", {}, 0.0, is_new=False)  # by `harvester run`
        raise ConfigError(
            f"the stage {name} was never done",
            place="--from",
            remedy=f"start with --from {name}, or leave it out",
        )

    def _stage(self, name: str) -> StageResult:
        """Make a stage, or find that it is done."""
        key, make = self._plan_of(name)
        found = self._records.find(name, key)
        if found is not None and self._is_done(found):
            self._note(f"{name}: done before")
            done = found
        else:
            self._note(f"{name}:")
            began = time.monotonic()
            result = make(key)
            is_new = not result.pop(_FOUND, False)
            seconds = time.monotonic() - began
            files = made_files(self._files.folder, _made(name, result))
            done = StageResult(name, key, result, seconds, is_new=is_new, files=files)
        self._records.add(done)
        if name == "evaluate" and not _is_judged(done):
            how = "the same command asks the judge again, `--from export` goes on without it"
            preferences.require_complete(read_json(Path(done.result["scorecard"])), how)
        if name == "export":
            self._link_student(Path(done.result["merged"]))
        return done

    def _is_done(self, found: StageResult) -> bool:
        if found.name == "harvest":
            return holds_answers(self._files.store)
        return found.name != "evaluate" or _is_judged(found)

    def _plan_of(self, name: str) -> tuple[str, Callable[[str], dict[str, Any]]]:
        """Return the key of a stage, and the function that makes it."""
        files = self._files
        # What a stage made counts, too: one that was made again need not have made the same.
        keys = {name: key_of(key=done.key, files=done.files) for name, done in self._done.items()}
        outputs = [files.store, files.folder, files.train.corpus, files.train.out_path]
        match name:
            case "harvest":
                return key_of(harvest=content_of(files.harvest, outputs)), self._harvest
            case "curate":
                assert files.curate is not None
                content = content_of(files.curate, outputs)
                key = key_of(harvest=keys["harvest"], curate=content, rows=rows_of(files.store))
                return key, self._curate
            case "plan" | "train":
                content = content_of(files.train_file, outputs)
                version = version_of_weights(files.train.data)
                key = key_of(stage=name, train=content, rows=rows_of(self._corpus()), **version)
                return key, self._plan if name == "plan" else self._train
            case "evaluate":
                return key_of(train=keys["train"], scores=_SCORES), self._evaluate
            case "export":
                # Its commands for servers name folders of this machine.
                config, places = files.config, [str(files.folder), str(files.train.base)]
                key = key_of(train=keys["train"], dtype=config.dtype, gguf=config.gguf, places=places)
                return key, self._export
            case _:
                return key_of(stages=keys), self._report

    def _corpus(self) -> Path:
        """Return the folder that is learned from."""
        return self._files.store if self._files.curate is None else Path(self._done["curate"].result["out"])

    def _train_config(self, folder: Path | None = None) -> TrainConfig:
        """Return train.toml with the corpus of this call, and with the folder of a training as [out]."""
        config, name = self._files.train, self._files.name
        data = config.data.model_copy(update={"corpus": str(self._corpus())})
        path = config.out.path if folder is None else str(folder)
        out = OutSection(path=path, name=name, licence=config.out.licence)
        return config.model_copy(update={"data": data, "out": out})

    def _trained(self) -> TrainConfig:
        """Return the configuration of what was trained; it finds the token store that the training used."""
        config = self._train_config(Path(self._done["train"].result["adapter"]).parent)
        data = config.data.model_copy(update={"cache": str(self._train_config().cache)})
        return config.model_copy(update={"data": data})

    def _harvest(self, _key: str) -> dict[str, Any]:
        files = self._files
        teacher = mock_teacher(files.harvest, files.folder / "mock-teacher.log", self._note)
        with teacher if files.config.mock_teacher else nullcontext():
            code, summary = run_harvester("run", files.harvest.path)
        if code not in DONE:
            how = "the same command goes on, `--from curate` goes on with what is stored"
            raise HarvestFailed(code, how, *ending_of(summary))
        return {name: summary.get(name) for name in _HARVEST_FACTS}

    def _curate(self, key: str) -> dict[str, Any]:
        assert self._files.curate is not None
        out = self._files.folder / "curated" / key[:16]
        shutil.rmtree(out, ignore_errors=True)  # without a record, or damaged
        _run("curate", self._files.curate.path, "--out", out)
        facts = read_json(out / CURATION_NAME)
        if not facts["kept"]:
            dropped = ", ".join(f"{count:,}: {reason}" for reason, count in facts["dropped"].items())
            raise DataError(
                f"the filters kept no row; dropped {dropped or 'none, for the corpus has no row'}",
                place=str(self._files.curate.path),
                remedy="loosen these filters, or look at the answers (`harvester report STORE`)",
            )
        return {"out": str(out), "kept": facts["kept"], "dropped": facts["dropped"]}

    def _plan(self, _key: str) -> dict[str, Any]:
        from trainer.training.plan import plan

        return asdict(plan(self._train_config()))

    def _train(self, _key: str) -> dict[str, Any]:
        from trainer.data import dataset
        from trainer.experiments.stages import Stages
        from trainer.experiments.taught_store import trainings_of_store
        from trainer.experiments.trainings import Display, TaughtRows, Trainings

        config, folder = self._train_config(), self._files.folder
        display = Display(self._note, self._update, StageView(self._note, self._update))
        rows: dataset.Rows | TaughtRows
        trainings: Trainings
        if dataset.is_stored(config):
            trainings, rows = trainings_of_store(config, folder, display)
            learned = rows.store.rows.learned
        else:
            rows = dataset.read(config)
            trainings = Stages(config, folder, rows, "accuracy", display)
            learned = rows.learned
        training, made = trainings.train(rows, config.train.seed, f"training on {learned:,} rows")
        found = {_FOUND: True} if trainings.was_found(training) else {}
        return {
            **made,
            **found,
            "adapter": str(trainings.adapter_of(training)),
        }  # the folder may have been moved

    def _evaluate(self, key: str) -> dict[str, Any]:
        config = self._trained()
        if self._records.find("evaluate", key) is None:
            card = actions.evaluate(config, HarnessTasks(), self._update, self._note)
        else:  # only the judge did not end
            self._note("the judge compares answers")
            card = preferences.judge(config)
        if preferences.KEY in card:
            card |= {"judge_exit_code": card[preferences.KEY]["exit_code"]}
        facts = {name: card[name] for name in _CARD_FACTS if name in card}
        return {**facts, "scorecard": str(config.out_path / "scorecard.json")}

    def _export(self, _key: str) -> dict[str, Any]:
        config = self._trained()
        exported = actions.export(
            config, config.out_path / "merged", self._files.config.dtype, self._files.config.gguf
        )
        return {**exported.as_dict(), "student": str(self._files.folder / "student")}

    def _link_student(self, merged: Path) -> None:
        link = self._files.folder / "student"
        aside = link.with_name(".student")
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.relpath(merged, link.parent))
        aside.replace(link)

    def _report(self, _key: str) -> dict[str, Any]:
        files, config = self._files, self._trained()
        page = files.folder / "report.html"
        scorecard = self._done["evaluate"].result["scorecard"]
        training = ("--training", config.out_path / "train.jsonl")
        _run("report", files.store, "--out", page, "--scorecard", scorecard, *training)
        return {"report": str(page)}


def _is_judged(evaluated: StageResult) -> bool:
    """Return whether the judge of an evaluation was asked about all pairs, or there is none."""
    return evaluated.result.get("judge_exit_code", 0) in DONE


def _made(name: str, result: Mapping[str, Any]) -> Sequence[Path]:
    """Return the files and folders that a stage made in the output folder."""
    match name:
        case "curate":
            return [Path(result["out"])]
        case "train":
            adapter = Path(result["adapter"])
            return [adapter, adapter.parent / "train.jsonl"]
        case "evaluate":
            folder = Path(result["scorecard"]).parent
            return [folder / file for file in ("scorecard.json", "answers.jsonl", "disagreements.html")]
        case "export":
            return [Path(result["merged"])]
        case "report":
            return [Path(result["report"])]
        case _:
            return []


def _run(*words: object) -> None:
    """Run a command of the harvester.

    Raises:
        CommandFailed: it failed; has its exit code.
    """
    code, _ = run_harvester(*words)
    if code:
        raise CommandFailed(f"harvester {words[0]}", code)
