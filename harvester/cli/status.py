"""Commands that show and control the run of a store: `status`, `pause`, `resume`, `stop`, `set`."""

from __future__ import annotations

from pathlib import Path

import typer

from harvester.cli.commands import CONTROL, HarvesterApp
from harvester.cli.console import JSON, STORE, emit
from harvester.errors import FindingsError, UsageError
from harvester.store import paths

# Seconds between two looks at a run that `stop` waits for.
POLL_S = 0.1
# Seconds to wait for the run's own answer to `status`. After that the last heartbeat is shown.
PATIENCE_S = 0.2


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: harvester status my-run/store --check --max-age 10m", section=CONTROL)(
        status
    )
    app.command(epilog="Example: harvester pause my-run/store", section=CONTROL)(pause)
    app.command(epilog="Example: harvester resume my-run/store", section=CONTROL)(resume)
    app.command(epilog="Example: harvester stop my-run/store", section=CONTROL)(stop)
    app.command(
        "set",
        epilog="Example: harvester set my-run/store rpm 300",
        context_settings={"ignore_unknown_options": True},  # so that a VALUE below 0 is refused in words
        section=CONTROL,
    )(set_)


def status(
    store: Path = STORE,
    check: bool = typer.Option(False, "--check", help="Exit 1 unless the run is alive or complete."),
    max_age: str = typer.Option("10m", help="For --check: how old the last heartbeat may be (90s, 10m, 2h)."),
    by: str = typer.Option("", help="Also count the answers by task, tag, split or file."),
    as_json: bool = JSON,
) -> None:
    """Show progress, rate, waiting reason, time left and cost of a run, alive or ended.

    `harvester attach` shows it again and again until the run ends. Of a fleet, name its folder
    (`store-fleet`).
    """
    from harvester.config import schedule
    from harvester.fleet.folder import STATE
    from harvester.observe import status as run_status
    from harvester.run.control import client

    try:
        max_age_s = schedule.seconds(max_age)
    except ValueError as error:
        raise UsageError(str(error), place="--max-age", remedy="as in 90s, 10m or 2h") from None
    if (store / STATE).is_file():
        _status_of_fleet(store, max_age_s, check=check, as_json=as_json)
        return
    live = client.ask(store, "status", patience_s=PATIENCE_S) if run_status.can_answer(store) else None
    current = run_status.current_status(store, live)
    lines = run_status.status_lines(current)
    if by:
        groups, table = _grouped(store, by)
        current, lines = {**current, "by": groups}, [*lines, "", *table]
    emit(current, lines, as_json=as_json)
    problem = run_status.unhealthy_reason(current, max_age_s) if check else ""
    if problem:
        raise FindingsError(problem, place=str(store), remedy=run_status.remedy_of(current))


def _status_of_fleet(folder: Path, max_age_s: float, *, check: bool, as_json: bool) -> None:
    """Show the status of a fleet, which its driver writes, with a line for each rank."""
    from harvester.fleet.status import rank_lines
    from harvester.observe import status as run_status
    from harvester.store.journal.lock import is_held
    from harvester.system.process_state import standing_text

    current = run_status.with_process(folder, run_status.read_status(folder), alive=is_held(folder))
    emit(current, [*run_status.status_lines(current), *rank_lines(current)], as_json=as_json)
    problem = run_status.unhealthy_reason(current, max_age_s) if check else ""
    if problem:
        remedy = "`harvester fleet` resumes a fleet that ended"
        raise FindingsError(
            problem,
            place=str(folder),
            remedy=standing_text(str(current.get("process", "")), current.get("pid", "?")) or remedy,
        )


def _grouped(store: Path, kind: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return the sums of each group of answers by its name, and the same as lines of text."""
    from harvester.observe.report import groups
    from harvester.observe.report.answer_statistics import statistics_of_store

    if kind not in groups.KINDS:
        raise UsageError(
            f"answers can't be counted by {kind!r}", place="--by", remedy=f"one of {', '.join(groups.KINDS)}"
        )
    largest = statistics_of_store(store)[0].by_group.largest(kind)
    return {name: group.as_dict() for name, group in largest}, groups.table_lines(kind, largest)


def pause(store: Path = STORE, as_json: bool = JSON) -> None:
    """Send no new requests until `resume`, also after a restart. Answers in flight are still kept."""
    _command(store, "pause", as_json=as_json)


def resume(store: Path = STORE, as_json: bool = JSON) -> None:
    """Continue after `pause`, or after a canary paused the run. It works between two runs, too."""
    from harvester.store import pauses
    from harvester.store.journal.lock import is_held

    if not is_held(store) and (removed := pauses.clear_without_run(store)):
        emit({"said": "resumed", "holds": removed}, ["resumed: the next run is not paused"], as_json=as_json)
        return
    _command(store, "resume", as_json=as_json)


def stop(
    store: Path = STORE,
    wait: bool = typer.Option(True, help="Return only when the run has ended."),
    cancel_batches: bool = typer.Option(
        False,
        "--cancel-batches",
        help="Also cancel its batches at the provider, with or without a run; else they go on.",
    ),
    as_json: bool = JSON,
) -> None:
    """End the run: no new requests, answers in flight are awaited. It exits with 10 and can be resumed."""
    import time

    from harvester.store.journal.lock import is_held, is_held_by, read_holder

    if cancel_batches and not is_held(store):
        from harvester.run.batch.cancel import cancel_waiting

        lines = cancel_waiting(store)
        emit({"batches": lines}, lines or ["no batch waits: nothing to cancel"], as_json=as_json)
        return
    holder = read_holder(store / paths.LOCK)
    arguments = {"cancel_batches": "yes"} if cancel_batches else {}
    _command(store, "stop", as_json=as_json, **arguments)
    while wait and is_held_by(store, holder):
        time.sleep(POLL_S)


def set_(
    store: Path = STORE,
    name: str = typer.Argument(
        ...,
        metavar="NAME",
        help="max-concurrency, rpm, tpm, budget, or budget-store, -day or -month.",
        show_default=False,
    ),
    value: str = typer.Argument(
        ...,
        metavar="VALUE",
        help="A number; `none` for rpm and tpm; a budget in USD, or as 3000000tokens.",
        show_default=False,
    ),
    as_json: bool = JSON,
) -> None:
    """Change a limit or the budget of the current run; harvest.toml stays as it is."""
    from harvester.run.control.settings import parse_setting

    parse_setting(name, value)  # a slip of the pen is named also where no run is active
    _command(store, "set", as_json=as_json, name=name, value=value)


def _command(store: Path, command: str, *, as_json: bool, **arguments: str) -> None:
    """Send a command to the run of `store` and print its reply."""
    from harvester.run.control import client

    reply = client.tell(store, command, **arguments)
    emit(reply, [str(reply.get("said", ""))], as_json=as_json)
