"""Commands that need no key, no GPU and no network: `mock-teacher`, `demo`."""

from __future__ import annotations

from pathlib import Path

import typer

from harvester.cli.console import JSON, emit


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(
        "mock-teacher",
        epilog="Example: harvester mock-teacher --port 8000 --rpm 600 --latency 0.2",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        add_help_option=False,
    )(mock_teacher)
    app.command(epilog="Example: harvester demo data/demo")(demo)


def mock_teacher(context: typer.Context) -> None:
    """Start the mock teacher: a local HTTP server with limits, faults and a billing ledger.

    `harvester mock-teacher --help` lists its options.
    """
    from harvester.mock_teacher.__main__ import main

    raise typer.Exit(main(context.args, "harvester mock-teacher"))


def demo(
    folder: Path | None = typer.Argument(
        None,
        metavar="FOLDER",
        help="Folder to work in; default: data/demo of the checkout, else distillation-demo.",
    ),
    as_json: bool = JSON,
) -> None:
    """Run everything once, offline: harvest the mock teacher, train a student, score it, write a report."""
    from harvester.cli.demo import default_folder, run_demo, summary_lines

    work_folder = folder or default_folder()
    summary = run_demo(work_folder)
    emit(summary, summary_lines(work_folder, summary), as_json=as_json)
