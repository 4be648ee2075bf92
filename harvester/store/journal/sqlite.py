"""Open the journal's SQLite database, define its tables, and translate SQLite's errors.

SQLite in WAL mode with synchronous=FULL: a commit that returned is on disk. Exactly one connection ever
writes and checkpoints (SQLite before 3.51.3 can corrupt a WAL when two do); readers open `mode=ro`.
`data/FORMAT.md` says the same in prose.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from harvester.api.types import Outcome
from harvester.errors import StoreCorrupt, StoreError, StoreFormatError, StoreFull
from harvester.store import paths
from harvester.system import disk_refusal
from harvester.system.failpoints import reach
from harvester.system.files import fsync
from harvester.system.own_files import ForeignFileError, open_file, require_regular, temporary_name

FORMAT_VERSION = 1
# Bytes of a write-ahead log without a frame: https://sqlite.org/fileformat2.html#walformat
LOG_HEADER_BYTES = 32
# Magic string, user_version and application_id of a database: https://sqlite.org/fileformat2.html
_FILE_HEADER = struct.Struct(">16s44xi4xi28x")
_MAGIC = b"SQLite format 3\0"
# How long a write waits for another program that holds SQLite's lock: a backup, or somebody's shell.
BUSY_MS = 60_000
_SIDE_FILES = ("wal", "shm", "journal")
_HALF_MADE = "a run was killed while it made the store; `harvester run` completes it, nothing was stored yet"
_LOST_REMEDY = "restore journal.db from a copy; the shards stay readable as they are"
DAMAGED_REMEDY = (
    "restore journal.db from a copy, or let `harvester verify PATH --repair` keep what can be read of it;"
    " the shards stay readable as they are"
)
APPLICATION_ID = 0x44495354  # "DIST"

OUTCOME_CODES: dict[Outcome, int] = {
    Outcome.OK: 0,
    Outcome.TRUNCATED: 1,
    Outcome.FILTERED: 2,
    Outcome.REFUSED: 3,
    Outcome.TOOL_CALL: 4,
    Outcome.EMPTY: 5,
    Outcome.UNKNOWN: 6,
    Outcome.INVALID: 7,
    Outcome.SCORED: 8,
    Outcome.UNSCORED: 9,
}
OUTCOMES = {code: name for name, code in OUTCOME_CODES.items()}

# The small columns come before the long ones: looking a key up must not read overflow pages.
TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (
  run INTEGER PRIMARY KEY, run_id TEXT NOT NULL UNIQUE, started_us INTEGER NOT NULL, ended_us INTEGER,
  ending TEXT NOT NULL, exit_code INTEGER, lineage_json TEXT NOT NULL, config_json TEXT NOT NULL,
  checksum INTEGER NOT NULL);
CREATE TABLE intents (
  attempt_id INTEGER PRIMARY KEY, run INTEGER NOT NULL, at_us INTEGER NOT NULL,
  reserved_tokens INTEGER NOT NULL, reserved_microusd INTEGER NOT NULL, code TEXT,
  endpoint TEXT NOT NULL, key BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE answers (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, asker BLOB NOT NULL, run INTEGER NOT NULL,
  outcome INTEGER NOT NULL, max_tokens INTEGER, status INTEGER NOT NULL, sample_index INTEGER NOT NULL,
  attempts INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
  cost_microusd INTEGER NOT NULL, latency_us INTEGER NOT NULL, at_us INTEGER NOT NULL,
  checksum INTEGER NOT NULL, endpoint TEXT NOT NULL, prompt_json TEXT NOT NULL, body_json TEXT NOT NULL,
  raw BLOB NOT NULL);
CREATE TABLE keys (
  key BLOB PRIMARY KEY, shard INTEGER NOT NULL, outcome INTEGER NOT NULL, max_tokens INTEGER,
  asker BLOB NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE dead (
  key BLOB PRIMARY KEY, asker BLOB NOT NULL, run INTEGER NOT NULL, max_tokens INTEGER,
  sample_index INTEGER NOT NULL, attempts INTEGER NOT NULL, at_us INTEGER NOT NULL, code TEXT NOT NULL,
  message TEXT NOT NULL, prompt_json TEXT NOT NULL, body_json TEXT NOT NULL, checksum INTEGER NOT NULL
  ) WITHOUT ROWID;
CREATE TABLE asks (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL, asker BLOB NOT NULL, sample_index INTEGER NOT NULL,
  prompt_json TEXT NOT NULL, checksum INTEGER NOT NULL, UNIQUE (key, asker));
CREATE TABLE failures (
  id INTEGER PRIMARY KEY, attempt_id INTEGER NOT NULL, run INTEGER NOT NULL, status INTEGER,
  maybe_billed INTEGER NOT NULL, at_us INTEGER NOT NULL, code TEXT NOT NULL, key BLOB NOT NULL,
  raw BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE counters (
  run INTEGER NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL, PRIMARY KEY (run, name)) WITHOUT ROWID;
CREATE TABLE manifest (
  shard INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL, rows INTEGER NOT NULL,
  size_bytes INTEGER NOT NULL, lineage_digest TEXT NOT NULL, sealed_us INTEGER NOT NULL,
  checksum INTEGER NOT NULL);
"""
# Checksums over the rows of `meta`, and of `counters` run by run: they change too often for one each.
CHECKS = "CREATE TABLE IF NOT EXISTS checks (name TEXT PRIMARY KEY, checksum INTEGER NOT NULL) WITHOUT ROWID"
# Sets of prompt files in which every row has an answer or a dead letter; created with the first such set.
FINISHED = (
    "CREATE TABLE IF NOT EXISTS finished (digest BLOB PRIMARY KEY, rows INTEGER NOT NULL,"
    " dead INTEGER NOT NULL, input_tokens INTEGER NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID"
)
# Batches at a provider, and the rows that wait for an answer from one; both created with the first batch.
BATCHES = (
    "CREATE TABLE IF NOT EXISTS batches (batch INTEGER PRIMARY KEY, run INTEGER NOT NULL,"
    " name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, status TEXT NOT NULL, at_us INTEGER NOT NULL,"
    " rows INTEGER NOT NULL, cancel INTEGER NOT NULL, file_id TEXT NOT NULL, batch_id TEXT NOT NULL,"
    " endpoint TEXT NOT NULL, message TEXT NOT NULL, checksum INTEGER NOT NULL)"
)
BATCH_ROWS = (
    "CREATE TABLE IF NOT EXISTS batch_rows (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE,"
    " batch INTEGER NOT NULL, attempt_id INTEGER NOT NULL, attempts INTEGER NOT NULL,"
    " sample_index INTEGER NOT NULL, input_tokens INTEGER NOT NULL, reserved_tokens INTEGER NOT NULL,"
    " reserved_microusd INTEGER NOT NULL, checksum INTEGER NOT NULL, prompt_json TEXT NOT NULL,"
    " body_json TEXT NOT NULL)"
)
# Tables that a store may lack: they are created when they are first needed.
OPTIONAL_TABLES = frozenset({"finished", "batches", "batch_rows"})

_TABLE_NAMES = frozenset(
    re.findall(
        r"CREATE TABLE (?:IF NOT EXISTS )?(\w+)", "\n".join((TABLES, CHECKS, FINISHED, BATCHES, BATCH_ROWS))
    )
)


def require_journal(store: Path) -> None:
    """Do nothing unless there are shards but no journal, or an empty one.

    A new journal would not know the sealed answers, and all would be paid for again. The same holds for
    answers in a write-ahead log whose database is gone.

    Raises:
        StoreCorrupt: there are answers without a journal.
    """
    path = store / paths.JOURNAL
    if path.exists() and path.stat().st_size:
        return
    log = path.with_name(f"{paths.JOURNAL}-wal")
    if log.exists() and log.stat().st_size > LOG_HEADER_BYTES:
        raise StoreCorrupt(
            "gone or empty, but its log holds answers",
            place=str(path),
            remedy=f"put it back from a copy, with {log.name} beside it, or take another [store] path",
        )
    for shard in sorted((store / paths.SHARDS).glob("part-*.parquet")):
        raise StoreCorrupt(
            f"gone or empty, but there are sealed answers ({shard.name})",
            place=str(path),
            remedy="put it back from a copy, or take another [store] path; shards/ stays readable as it is",
        )


def open_for_writing(store: Path) -> sqlite3.Connection:
    """Open the one writing connection of a store; create the journal where there is none.

    The caller holds the store's lock. A journal is made under another name and renamed when it is whole, so
    that a kill leaves none, or a whole one. One that an earlier version left half made is completed.

    Raises:
        StoreError, StoreFull, StoreCorrupt, StoreFormatError.
    """
    path = store / paths.JOURNAL
    with translate_errors(path):
        _require_files(path, writing=True)
        if not path.exists() or not path.stat().st_size:
            create(store)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA secure_delete=ON")  # not every build has it
            connection.execute("PRAGMA fullfsync=ON")  # where an fsync does not reach the platter (macOS)
            connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
            # KiB, soon full: behind it is the page cache of the machine, nearly as quick and shared.
            connection.execute("PRAGMA cache_size=-2048")
            connection.execute(f"PRAGMA journal_size_limit={64 * 1024 * 1024}")
            if not _is_made(connection, path):
                _make(connection)
            connection.execute(CHECKS)  # stores of the first version lack it
            path.chmod(0o600)
        except BaseException:
            connection.close()
            raise
    return connection


def has_journal(store: Path) -> bool:
    """Return whether a whole journal is here: one that was never completed holds nothing.

    Raises:
        StoreError: another file lies in its place, or the store belongs to another user.
    """
    path = store / paths.JOURNAL
    with translate_errors(path):
        _require_files(path, writing=False)
        if not path.exists() or not path.stat().st_size:
            return False
        with path.open("rb") as file:
            header = file.read(_FILE_HEADER.size)
        if len(header) < _FILE_HEADER.size or _FILE_HEADER.unpack(header) != (_MAGIC, 0, 0):
            return True  # or a damaged one
        log = path.with_name(f"{paths.JOURNAL}-wal")
        if not log.exists() or log.stat().st_size <= LOG_HEADER_BYTES:
            return False  # a kill cut the creation short, before its one transaction
        with closing(_read_only(path)) as connection:
            return _is_made(connection, path)


def _require_files(path: Path, *, writing: bool) -> None:
    """Refuse a database and side files that are links, FIFOs, or for writing another user's."""
    for name in (path.name, *(f"{path.name}-{side}" for side in _SIDE_FILES)):
        require_regular(path.with_name(name), writing=writing)


def create(store: Path, fill: Callable[[sqlite3.Connection], None] | None = None) -> None:
    """Make a whole journal under a hidden name, then give it its own. Must run under the store's lock.

    Args:
        fill: inserts rows before the journal gets its name, in a transaction; it may replace another journal.

    Raises:
        StoreError: the disk refuses.
    """
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = store / paths.JOURNAL
    hidden = temporary_name(path)
    os.close(open_file(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL))
    try:
        with closing(sqlite3.connect(hidden, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=OFF")  # it is synced once, when it is whole
            connection.execute("PRAGMA journal_mode=WAL")
            _make(connection)
            connection.execute(CHECKS)
            if fill is not None:
                with transaction(connection):
                    fill(connection)
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise StoreError("a new journal can't be written", place=str(path), remedy="check the disk")
        fsync(hidden)
        reach("store.before_journal")
        for side in _SIDE_FILES:  # of an empty journal: SQLite would apply them to the new one
            path.with_name(f"{path.name}-{side}").unlink(missing_ok=True)
        hidden.rename(path)
        reach("store.after_journal")
        fsync(store)
        with suppress(PermissionError):  # the parent folder may be another user's
            fsync(store.parent)
    except BaseException:
        for name in (hidden.name, *(f"{hidden.name}-{side}" for side in _SIDE_FILES)):
            hidden.with_name(name).unlink(missing_ok=True)
        raise


def empty_log(store: Path) -> None:
    """Write the readable part of the write-ahead log into the journal and drop the rest.

    Raises:
        StoreError: the disk refuses.
    """
    with (
        translate_errors(store / paths.JOURNAL),
        closing(sqlite3.connect(store / paths.JOURNAL, isolation_level=None)) as connection,
    ):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def open_for_reading(store: Path) -> sqlite3.Connection:
    """Open a connection that can't write or checkpoint; safe while another process writes.

    Raises:
        StoreError, StoreCorrupt, StoreFormatError.
    """
    path = store / paths.JOURNAL
    with translate_errors(path):
        _require_files(path, writing=False)
        if not path.exists():
            raise StoreError(
                "no store here: it has no journal",
                place=str(path),
                remedy="name the folder that a run wrote: [store] path of harvest.toml",
            )
        connection = _read_only(path)
        try:
            if not _is_made(connection, path):
                require_journal(store)
                raise StoreError("the journal is empty", place=str(path), remedy=_HALF_MADE)
        except BaseException:
            connection.close()
            raise
    return connection


def close(connection: sqlite3.Connection, store: Path, *, may_write: bool) -> None:
    """Close the writing connection; with `may_write=False` without a final checkpoint.

    The checkpoint would write to a disk on which a commit has just failed. SQLite makes it when the last
    connection closes, so a reading connection, which can't checkpoint, is closed last.
    """
    last: sqlite3.Connection | None = None
    if not may_write:
        with suppress(StoreError):
            last = open_for_reading(store)
    connection.close()
    if last is not None:
        last.close()


def _read_only(path: Path) -> sqlite3.Connection:
    connection = _connect(path, "mode=ro")
    try:
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        # SQLite needs the -shm file even to read a WAL database. In a read-only folder without a -wal file
        # there is no writer and nothing to replay, so the database file alone is complete.
        if path.with_name(f"{paths.JOURNAL}-wal").exists():
            raise
        connection = _connect(path, "mode=ro&immutable=1")
    except BaseException:
        connection.close()
        raise
    connection.execute("PRAGMA busy_timeout=5000")
    return connection


def _connect(path: Path, options: str) -> sqlite3.Connection:
    address = f"{path.resolve().as_uri()}?{options}"
    return sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)


def _is_made(connection: sqlite3.Connection, path: Path) -> bool:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if version == 0 and application == 0:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables == 0:
            return False
    if application == APPLICATION_ID:
        _require_own_schema(connection, path)
    if application != APPLICATION_ID:
        raise StoreFormatError("a SQLite database, but not a journal", place=str(path))
    if version != FORMAT_VERSION:
        newer = version > FORMAT_VERSION
        raise StoreFormatError(
            f"format {version}, this program reads {FORMAT_VERSION}",
            place=str(path),
            remedy="install a newer release" if newer else "open it with the release that wrote it",
        )
    return True


def _require_own_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a journal with anything but our tables: a trigger could change rows as they are written.

    Raises:
        StoreCorrupt: names what is there.
    """
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_schema"):
        is_ours = kind == "table" and (name in _TABLE_NAMES or name.startswith("sqlite_"))
        if not is_ours and not (kind == "index" and sql is None):
            raise StoreCorrupt(
                f"has a {kind} that the harvester did not make: {name!r}",
                place=str(path),
                remedy=_LOST_REMEDY,
            )


def _make(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        for statement in TABLES.split(";\n"):
            if statement.strip():
                connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('last_attempt_id', '0'), ('last_shard', '0')")
        connection.execute("INSERT INTO counters VALUES (0, 'purged', 0)")  # from now on purges are counted
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE, then COMMIT, or ROLLBACK when anything in between raised."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Run several reads on one snapshot of the database while another process writes."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


@contextmanager
def translate_errors(place: Path) -> Iterator[None]:
    """Translate SQLite's errors to `StoreError`: no other module handles `sqlite3.Error`."""
    try:
        yield
    except sqlite3.Error as error:
        raise store_error_of(error, place) from error
    except OSError as error:
        raise disk_error(error, Path(error.filename or place)) from error
    except UnicodeDecodeError as error:  # a damaged schema quoted in SQLite's own message
        raise StoreCorrupt(
            "the journal is damaged", place=str(place), remedy="restore journal.db from a copy"
        ) from error


def store_error_of(error: sqlite3.Error, place: Path) -> StoreError:
    """Return the `StoreError` for a SQLite error, by its primary result code."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StoreFull("the disk is full", place=str(place), remedy="free space, then run again")
    if code == sqlite3.SQLITE_NOTADB:
        return StoreCorrupt(f"is no journal any more: {error}", place=str(place), remedy=_LOST_REMEDY)
    if code == sqlite3.SQLITE_CORRUPT or "Could not decode" in str(error):
        return StoreCorrupt(
            f"the journal is damaged: {str(error)[:200]}", place=str(place), remedy=DAMAGED_REMEDY
        )
    if code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}:
        return StoreError(f"can't be opened: {error}", place=str(place), remedy="check permissions")
    return StoreError(f"{error}", place=str(place), remedy="check the disk, then run again")


def disk_error(error: OSError, place: Path) -> StoreError:
    """Return the `StoreError` for an error of the operating system."""
    if isinstance(error, ForeignFileError):
        return StoreError(
            str(error.strerror),
            place=str(error.filename or place),
            remedy="only the harvester's own files may lie there: move it away, or take another store",
        )
    why = disk_refusal.reason(error)
    if disk_refusal.is_full(error):
        return StoreFull(why, place=str(place), remedy="free space, then run again")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        remedy = disk_refusal.remedy(error)
        return StoreError(f"can't be used: {why}", place=str(place), remedy=remedy)
    if error.errno == errno.ENOTDIR:
        return StoreError(
            "a file lies where a folder of the store should",
            place=disk_refusal.place(error, place),
            remedy="name the folder of a store",
        )
    return StoreError(
        f"can't read or write the disk: {why}",
        place=str(place),
        remedy=disk_refusal.remedy(error) or "check it, then run again",
    )


def has_table(connection: sqlite3.Connection, name: str) -> bool:
    """Return whether the database has this table; stores of earlier versions lack some."""
    query = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?)"
    return bool(connection.execute(query, (name,)).fetchone()[0])
