"""Name the files and folders of a store, in one place.

`data/FORMAT.md` says what each of them holds.
"""

from __future__ import annotations

LOCK = "LOCK"
JOURNAL = "journal.db"
SHARDS = "shards"
CANARY = "canary"
CANARY_ROUNDS = "rounds.jsonl"
QUARANTINE = "quarantine"
STATUS = "status.json"
