"""Convert answers to columns while a run goes on, so that its end only has to write them.

What lies ready is a copy. The journal decides at sealing: a slice is used if the journal holds exactly its
rows next, else they are read and converted again. Nothing of the store depends on what lies ready.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harvester.store.journal.checksums import checked_rows, require_unchanged
from harvester.store.journal.journal import Journal
from harvester.terms.lineage import Lineage

if TYPE_CHECKING:
    import pyarrow as pa

# Most rows of a slice: about 10 ms of work, during which nothing is committed.
ROWS_PER_SLICE = 128
# Later than any answer, in microseconds, and larger than any id.
FAR = 2**62
# Most bytes of the journal whose rows lie ready; as columns they take about as much memory.
MOST_READY_BYTES = 32 * 1024 * 1024
# What tells whether answers are those of a slice that was made before.
_SELECT_MARKS = "SELECT id, key, at_us, checksum FROM answers"


@dataclass(frozen=True, slots=True)
class Unsealed:
    """The answers of these runs up to an id that came before a time, in microseconds."""

    runs: tuple[int, ...]
    last_id: int = FAR
    before_us: int = FAR

    def query(self, select: str) -> str:
        """Return SQL for those beyond an id, in order of arrival; see `bound`.

        Args:
            select: "SELECT ... FROM answers".
        """
        holes = ",".join("?" * len(self.runs))
        return f"{select} WHERE run IN ({holes}) AND id > ? AND id <= ? AND at_us < ? ORDER BY id"

    def bound(self, after: int) -> tuple[int, ...]:
        """Return the values of the query for the answers beyond this id."""
        return (*self.runs, after, self.last_id, self.before_us)


# Id, key, time and checksum of a row: what tells that it is still the same.
_Mark = tuple[int, bytes, int, int]


@dataclass(frozen=True, slots=True)
class Slice:
    """Some answers as columns. `stored_bytes` is what they had in the journal."""

    marks: tuple[_Mark, ...]
    table: pa.Table
    stored_bytes: int

    @property
    def last_id(self) -> int:
        """Id of the newest one."""
        return self.marks[-1][0]

    @property
    def keys(self) -> list[bytes]:
        """Their keys."""
        return [key for _, key, _, _ in self.marks]


def read_slice(
    journal: Journal, unsealed: Unsealed, lineages: Mapping[int, Lineage], after: int
) -> Slice | None:
    """Read and convert the next answers beyond an id; one long cursor would block checkpoints.

    Raises:
        StoreCorrupt: one is damaged; names its key.
    """
    rows = _read(journal, unsealed, after)
    return _converted(rows, lineages) if rows else None


def _read(journal: Journal, unsealed: Unsealed, after: int) -> list[dict[str, Any]]:
    from harvester.store.shards import batching
    from harvester.store.shards.sample import SELECT_ANSWERS

    query = unsealed.query(SELECT_ANSWERS)
    with (
        journal.reading() as connection,
        contextlib.closing(connection.execute(query, unsealed.bound(after))) as cursor,
    ):
        rows = next(batching.batch_answers(cursor, ROWS_PER_SLICE), [])
    require_unchanged("answers", rows, journal.path)
    return rows


def _converted(rows: list[dict[str, Any]], lineages: Mapping[int, Lineage]) -> Slice:
    from harvester.store.shards.sample import sample_of
    from harvester.store.shards.schema import to_table

    marks = tuple((row["id"], row["key"], row["at_us"], row["checksum"]) for row in rows)
    stored = sum(len(row["raw"]) + len(row["body_json"]) + len(row["prompt_json"]) for row in rows)
    return Slice(marks, to_table(sample_of(row, lineages[row["run"]]) for row in rows), stored)


class ReadyRows:
    """Slices of unsealed answers that lie ready, in order of arrival; for the journal's thread alone."""

    def __init__(self) -> None:
        self._slices: deque[Slice] = deque()
        self._bytes = 0
        self._last_id = 0
        self._lineages: dict[int, Lineage] = {}

    def step(self, journal: Journal) -> bool:
        """Convert the next slice; False if not enough answers came for one, or enough lie ready.

        Only whole slices are converted, the same that sealing would read: the shard does not depend on what
        lay ready.

        Raises:
            StoreCorrupt: a row is damaged; names its key.
        """
        if self._bytes >= MOST_READY_BYTES:
            return False
        self._lineages = self._lineages or _lineages_like_current(journal)
        unsealed = Unsealed(tuple(self._lineages))
        if not _is_whole_slice_there(journal, unsealed, self._last_id):
            return False
        converted = read_slice(journal, unsealed, self._lineages, self._last_id)
        if converted is None:
            return False
        self._slices.append(converted)
        self._bytes += converted.stored_bytes
        self._last_id = converted.last_id
        return True

    def take(self, journal: Journal, unsealed: Unsealed, after: int) -> Slice | None:
        """Return the oldest slice if the journal holds exactly its rows next; else forget all of them."""
        if not self._slices or self._lineages.keys().isdisjoint(unsealed.runs):
            return None
        first = self._slices[0]
        query = unsealed.query(_SELECT_MARKS) + " LIMIT ?"
        with journal.reading() as connection:
            marks = connection.execute(query, (*unsealed.bound(after), len(first.marks))).fetchall()
        is_same = tuple(marks) == first.marks
        if is_same:
            self._slices.popleft()
            self._bytes -= first.stored_bytes
        else:
            self._slices.clear()
            self._bytes = 0
        if not self._slices:
            self._last_id = 0  # ids begin anew where no answer is left
        return first if is_same else None


def _lineages_like_current(journal: Journal) -> dict[int, Lineage]:
    """Return the lineages of the runs with unsealed answers whose shard is that of the current run."""
    from harvester.store.shards.parquet_file import lineage_digest

    with journal.reading() as connection:
        present = {run for (run,) in connection.execute("SELECT DISTINCT run FROM answers")}
        rows = checked_rows(connection, "runs", journal.path)
    lineages = {row["run"]: Lineage.from_json(row["lineage_json"]) for row in rows}
    digest = lineage_digest(lineages[journal.run_number])
    wanted = present | {journal.run_number}
    return {run: lineages[run] for run in sorted(wanted) if lineage_digest(lineages[run]) == digest}


def _is_whole_slice_there(journal: Journal, unsealed: Unsealed, after: int) -> bool:
    """Whether as many answers came as make a slice, by their number or by their size."""
    from harvester.store.shards import batching

    query = f"SELECT count(*), total(length(raw)) FROM ({unsealed.query('SELECT raw FROM answers')} LIMIT ?)"  # noqa: S608
    with journal.reading() as connection:
        count, size = connection.execute(query, (*unsealed.bound(after), ROWS_PER_SLICE)).fetchone()
    return bool(count == ROWS_PER_SLICE or size >= batching.MAX_BYTES)
