"""Journal and seal until killed: `python -m tests.harvester.store_writer STORE FIRST`.

It prints the number of each answer when, and only when, it was acknowledged as durable.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.shards import seal
from tests.harvester.store_rows import answer, intent, key_of, run_record

ANSWERS = 600
SEAL_EVERY = 60


def main() -> None:
    store, first = Path(sys.argv[1]), int(sys.argv[2])
    with StoreLock(store, started_at=0.0):
        writer = GroupCommit(Journal.open(store), max_records=16, max_wait_s=0.002)
        run = run_record(f"run-{first}-{os.getpid()}")
        writer.call(lambda journal: journal.begin_run(run)).result()
        next_id = writer.call(lambda journal: journal.next_attempt_id()).result()
        held = writer.call(
            lambda journal: journal.look_up([key_of(n) for n in range(first, first + ANSWERS)])
        ).result()
        slots = threading.Semaphore(100)  # in flight
        for number in range(first, first + ANSWERS):
            if key_of(number) in held:
                continue
            slots.acquire()
            attempt_id = next_id + number - first
            leave(writer, run.run_id, number, attempt_id, slots)
            if number % SEAL_EVERY == SEAL_EVERY - 1:
                writer.call(lambda journal: seal.seal(journal, store, target_bytes=1, everything=True))
        writer.call(lambda journal: seal.seal(journal, store, target_bytes=1, everything=True)).result()
        writer.call(lambda journal: journal.end_run(run.run_id, "complete", 0, 0.0)).result()
        writer.close()


def leave(writer: GroupCommit, run_id: str, number: int, attempt_id: int, slots: threading.Semaphore) -> None:
    def stored(error: BaseException | None) -> None:
        if error is None:
            os.write(1, b"%d\n" % number)
        slots.release()

    def sent(error: BaseException | None) -> None:
        if error is not None:
            slots.release()
            return
        os.write(1, b"sent %d\n" % number)  # from here on the teacher may bill
        writer.submit(answer(number, attempt_id=attempt_id), stored)

    writer.submit(intent(number, run_id, attempt_id), sent)


if __name__ == "__main__":
    main()
