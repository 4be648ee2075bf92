"""The commands `terms list|show|check|record|review|new`: what a teacher's terms permit. All work offline.

Recording a permission or a review needs a person at a terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from harvester.cli.commands import PREPARE, HarvesterApp
from harvester.cli.console import JSON, emit, message
from harvester.cli.run_options import CONFIG
from harvester.errors import UsageError

# How often a question is asked before the command ends.
TRIES = 5

BESIDE = typer.Option(
    Path(),
    "--beside",
    exists=True,
    file_okay=False,
    help="Folder of a harvest.toml, with its own terms/ and permissions/.",
)
RECORD = typer.Argument(..., metavar="ID", help="Id of a terms record.", show_default=False)
Outcome = Literal["unchanged", "changed"]

terms_app = HarvesterApp(help="Show what a teacher's terms permit. Our reading of them, not legal advice.")


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    terms_app.command("list", epilog="Example: harvester terms list --permit")(list_records)
    terms_app.command(epilog="Example: harvester terms show openai-api-2026-01-01")(show)
    terms_app.command(epilog="Example: harvester terms check my-run/harvest.toml")(check)
    terms_app.command(epilog="Example: harvester terms record --beside my-run")(record)
    terms_app.command(epilog="Example: harvester terms review mock-teacher --beside my-run")(review)
    terms_app.command(epilog="Example: harvester terms new --beside my-run")(new)
    app.add_typer(terms_app, name="terms", rich_help_panel=PREPARE)


def list_records(
    permit: bool = typer.Option(False, "--permit", help="Only records that permit training."),
    due: bool = typer.Option(False, "--due", help="Only records whose terms must be read again."),
    beside: Path = BESIDE,
    as_json: bool = JSON,
) -> None:
    """List the records: layer, verdict, how reliable the reading is, and its date."""
    from datetime import UTC, datetime

    from harvester.terms import manage
    from harvester.terms.places import terms_folders
    from harvester.terms.records import load_registry

    rows = manage.listed(load_registry(*terms_folders(beside)), datetime.now(UTC).date(), only_due=due)
    rows = [row for row in rows if not permit or row["verdict"] in {"permit", "duties"}]
    emit({"records": rows}, manage.table(rows), as_json=as_json)


def show(record_id: str = RECORD, beside: Path = BESIDE, as_json: bool = JSON) -> None:
    """Show one record: summary, URL, dates, obligations."""
    from datetime import UTC, datetime

    from harvester.terms import manage
    from harvester.terms.places import terms_folders
    from harvester.terms.records import load_registry

    registry, today = load_registry(*terms_folders(beside)), datetime.now(UTC).date()
    data = manage.record_json(manage.find_record(registry, record_id), today)
    emit(data, manage.shown(registry, record_id, today), as_json=as_json)


def check(
    config: Path = CONFIG,
    as_json: bool = JSON,
) -> None:
    """Check whether the terms permit a harvest; exit 77 if they do not."""
    from harvester.config.config import load
    from harvester.errors import TermsRefused
    from harvester.run import prepare
    from harvester.terms import manage

    verdict = prepare.gate(load(config), config.resolve().parent)
    emit(manage.as_json(verdict), manage.checked(verdict), as_json=as_json)
    if not verdict.permitted:
        raise typer.Exit(TermsRefused.exit_code)


def record(beside: Path = BESIDE, as_json: bool = JSON) -> None:
    """Record a permission that a teacher granted you, by answering questions at a terminal.

    It is written into permissions/ in the --beside folder. No option replaces the questions.
    """
    import hashlib
    import sys

    from harvester.terms import manage

    path = manage.ask_permission(
        beside / "permissions",
        _ask,
        isatty=sys.stdin.isatty(),
    )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [f"recorded in {path}; its hash goes into the lineage of the answers harvested under it"]
    emit({"permission": str(path), "sha256": sha256}, lines, as_json=as_json)


def _ask(question: str) -> str:
    """Ask at the terminal; a wrong answer is asked for again.

    Raises:
        UsageError: the input ended, or no answer was right. KeyboardInterrupt: Ctrl-C.
    """
    from harvester.terms.manage import problem_of

    problem = ""
    for _ in range(TRIES):
        try:
            answer = str(typer.prompt(question, default="", show_default=False, err=True))
        except typer.Abort as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            message("")  # ends the line of the question
            raise UsageError(
                "the input ended before all questions were answered; nothing was written",
                place="stdin",
                remedy="answer them to the end; the same command begins again",
            ) from None
        problem = problem_of(question, answer)
        if not problem:
            return answer
        message(problem)
    raise UsageError(
        problem, place=question, remedy="the same command begins again; nothing was written so far"
    )


def review(
    record_id: str = RECORD,
    outcome: Outcome = typer.Option("unchanged", help="Whether the text has changed since the last reading."),
    beside: Path = BESIDE,
    as_json: bool = JSON,
) -> None:
    """Record that you read the terms again today. The note is written into terms/ in the --beside folder."""
    import sys
    from datetime import UTC, datetime

    from harvester.terms import manage
    from harvester.terms.places import terms_folders
    from harvester.terms.records import load_registry

    known = manage.find_record(load_registry(*terms_folders(beside)), record_id)
    today = datetime.now(UTC).date()
    fresh = manage.reviewed(known, outcome, today, isatty=sys.stdin.isatty())
    path = manage.write_review(beside / "terms", fresh)
    data = {"review": str(path), **manage.record_json(fresh, today)}
    emit(data, [f"noted in {path}"], as_json=as_json)


def new(beside: Path = BESIDE, as_json: bool = JSON) -> None:
    """Write a terms record for a model or server of your own, by answering questions at a terminal.

    It asks which licence applies and who read it. The record is written into terms/ in the --beside folder.
    """
    import sys

    from harvester.terms import manage

    path, record = manage.ask_record(
        beside / "terms",
        _ask,
        isatty=sys.stdin.isatty(),
    )
    lines = [f"written to {path}: {record.verdict}", f'declare it: [teacher] terms = "{record.id}"']
    emit({"record": str(path), "id": record.id, "verdict": record.verdict}, lines, as_json=as_json)
