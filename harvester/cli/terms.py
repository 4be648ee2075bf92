"""terms: what the registry says about teachers, offline; recording needs a person at a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")
BESIDE = typer.Option(
    Path(),
    "--beside",
    exists=True,
    file_okay=False,
    help="Folder of harvest.toml; its terms/ and permissions/ count.",
)
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

    from harvester.cli.console import emit
    from harvester.terms import manage as terms_desk
    from harvester.terms.records import load_registry

    rows = terms_desk.listed(load_registry(beside / "terms"), datetime.now(UTC).date(), only_due=due)
    rows = [row for row in rows if not permit or row["verdict"] in {"permit", "duties"}]
    emit({"records": rows}, terms_desk.table(rows), as_json=as_json)


def show(record_id: str = RECORD, beside: Path = BESIDE, as_json: bool = JSON) -> None:
    """Everything one record says: gist, URL, dates, duties."""
    from datetime import UTC, datetime

    from harvester.cli.console import emit
    from harvester.terms import manage as terms_desk
    from harvester.terms.records import load_registry

    registry, today = load_registry(beside / "terms"), datetime.now(UTC).date()
    data = terms_desk.record_json(terms_desk.found(registry, record_id), today)
    emit(data, terms_desk.shown(registry, record_id, today), as_json=as_json)


def check(
    config: Path = typer.Argument(..., help="Path of a harvest.toml.", show_default=False),
    as_json: bool = JSON,
) -> None:
    """What the gate would say to a harvest; exit 77 when it would refuse."""
    from harvester.cli.console import emit
    from harvester.config import config as settings
    from harvester.errors import TermsRefused
    from harvester.run import prepare
    from harvester.terms import manage as terms_desk

    verdict = prepare.gate(settings.load(config), config.resolve().parent)
    emit(terms_desk.as_json(verdict), terms_desk.checked(verdict), as_json=as_json)
    if not verdict.permitted:
        raise typer.Exit(TermsRefused.exit_code)


def record(beside: Path = BESIDE, as_json: bool = JSON) -> None:
    """Record a permission you hold: an interview at a terminal; there is no flag for it.

    It lies in permissions/ of --beside; questions go to stderr.
    """
    import hashlib
    import sys

    from harvester.cli.console import emit
    from harvester.terms import manage as terms_desk

    path = terms_desk.ask_permission(
        beside / "permissions",
        lambda question: str(typer.prompt(question, default="", err=True)),
        isatty=sys.stdin.isatty(),
    )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [f"recorded in {path}; its hash goes into the lineage of what is harvested under it"]
    emit({"permission": str(path), "sha256": sha256}, lines, as_json=as_json)


def review(
    record_id: str = RECORD,
    outcome: Outcome = typer.Option("unchanged", help="What you found when you read the text again."),
    beside: Path = BESIDE,
    as_json: bool = JSON,
) -> None:
    """Note that you read a record's text again, today; the note lies in terms/ of --beside."""
    import sys
    from datetime import UTC, datetime

    from harvester.cli.console import emit
    from harvester.terms import manage as terms_desk
    from harvester.terms.records import load_registry

    known = terms_desk.found(load_registry(beside / "terms"), record_id)
    today = datetime.now(UTC).date()
    fresh = terms_desk.reviewed(known, outcome, today, isatty=sys.stdin.isatty())
    path = terms_desk.write_review(beside / "terms", fresh)
    data = {"review": str(path), **terms_desk.record_json(fresh, today)}
    emit(data, [f"noted in {path}"], as_json=as_json)
