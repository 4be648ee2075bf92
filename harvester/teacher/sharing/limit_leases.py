"""Keep a ledger of the harvests of this machine that share a teacher's limits, in a small SQLite file.

Every harvest has a row for each address that it asks: which share of the limit it has, what it wants, and
what it learned. It renews its row twice a second, in one transaction that sees all other rows, so shares
never add up to more than the whole: who has too much lowers its share first, then others raise theirs. A row
that was not renewed for EXPIRY_S belongs to a process that died, and its share is free again: after SILENT_S
if no process has its number any more.

The file holds no key and no answer. It is not synced: after a power failure nobody is left to share with. A
file that can't be read is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from harvester.teacher.sharing.fair_shares import Want, divide

# Seconds after which a row counts as that of a dead process; sooner, where there is no process of its number.
EXPIRY_S = 3.0
SILENT_S = 1.0
# A share is changed when it is to change by more than this part of itself.
HYSTERESIS = 0.02
# Part of an equal share that everybody has from the start, until the others have lowered theirs.
LEAST = 0.1
_BUSY_S = 0.2
_TABLE = (
    "CREATE TABLE IF NOT EXISTS harvests (teacher TEXT NOT NULL, id TEXT NOT NULL, pid INTEGER NOT NULL,"
    " config TEXT NOT NULL, at REAL NOT NULL, weight REAL NOT NULL, demand REAL NOT NULL,"
    " share REAL NOT NULL, rate REAL NOT NULL, found REAL NOT NULL, learned_at REAL NOT NULL,"
    " PRIMARY KEY (teacher, id)) WITHOUT ROWID"
)


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One harvest at one address.

    Attributes:
        teacher: digest of host and credential.
        id: of the harvest.
        config: path of its harvest.toml.
        at: when it was last renewed, in monotonic seconds of this machine.
        weight, demand: see `Want`.
        share: the part of the limit that it has, from 0 to 1.
        rate, found: what it has learned itself, see `LearnedRate.lesson`; 0 for nothing.
        learned_at: when it found that, minus infinity for never.
    """

    teacher: str
    id: str
    pid: int
    config: str
    at: float
    weight: float
    demand: float = math.inf
    share: float = 0.0
    rate: float = 0.0
    found: float = 0.0
    learned_at: float = -math.inf


def state_file() -> Path:
    """Return the path of the ledger in the user's state folder.

    A relative XDG_STATE_HOME is ignored, as the XDG Base Directory Specification demands: harvests that were
    started in different folders would not meet.

    Raises:
        RuntimeError: the user has no home folder.
    """
    folder = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not folder.is_absolute():
        folder = Path.home() / ".local" / "state"
    return folder / "harvester" / "shared_limits.db"


def teacher_digest(base_url: str, key: str | None) -> str:
    """Return what harvests have in common that share limits: a digest of host and credential."""
    return hashlib.sha256(f"{urlsplit(base_url).netloc}\n{key or ''}".encode()).hexdigest()[:32]


class LimitLedger:
    """The ledger file of one process. Its methods may be called in any thread: one waits for the other.

    Raises:
        OSError, sqlite3.Error: it can't be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # A renewal that was cancelled goes on in its thread; a connection bears one thread at a time.
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # busy, or the disk
                raise
            path.unlink(missing_ok=True)  # no database: damaged
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.close(handle)
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("PRAGMA journal_mode=TRUNCATE")
            connection.execute(_TABLE)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the file: a renewal after that raises."""
        with self._lock:
            self._connection.close()

    def leave(self, harvest_id: str) -> None:
        """Remove the rows of a harvest that has ended, and close the file: no renewal may bring them back.

        Raises:
            sqlite3.Error: the rows stay until they expire.
        """
        with self._lock, contextlib.closing(self._connection):
            self._remove(harvest_id)

    def renew(self, row: LedgerRow) -> tuple[float, list[LedgerRow]]:
        """Write a row, with the share that is free for it; return this share, and the rows of the others.

        Raises:
            sqlite3.Error: the file is busy, closed or can't be used; nothing was changed.
        """
        with self._lock:
            return self._renew(row)

    def _renew(self, row: LedgerRow) -> tuple[float, list[LedgerRow]]:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            # After a restart of the machine its monotonic time begins anew: rows of the future are stale too.
            stale = "DELETE FROM harvests WHERE at < ? OR at > ?"
            connection.execute(stale, (row.at - EXPIRY_S, row.at + EXPIRY_S))
            query = "SELECT * FROM harvests WHERE teacher = ? AND id <> ? ORDER BY id"
            others = []
            for values in connection.execute(query, (row.teacher, row.id)).fetchall():
                other = LedgerRow(*values)
                if other.at < row.at - SILENT_S and not _is_process(other.pid):
                    self._remove(other.id)
                else:
                    others.append(other)
            share = _share(row, others)
            values = (row.teacher, row.id, row.pid, row.config, row.at, row.weight, row.demand, share)
            connection.execute(
                "INSERT OR REPLACE INTO harvests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, row.rate, row.found, row.learned_at),
            )
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        return share, others

    def _remove(self, harvest_id: str) -> None:
        self._connection.execute("DELETE FROM harvests WHERE id = ?", (harvest_id,))


def _is_process(pid: int) -> bool:
    """Whether there is a process of this number; True where that can't be seen."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _share(row: LedgerRow, others: Sequence[LedgerRow]) -> float:
    """Return the share that a harvest may have now."""
    wants = {each.id: Want(each.weight, each.demand) for each in (row, *others)}
    target = divide(wants)[row.id]
    free = 1.0 - sum(other.share for other in others)
    if row.share <= free + 1e-9 and abs(target - row.share) <= HYSTERESIS * row.share:
        return row.share
    return max(min(target, free), LEAST / len(wants))
