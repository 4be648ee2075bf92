"""`harvester judge`: ask a teacher to judge the answers of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from harvester.cli.commands import HARVEST, HarvesterApp
from harvester.cli.console import JSON, emit, message
from harvester.cli.harvest import run_prepared
from harvester.cli.run_options import CONFIG
from harvester.system.command_line.shell_words import shell_word

if TYPE_CHECKING:
    from harvester.config.config import HarvestConfig
    from harvester.run.endings import Summary
    from harvester.run.judging import Written

# Exit codes of a harvest that asked all it could.
_DONE = frozenset({0, 3})


def register(app: HarvesterApp) -> None:
    """Add the command."""
    app.command(epilog="Example: harvester judge judge.toml", section=HARVEST)(judge)


def judge(
    config: Path = CONFIG,
    prompts_only: bool = typer.Option(
        False, "--prompts-only", help="Only write the judge's prompts: `harvester plan` then shows the cost."
    ),
    verdicts_file: Path | None = typer.Option(
        None, "--verdicts", help="Also write a line of JSON for each answer or pair: id, key, verdict."
    ),
    as_json: bool = JSON,
) -> None:
    """Ask a teacher to score answers, or to compare them with others, in both orders.

    CONFIG is a harvest.toml with a table [judge] instead of prompts; it names a corpus, or a file of pairs.
    Run it again to resume: what is stored is never asked again. A reply without a verdict is asked for once
    more. curate.toml filters by verdicts.
    """
    from harvester.cli import malloc

    malloc.use_one_arena()  # before Arrow is imported

    from harvester.config import config as settings
    from harvester.export.verdicts import Verdicts, read_verdicts
    from harvester.run import judging, signals

    signals.end_at_once()
    loaded, root = settings.load(config), config.resolve().parent
    if verdicts_file is not None:
        judging.check_target(loaded, root, verdicts_file)
    written = judging.write_prompts(loaded, root)
    if prompts_only:
        data = {"prompts": written.prompts, "rows": written.rows, "left_out": dict(written.left_out)}
        emit(
            data, [f"wrote {written.prompts:,} prompts to {root / loaded.prompts.files[0]}"], as_json=as_json
        )
        return
    if not written.rows:
        if verdicts_file is not None:
            judging.write_verdicts(loaded, root, Verdicts(), verdicts_file)
        lines = ["no answer to judge", *_left_out_line(written)]
        emit(
            {"judge": loaded.teacher.teacher_id, "judged": 0, "left_out": dict(written.left_out)},
            lines,
            as_json=as_json,
        )
        return
    summary = _harvest(config)
    verdicts = read_verdicts(loaded, root)
    if summary.exit_code in _DONE and verdicts.unreadable:
        judging.write_prompts(loaded, root, frozenset(verdicts.unreadable))
        summary = _harvest(config)
        verdicts = read_verdicts(loaded, root)
    if verdicts_file is not None:
        judging.write_verdicts(loaded, root, verdicts, verdicts_file)
    if summary.exit_code not in _DONE:
        for line in summary.lines()[:-1]:  # its last line is the command that resumes a harvest
            message(line)
        message(f"resume with: {summary.steps_to_resume(f'harvester judge {shell_word(config)}')}")
    facts = verdicts.facts()
    if not facts["judged"] and summary.exit_code in _DONE:
        message("warning: no reply names a verdict: does the rubric ask for the JSON that is read?")
    data = {
        "judge": loaded.teacher.teacher_id,
        **facts,
        "rows": written.rows,
        "left_out": dict(written.left_out),
        "ending": summary.ending,
        "detail": summary.detail,
        "exit_code": summary.exit_code,
    }
    emit(data, _lines(loaded, written, facts), as_json=as_json)
    raise typer.Exit(summary.exit_code)


def _harvest(config: Path) -> Summary:
    """Ask what the prompt file holds and the store does not."""
    from harvester.run import prepare

    prepared = prepare.prepare(config)
    for line in prepared.lines():
        message(line)
    return run_prepared(prepared)


def _left_out_line(written: Written) -> list[str]:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in written.left_out.items())
    return [f"left out  {reasons}"] if reasons else []


def _lines(config: HarvestConfig, written: Written, facts: dict[str, Any]) -> list[str]:
    lines = [f"judged    {facts['judged']:,} of {written.rows:,} answers by {config.teacher.model}"]
    lines += _left_out_line(written)
    if facts["repaired"] or facts["unreadable"]:
        lines.append(
            f"replies   {facts['repaired']:,} were read after one repair, "
            f"{facts['unreadable']:,} name no verdict"
        )
    if "mean_score" in facts:
        counts = ", ".join(f"{score}: {count:,}" for score, count in facts["scores"].items())
        lines.append(f"scores    mean {facts['mean_score']:g}; {counts}")
    if "win" in facts:
        lines.append(f"pairs     {facts['win']:,} won, {facts['tie']:,} tied, {facts['loss']:,} lost")
    if first := facts.get("first_wins"):
        lines.append(
            f"order     the answer shown first won {first['share']:.1%} of the decided comparisons "
            f"({first['low']:.1%} to {first['high']:.1%}; 50 % is fair); {facts['order_decided']:,} pairs "
            "were decided by the order alone and count as ties"
        )
    return lines
