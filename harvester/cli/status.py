"""status, pause, resume, stop, set: look at a store's job and steer it, from any terminal."""

from __future__ import annotations

from pathlib import Path

import typer

from harvester.cli.store_path import STORE
from harvester.store import paths

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")
POLL_S = 0.1
PATIENCE_S = 0.2
"""A job that can't say how it is within so much is told of by its last heartbeat, at most two seconds old."""


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog="Example: harvester status my-run/store --check --max-age 10m")(status)
    app.command(epilog="Example: harvester pause my-run/store")(pause)
    app.command(epilog="Example: harvester resume my-run/store")(resume)
    app.command(epilog="Example: harvester stop my-run/store")(stop)
    app.command("set", epilog="Example: harvester set my-run/store rpm 300")(set_)


def status(
    store: Path = STORE,
    check: bool = typer.Option(False, "--check", help="Exit 1 unless alive or complete."),
    max_age: str = typer.Option("10m", help="How old the heartbeat may be for --check."),
    as_json: bool = JSON,
) -> None:
    """Say how far it is, how fast, why it waits, what is left and what it cost; works while a run lives."""
    from harvester.cli.console import emit
    from harvester.config import schedule as hours
    from harvester.errors import FindingsError, UsageError
    from harvester.observe import status as room
    from harvester.run.control import client as remote

    try:
        oldest_s = hours.seconds(max_age)
    except ValueError as error:
        raise UsageError(str(error), place="--max-age") from None
    live = remote.ask(store, "status", patience_s=PATIENCE_S) if room.can_answer(store) else None
    found = room.status(store, live)
    emit(found, room.status_lines(found), as_json=as_json)
    wrong = room.unfit(found, oldest_s) if check else ""
    if wrong:
        raise FindingsError(wrong, place=str(store), remedy="`harvester run` resumes a job that ended")


def pause(store: Path = STORE, as_json: bool = JSON) -> None:
    """Send nothing new until `resume`, also after a restart; what is on the wire is awaited and kept."""
    _tell(store, "pause", as_json=as_json)


def resume(store: Path = STORE, as_json: bool = JSON) -> None:
    """Go on after `pause`, or after a canary's hold; where no job works, the next run will."""
    from harvester.cli.console import emit
    from harvester.run.control import client as remote
    from harvester.store import pauses as holds
    from harvester.store.journal.lock import is_held

    if not is_held(store) and (gone := holds.clear_without_run(store)):
        emit({"said": "resumed", "holds": gone}, ["resumed: the next run is not held"], as_json=as_json)
        return
    emit(said := remote.tell(store, "resume"), [str(said.get("said", ""))], as_json=as_json)


def stop(
    store: Path = STORE,
    wait: bool = typer.Option(True, help="Return when the job has ended."),
    as_json: bool = JSON,
) -> None:
    """Drain and end the job, as SIGTERM would; it exits with 10 and can be resumed."""
    import time

    from harvester.store.journal.lock import is_held, read_holder

    holder = read_holder(store / paths.LOCK)
    _tell(store, "stop", as_json=as_json)
    # Its note goes before its lock; whoever holds the store after it is another job, and none of ours.
    while wait and is_held(store) and read_holder(store / paths.LOCK) in ({}, holder):
        time.sleep(POLL_S)


def set_(
    store: Path = STORE,
    name: str = typer.Argument(..., help="max-concurrency, rpm, tpm or budget.", show_default=False),
    value: str = typer.Argument(
        ...,
        help="A number; rpm and tpm also `none`; budget in USD, or as in 3000000tokens.",
        show_default=False,
    ),
    as_json: bool = JSON,
) -> None:
    """Change a limit or the budget of the living run; the file stays what it is."""
    _tell(store, "set", as_json=as_json, name=name, value=value)


def _tell(store: Path, verb: str, *, as_json: bool, **more: str) -> None:
    from harvester.cli.console import emit
    from harvester.run.control import client as remote

    said = remote.tell(store, verb, **more)
    emit(said, [str(said.get("said", ""))], as_json=as_json)
