"""Compare the answers that were paid with those that are stored, purged, asked again or known to be lost.

Counters of run 0 belong to the store and not to a run: `purged` (also by outcome) and `lost`. A store that an
earlier release made has no counter `purged` and may have been purged before that was counted; there nothing
is compared.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable

from harvester.store.journal.rows import add_counts

# Number of the run under which counts of the store itself are kept.
OF_STORE = 0
PURGED, LOST = "purged", "lost"
PURGED_OUTCOME = "purged."
# Counter of a run of another store: its answers that were copied from there.
COPIED = "copied"


def count_missing(connection: sqlite3.Connection) -> int:
    """Return how many paid answers are neither stored nor purged nor known to be lost; 0 where unknown.

    Call it within one snapshot: a run counts an answer and stores it together.
    """
    if not _counts_purges(connection):
        return 0
    query = (
        "SELECT name, sum(value) FROM counters WHERE name IN ('answers', 'reopened', ?, ?, ?) GROUP BY name"
    )
    counts = dict(connection.execute(query, (PURGED, LOST, COPIED)))
    query = "SELECT (SELECT count(*) FROM keys) + (SELECT count(*) FROM answers)"
    (stored,) = connection.execute(query).fetchone()
    gone = sum(counts.get(name, 0) for name in ("reopened", PURGED, LOST))
    came = counts.get("answers", 0) + counts.get(COPIED, 0)
    return max(0, int(came - gone - stored))


def count_purged(connection: sqlite3.Connection, outcomes: Iterable[str]) -> None:
    """Count answers with these outcomes that were removed for good, inside an open transaction.

    A store of an earlier release gets no such counter: what it purged before is unknown.
    """
    if _counts_purges(connection):
        counts = Counter(f"{PURGED_OUTCOME}{outcome}" for outcome in outcomes)
        add_counts(connection, OF_STORE, {PURGED: counts.total(), **counts})


def count_lost(connection: sqlite3.Connection, answers: int) -> None:
    """Count answers that damage took, inside an open transaction: `verify` has named them once."""
    add_counts(connection, OF_STORE, {LOST: answers})


def _counts_purges(connection: sqlite3.Connection) -> bool:
    query = "SELECT EXISTS (SELECT 1 FROM counters WHERE run = ? AND name = ?)"
    return bool(connection.execute(query, (OF_STORE, PURGED)).fetchone()[0])
