"""`harvester attach`: follow the run of a store until it ends, and end as it did."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer

from harvester.cli.commands import CONTROL, HarvesterApp
from harvester.cli.console import JSON, STORE, Status, emit, message, progress_display, write_stdout
from harvester.cli.detach import log_of
from harvester.errors import FindingsError, RunState
from harvester.store import paths
from harvester.system.command_line.shell_words import shell_word
from harvester.system.process_state import STANDING, process_state, standing_text

# Seconds between two looks at the run, and between two lines of --json.
LOOK_S, LINE_S = 0.25, 2.0
# Seconds to wait for the run's own answer. After that its last heartbeat is shown.
PATIENCE_S = 0.5


def register(app: HarvesterApp) -> None:
    """Add the command of this module to `app`."""
    app.command(epilog="Example: harvester attach my-run/store", section=CONTROL)(attach)


def attach(
    store: Path = STORE,
    as_json: bool = JSON,
) -> None:
    """Show the progress of a run until it ends, and exit with its code. Ctrl-C ends only the display.

    The run may be any: detached, in another terminal, or of a Python program. Of a run that has ended it
    shows how it ended. With --json it prints the status as a line of JSON every two seconds.
    """
    from harvester.observe import status as run_status

    try:
        _follow(store, as_json=as_json)
    except KeyboardInterrupt:
        word = shell_word(store)
        message(
            f"the harvest goes on; `harvester attach {word}` shows it again, `harvester stop {word}` ends it"
        )
        raise typer.Exit(130) from None
    status = run_status.current_status(store)
    code = None if status.get("state") in [*RunState, "died", "hung"] else status.get("exit_code")
    lines = [*run_status.status_lines(status), *([] if code is None else [f"exit code {code}"])]
    log = log_of(store)
    if log.exists():
        lines.append(f"log       {log}")
    emit(status, lines, as_json=as_json)
    if code is None:
        raise FindingsError(
            _without_end(status),
            place=str(store),
            remedy=run_status.remedy_of(status),
        )
    raise typer.Exit(int(code))


def _without_end(status: Status) -> str:
    """Say why it is not known how the run ended."""
    from harvester.observe.status import is_untouched_merge

    if status.get("run_id"):
        return "the run died: its process is gone, and it did not say how it ended"
    if is_untouched_merge(status):
        return "no run has been here: this is a merged store"
    if status.get("held"):
        return f"how the last run ended is not known: {paths.STATUS} is gone, or says nothing"
    return "no run has been here"


def _follow(store: Path, *, as_json: bool) -> None:
    """Show each status of the run that holds the store, until none does or another begins."""
    from harvester.store.journal.lock import is_held, is_held_by, read_holder

    status = _status(store)
    holder = read_holder(store / paths.LOCK)
    if not is_held(store):
        return
    if status.get("pid") != holder.get("pid"):
        message(f"pid {holder.get('pid', '?')} holds the store; waiting until its run begins, or it ends")
    run_id = None
    printed_at = -LINE_S
    with progress_display(int(status.get("rows_total", 0)), "harvest", at_once=True) as show:
        while is_held(store):
            _wait_while_it_stands(store)
            if status.get("pid") == holder.get("pid"):
                if run_id not in (None, status.get("run_id")) or status.get("exit_code") is not None:
                    break
                run_id = status.get("run_id")
                if not as_json:
                    show(status)
                elif time.monotonic() - printed_at >= LINE_S:
                    printed_at = time.monotonic()
                    write_stdout(json.dumps(status) + "\n")
            time.sleep(LOOK_S)
            status, holder = _status(store), read_holder(store / paths.LOCK) or holder
    while is_held_by(store, holder):  # it has said how it ended, and closes the store
        time.sleep(LOOK_S)


def _wait_while_it_stands(store: Path) -> None:
    """Say once that the process which holds the store is stopped, and wait until it goes on or is gone."""
    from harvester.store.journal.lock import is_held, read_holder

    is_said = False
    while is_held(store):
        holder = read_holder(store / paths.LOCK)
        if (state := process_state(holder)) not in STANDING:
            break
        if not is_said:
            is_said = True
            pid = holder.get("pid", "?")
            message(f"the run waits (pid {pid} is {state}): {standing_text(state, pid)}")
        time.sleep(LOOK_S)


def _status(store: Path) -> Status:
    """Return what the run says now, or else its last heartbeat."""
    from harvester.observe.status import can_answer, read_status
    from harvester.observe.status_schema import validated_status
    from harvester.run.control import client

    live: dict[str, Any] | None = None
    if can_answer(store):
        live = client.ask(store, "status", patience_s=PATIENCE_S)
    return read_status(store) if live is None else validated_status(live)
