"""Name the files and folders of a store, in one place.

`data/FORMAT.md` says what each of them holds.
"""

from __future__ import annotations

LOCK = "LOCK"
JOURNAL = "journal.db"
SHARDS = "shards"
DEAD_LETTERS = "dead_letters.jsonl"
RETRIED = "retried.jsonl"
STATUS = "status.json"
TIMELINE = "trace.jsonl"
CONTROL_SOCKET = "control.sock"
QUARANTINE = "quarantine"
# The canary prompts have a store of their own in this folder; CANARY_ROUNDS lies in it.
CANARY = "canary"
CANARY_ROUNDS = "rounds.jsonl"
