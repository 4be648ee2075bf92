"""Serve the allocator of a fleet to its ranks: the coordinator actor. It knows no prompts or answers."""

from __future__ import annotations

import json
import time
from typing import Any

from harvester.fleet.allocator import Allocator


class Coordinator:
    """The actor. Messages are JSON texts, so that nothing but text is unpickled.

    Args:
        spec: JSON object of the arguments of `Allocator`.
    """

    def __init__(self, spec: str) -> None:
        values = json.loads(spec)
        self._allocator = Allocator(
            values["windows"],
            {span: (limits[0], limits[1]) for span, limits in values["budgets"].items()},
            values["ranks"],
            time.monotonic(),
            values["state"],
            values["longest_attempt_s"],
        )
        self._bytes = 0

    def expected_run(self, rank: int) -> str:
        """Return the run that the store of a rank must hold, "" for none."""
        return self._allocator.expected_run(rank)

    def register(self, rank: int, text: str) -> int:
        """Take up a rank that is about to start; return its incarnation."""
        facts = json.loads(text)
        return self._allocator.register(
            rank,
            facts["spent"],
            facts["ends_at"],
            former=facts["former"],
            is_same_store=facts["is_same_store"],
            now=time.monotonic(),
        )

    def exchange(self, rank: int, incarnation: int, text: str) -> str:
        """Take a report and return the rank's part; "" where another process has taken its place."""
        answer = self._allocator.exchange(rank, incarnation, json.loads(text), time.monotonic())
        reply = "" if answer is None else json.dumps(answer)
        self._bytes += len(text) + len(reply)
        return reply

    def end(self, rank: int, is_lost: bool) -> None:
        """Take note that a rank has ended, or that its process is gone."""
        self._allocator.end(rank, is_lost=is_lost)

    def overview(self, is_over: bool) -> str:
        """Return `state` for the next fleet, `budgets` for the status, and what was exchanged so far."""
        overview: dict[str, Any] = {
            "state": self._allocator.state(is_over=is_over),
            "budgets": self._allocator.budgets(),
            "exchanges": self._allocator.exchanges,
            "bytes": self._bytes,
        }
        return json.dumps(overview)
