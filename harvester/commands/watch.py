"""status: what a store's job is doing, from any terminal."""

from __future__ import annotations

from pathlib import Path

import typer

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog="Example: harvester status my-run/store --check --max-age 10m")(status)


def status(
    store: Path = typer.Argument(..., help="The store's folder.", show_default=False),
    check: bool = typer.Option(False, "--check", help="Exit 1 unless alive or complete."),
    max_age: str = typer.Option("10m", help="How old the heartbeat may be for --check."),
    as_json: bool = JSON,
) -> None:
    """Say what is held, what it cost and what it waits for; works while a run lives."""
    import time

    from harvester import job, prepare, report
    from harvester.commands.console import emit
    from harvester.errors import FindingsError

    found = job.status(store)
    emit(found, report.status_lines(found), as_json=as_json)
    if check:
        age_s = time.time() - float(found.get("updated_at", 0))
        fresh = found.get("alive") and age_s <= (prepare.seconds(max_age) or 0)
        if found.get("state") != "complete" and not fresh:
            raise FindingsError(
                f"no live job: {found.get('state', 'never ran')}, last heartbeat {age_s:.0f} s ago",
                place=str(store),
                remedy="`harvester run` resumes it",
            )
