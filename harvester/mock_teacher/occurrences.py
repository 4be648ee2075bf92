"""Count answers to equal requests, so that each gets another sample above temperature 0."""

from __future__ import annotations

from collections import Counter

from harvester.mock_teacher.wire import ChatRequest


class Occurrences:
    """How often each request was answered; requests with a seed of their own get equal answers."""

    def __init__(self) -> None:
        self._answered: Counter[bytes] = Counter()

    def note(self, ask: ChatRequest) -> None:
        """Count an answer."""
        if ask.temperature > 0 and ask.seed is None:
            self._answered[ask.body_sha256] += 1

    def of(self, ask: ChatRequest) -> int:
        """Return how many equal requests were answered before; 0 for a request with a seed."""
        return self._answered[ask.body_sha256] if ask.seed is None else 0
