"""terms: what the registry says about teachers, offline; recording needs a person at a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")
BESIDE = typer.Option(Path(), "--beside", help="Folder of harvest.toml; its terms/ and permissions/ count.")
RECORD = typer.Argument(..., help="Id of a terms record.", show_default=False)
Outcome = Literal["unchanged", "changed"]

desk = typer.Typer(
    no_args_is_help=True, help="What the terms of teachers permit: a reading, not legal advice."
)


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    desk.command("list", epilog="Example: harvester terms list --permit")(list_records)
    desk.command(epilog="Example: harvester terms show openai-api-2026-01-01")(show)
    desk.command(epilog="Example: harvester terms check my-run/harvest.toml")(check)
    desk.command(epilog="Example: harvester terms record --beside my-run")(record)
    desk.command(epilog="Example: harvester terms review mock-teacher --beside my-run")(review)
    app.add_typer(desk, name="terms")


def list_records(
    permit: bool = typer.Option(False, "--permit", help="Only records that permit, with or without duties."),
    due: bool = typer.Option(False, "--due", help="Only records whose reading is due, expired or changed."),
    beside: Path = BESIDE,
    as_json: bool = JSON,
) -> None:
    """All records: layer, verdict, how well established, when read."""
    from datetime import UTC, datetime

    from harvester import terms_desk
    from harvester.commands.console import emit
    from harvester.registry import load_registry

    rows = terms_desk.listed(load_registry(beside / "terms"), datetime.now(UTC).date(), only_due=due)
    rows = [row for row in rows if not permit or row["verdict"] in {"permit", "duties"}]
    emit({"records": rows}, terms_desk.table(rows), as_json=as_json)


def show(record_id: str = RECORD, beside: Path = BESIDE) -> None:
    """Everything one record says: gist, URL, dates, duties."""
    from datetime import UTC, datetime

    from harvester import terms_desk
    from harvester.commands.console import emit
    from harvester.registry import load_registry

    registry = load_registry(beside / "terms")
    emit({}, terms_desk.shown(registry, record_id, datetime.now(UTC).date()), as_json=False)


def check(
    config: Path = typer.Argument(..., help="Path of a harvest.toml.", show_default=False),
    as_json: bool = JSON,
) -> None:
    """What the gate would say to a harvest; exit 77 when it would refuse."""
    from harvester import config as settings
    from harvester import prepare, terms_desk
    from harvester.commands.console import emit
    from harvester.errors import TermsRefused

    verdict = prepare.gate(settings.load(config), config.resolve().parent)
    emit(terms_desk.as_json(verdict), terms_desk.checked(verdict), as_json=as_json)
    if not verdict.permitted:
        raise typer.Exit(TermsRefused.exit_code)


def record(beside: Path = BESIDE) -> None:
    """Record a permission you hold: an interview at a terminal; there is no flag for it."""
    import sys

    from harvester import terms_desk
    from harvester.commands.console import emit

    path = terms_desk.ask_permission(
        beside / "permissions",
        lambda question: str(typer.prompt(question, default="")),
        isatty=sys.stdin.isatty(),
    )
    emit(
        {},
        [f"recorded in {path}; its hash goes into the lineage of what is harvested under it"],
        as_json=False,
    )


def review(
    record_id: str = RECORD,
    outcome: Outcome = typer.Option("unchanged", help="What you found when you read the text again."),
    beside: Path = BESIDE,
) -> None:
    """Note that you read a record's text again, today."""
    import sys
    from datetime import UTC, datetime

    from harvester import terms_desk
    from harvester.commands.console import emit
    from harvester.registry import load_registry

    known = terms_desk.found(load_registry(beside / "terms"), record_id)
    fresh = terms_desk.reviewed(known, outcome, datetime.now(UTC).date(), isatty=sys.stdin.isatty())
    emit({}, [f"noted in {terms_desk.write_review(beside / 'terms', fresh)}"], as_json=False)
