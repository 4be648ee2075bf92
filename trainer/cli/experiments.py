"""Commands that run several stages or trainings: `distil`, `curve`, `loop`, `onpolicy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from harvester.system.command_line.extras import require
from harvester.system.command_line.verb_command import VerbApp
from trainer.cli.options import AS_JSON, MANY
from trainer.console import (
    print_message,
    print_result,
    progress_bar,
)

# The stages of `trainer distil`, in order.
Stage = Literal["harvest", "curate", "plan", "train", "evaluate", "export", "report"]


def register(app: VerbApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(section=MANY)(distil)
    app.command(section=MANY)(curve)
    app.command(section=MANY)(loop)
    app.command(section=MANY)(onpolicy)


def distil(
    config: Path = typer.Argument(
        ..., metavar="DISTIL", help="Path of a distil.toml (`trainer init` writes one).", show_default=False
    ),
    until: Stage = typer.Option("report", help="Last stage to run."),
    first: Stage = typer.Option(
        "harvest", "--from", help="First stage to run; what those before it made last is used as it is."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Go from prompts to a student: harvest, curate, plan, train, evaluate, export, report.

    A stage whose input did not change is not repeated, and an interrupted one goes on: the same command
    resumes. distil.html shows all of it.

    Example: trainer distil my-student/distil.toml
    """
    require("train", "`trainer distil`")
    from trainer.distil.config import load_distil

    files = load_distil(config)
    from trainer.distil import report
    from trainer.distil.inputs import require_own_folder
    from trainer.distil.pipeline import Distillation
    from trainer.process import lock_output_folder

    require_own_folder(files)
    with (
        lock_output_folder(files.folder, "`trainer distil`", "`out` in distil.toml"),
        progress_bar("distil", "steps or prompts") as update,
    ):
        result = Distillation(files, print_message, update).run(first, until)
    lines = [*report.text_lines(result), f"page in {result['page']}"]
    print_result(result, lines, as_json=as_json)


def curve(
    config: Path = typer.Argument(
        ..., metavar="CURVE", help="Path of a curve.toml (keys: trainer/CONFIG.md).", show_default=False
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Train on nested subsets of the corpus and predict what the next dollar brings; write curve.html.

    Stages that are done are not repeated: the same command resumes.

    Example: trainer curve curve.toml
    """
    require("train", "`trainer curve`")
    from trainer.experiments.curve_config import load_curve

    settings, loaded, folder = load_curve(config)
    from trainer.experiments.subsets import plan_curve

    planned = plan_curve(settings, loaded, folder)  # a fault in the corpus is reported before torch is loaded
    from trainer.experiments import curve_report
    from trainer.experiments.curve import measure_curve
    from trainer.experiments.trainings import Display
    from trainer.live.stage_view import StageView
    from trainer.process import lock_output_folder

    with (
        lock_output_folder(folder, "`trainer curve`", "`out` in curve.toml"),
        progress_bar("curve", "steps or prompts") as update,
    ):
        display = Display(print_message, update, StageView(print_message, update))
        result = measure_curve(planned, display)
        files = curve_report.write(result, folder, loaded.name)
    _print_report(result, curve_report.text_lines(result), files, as_json=as_json)


def loop(
    config: Path = typer.Argument(
        ..., metavar="LOOP", help="Path of a loop.toml (keys: trainer/CONFIG.md).", show_default=False
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Harvest what the student fails, round by round, train on all so far and score; write loop.html.

    Runs `harvester run` under the budget of loop.toml. What is done is not repeated: the command resumes.

    Example: trainer loop loop.toml
    """
    require("train", "`trainer loop`")
    from trainer.experiments.loop_config import load_loop

    files = load_loop(config)
    from trainer.experiments import loop_report
    from trainer.experiments.loop import Loop
    from trainer.experiments.trainings import Display
    from trainer.live.stage_view import StageView
    from trainer.process import lock_output_folder

    with (
        lock_output_folder(files.folder, "`trainer loop`", "`out` in loop.toml"),
        progress_bar("loop", "steps or prompts") as update,
    ):
        display = Display(print_message, update, StageView(print_message, update))
        result = Loop(files, display).run()
        written = loop_report.write(result, files.folder, files.train.name)
    _print_report(result, loop_report.text_lines(result), written, as_json=as_json)


def onpolicy(
    config: Path = typer.Argument(
        ...,
        metavar="ONPOLICY",
        help="Path of an onpolicy.toml (keys: trainer/CONFIG.md).",
        show_default=False,
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Let the student answer, let the teacher score its tokens, and learn from that; write onpolicy.html.

    Runs `harvester run` with [score] under the budget of onpolicy.toml. What is done is not repeated.

    Example: trainer onpolicy onpolicy.toml
    """
    require("train", "`trainer onpolicy`")
    from trainer.onpolicy.config import load_onpolicy

    files = load_onpolicy(config)
    from trainer.onpolicy import report
    from trainer.onpolicy.rounds import OnPolicy
    from trainer.process import lock_output_folder

    with (
        lock_output_folder(files.folder, "`trainer onpolicy`", "`out` in onpolicy.toml"),
        progress_bar("onpolicy", "rounds or answers") as update,
    ):
        result = OnPolicy(files, print_message, update).run()
        written = report.write(result, files.folder, files.train.name)
    _print_report(result, report.text_lines(result), written, as_json=as_json)


def _print_report(
    result: Mapping[str, Any], lines: Sequence[str], files: tuple[str, str], *, as_json: bool
) -> None:
    """Print what an experiment found, and where its page and its figures are."""
    page, file = files
    shown = [*lines, f"page in {page}, figures in {file}"]
    print_result({**result, "page": page, "file": file}, shown, as_json=as_json)
