"""Commands that judge a student and what it learned from: `evaluate`, `audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from harvester.system.command_line.extras import require
from harvester.system.command_line.verb_command import VerbApp
from trainer.cli.options import JUDGE
from trainer.console import (
    print_message,
    print_result,
    print_scorecard,
    progress_bar,
    progress_lines,
)

if TYPE_CHECKING:
    from trainer.config import TrainConfig
from trainer.cli.options import AS_JSON, CONFIG


def register(app: VerbApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(section=JUDGE)(evaluate)
    app.command(section=JUDGE)(audit)


def evaluate(
    config: Path = CONFIG,
    harness: list[str] = typer.Option(
        [], help="Task of lm-evaluation-harness to score, too; may be given several times (extra `harness`)."
    ),
    harness_tasks: Path | None = typer.Option(
        None, help="Folder of task files of your own.", exists=True, file_okay=False
    ),
    harness_limit: int | None = typer.Option(
        None, min=1, help="Most examples per --harness task; default: all."
    ),
    merged: Path | None = typer.Option(
        None, help="Exported student to score on these tasks, too.", exists=True, file_okay=False
    ),
    gguf: Path | None = typer.Option(
        None,
        help="Exported folder whose GGUF files to score, too (extra `gguf`).",
        exists=True,
        file_okay=False,
    ),
    gguf_limit: int | None = typer.Option(
        None, min=1, help="Most held-out prompts per GGUF file; default: all."
    ),
    judge_only: bool = typer.Option(
        False, "--judge-only", help="Only ask [evaluate] judge about the answers of the last evaluation."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Let base and student answer the held-out prompts; write scorecard.json beside the adapter.

    Example: trainer evaluate train.toml
    """
    from trainer.config import load

    loaded = load(config)
    if judge_only:
        _judge_answers(loaded, as_json=as_json)
        return
    require("train", "`trainer evaluate`")
    from trainer import actions
    from trainer.evaluation import harness as lm_harness
    from trainer.evaluation import preferences

    tasks = actions.HarnessTasks(tuple(harness), harness_tasks, harness_limit, merged)
    with progress_bar("score", "prompts") as update:
        card = actions.evaluate(loaded, tasks, update, print_message, gguf=gguf, gguf_limit=gguf_limit)
    print_scorecard(card)
    lines: list[str] = []
    lines += preferences.lines(card[preferences.KEY]) if loaded.evaluate.judge else ()
    lines += lm_harness.lines(card[lm_harness.KEY]) if harness else ()
    if gguf is not None:
        from trainer.evaluation import gguf_scores

        lines += gguf_scores.lines(card[gguf_scores.KEY])
    for line in lines:
        print_message(line)
    path = str(loaded.out_path / "scorecard.json")
    answers = str(loaded.out_path / "answers.jsonl")
    print_result(
        {**card, "scorecard": path},
        [
            f"scorecard in {path}",
            f"answers of base, student and teacher in {answers}",
            f"where student and teacher disagree: {loaded.out_path / 'disagreements.html'}",
        ],
        as_json=as_json,
    )
    if loaded.evaluate.judge:
        preferences.require_complete(card)


def _judge_answers(config: TrainConfig, *, as_json: bool) -> None:
    """Let the judge compare the answers of the last evaluation, and print what it says."""
    from trainer.evaluation import preferences

    card = preferences.judge(config)
    for line in preferences.lines(card[preferences.KEY]):
        print_message(line)
    path = str(config.out_path / "scorecard.json")
    print_result({**card, "scorecard": path}, [f"scorecard in {path}"], as_json=as_json)
    preferences.require_complete(card)


def audit(
    config: Path = CONFIG,
    folds: int = typer.Option(
        2,
        min=0,
        help="Folds for cross-fitting: one student is trained per fold. 0: train none, rank by the finished "
        "student's loss.",
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Find rows that contradict the others, wrong answers above all; write audit.html beside the adapter.

    For each fold a student is trained on the other folds: two folds cost about one training. The same
    command resumes.

    Example: trainer audit train.toml
    """
    require("train", "`trainer audit`")
    from trainer.config import load

    if folds == 1:
        raise typer.BadParameter("one fold has no other rows to learn from; name 0, 2 or more")
    loaded = load(config)
    print_message("reading corpus")
    from trainer.evaluation.audit import audit as run_audit

    result = run_audit(loaded, folds, print_message, progress_lines("tokenising", "rows"))
    lines = [
        f"{result['rows']:,} rows, the most suspicious first: {result['file']}",
        f"page: {result['page']}",
    ]
    print_result(result, lines, as_json=as_json)
