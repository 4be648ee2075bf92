"""Make a store in forked processes that are killed at the n-th system call; say where each left it.

Run with the preload library of `tests.harvester.faulty_disk`. Prints one JSON list for each kill: its number,
the exit status of the killed process, and what a later process found. Ends with the first process that was
not killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from harvester.prompts import completed_files
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.maintain.repair import repair_store
from harvester.store.terms_check import require_unsealed_permitted


def first_start(store: Path) -> None:
    """Do to a store what a run does to it before its first request."""
    require_unsealed_permitted(store)
    completed_files.look_up(store, b"x" * 32)
    with StoreLock(store, started_at=time.time()), Journal.open(store) as journal:
        assert journal.next_attempt_id() == 1


def repair(store: Path) -> None:
    """Repair a store that was made at all."""
    if (store / "journal.db").exists():
        repair_store(store)


def _in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """Kill at the first system call, the second, and so on."""
    for number in range(1, 1000):
        store = folder / f"store-{number}"

        def killed(store: Path = store, number: int = number) -> None:
            os.environ.update(
                FAULT_UNDER=str(store), FAULT_CALL="any", FAULT_NTH=str(number), FAULT_ERRNO="kill"
            )
            first_start(store)

        status = _in_child(killed)
        repaired = _in_child(lambda store=store: repair(store))  # type: ignore[misc]
        again = _in_child(lambda store=store: first_start(store))  # type: ignore[misc]
        print(
            json.dumps([number, status, repaired, again, sorted(path.name for path in store.iterdir())]),
            flush=True,
        )
        if status == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
