"""Name the ways in which requests reach a teacher."""

from __future__ import annotations

from enum import StrEnum


class Transport(StrEnum):
    """How requests reach the teacher: `[run] transport`."""

    ONLINE = "online"  # one by one
    BATCH = "batch"  # in batches, which may take a day and cost half
    HYBRID = "hybrid"  # in batches; one by one what these don't answer in time
