"""mock-teacher and demo: everything that runs without a key, a GPU or a network."""

from __future__ import annotations

from pathlib import Path

import typer

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(
        "mock-teacher",
        epilog="Example: harvester mock-teacher --port 8000 --rpm 600 --latency 0.2",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        add_help_option=False,
    )(mock_teacher)
    app.command(epilog="Example: harvester demo data/demo")(demo)


def mock_teacher(context: typer.Context) -> None:
    """Serve the mock teacher: a real HTTP server with limits, faults and a billing ledger (own --help)."""
    from harvester.mock_teacher.__main__ import main

    raise typer.Exit(main(context.args, "harvester mock-teacher"))


def demo(
    folder: Path | None = typer.Argument(None, help="Where to work; default data/demo of the checkout."),
    as_json: bool = JSON,
) -> None:
    """The whole journey, offline: harvest the mock teacher, train a student, score it, report."""
    from harvester.cli import demo as journey
    from harvester.cli.console import emit

    where = folder or journey.CHECKOUT / "data" / "demo"
    summary = journey.run_demo(where)
    emit(summary, journey.closing_lines(where, summary), as_json=as_json)
