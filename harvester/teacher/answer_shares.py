"""Notice an endpoint whose answers are unusable more often than those of the others. Pure.

Empty, invalid and broken answers may be the prompts' fault. So each endpoint is compared with the share of
such answers that the others gave meanwhile: a cumulative sum of log-likelihood ratios (E. S. Page,
"Continuous inspection schemes", Biometrika 41, 1954) between that share and one by which half of the usable
answers became unusable. A cluster of hard prompts may meet one endpoint alone: what exceeds the bound is a
suspicion, and the rows that caused it are kept, to ask them elsewhere.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from harvester.api.types import Request

# The others' share is that of about so many of their last answers.
MEMORY = 200.0
# Share of the usable answers that would be unusable at an endpoint which has turned.
TURNED = 0.5
# The sum that is a suspicion: reached by chance once in e ** 14, a million, answers of an endpoint as good as
# the others.
BOUND = 14.0
# Rows with an unusable answer that are kept.
ROWS_KEPT = 3


@dataclass(slots=True)
class _Recent:
    """Answers of one endpoint, older ones counting less; its sum, and its last rows with unusable answers."""

    bad: float = 0.0
    count: float = 0.0
    total: float = 0.0
    rows: deque[Request] = field(default_factory=lambda: deque(maxlen=ROWS_KEPT))


class AnswerShares:
    """Shares of unusable answers by endpoint.

    Attributes:
        suspects: endpoints whose sum exceeds the bound.
    """

    def __init__(self, endpoints: Iterable[str]) -> None:
        self._recent = {endpoint: _Recent() for endpoint in endpoints}
        self.suspects: set[str] = set()

    def note(self, endpoint: str, request: Request, *, is_bad: bool) -> bool:
        """Count an answer; return whether its endpoint has just become a suspect."""
        recent = self._recent[endpoint]
        others = [other for name, other in self._recent.items() if name != endpoint]
        if not others:
            return False
        bad, count = sum(other.bad for other in others), sum(other.count for other in others)
        usual = (bad + 1) / (count + 2)
        turned = usual + TURNED * (1 - usual)
        recent.total += math.log(turned / usual) if is_bad else math.log(1 - TURNED)
        recent.total = max(0.0, recent.total)
        keep = 1 - 1 / MEMORY
        recent.bad, recent.count = recent.bad * keep + is_bad, recent.count * keep + 1
        if is_bad:
            recent.rows.append(request)
        if recent.total < BOUND or endpoint in self.suspects:
            return False
        self.suspects.add(endpoint)
        return True

    def share(self, endpoint: str) -> float | None:
        """Return share of the last answers that are unusable; None where there are none."""
        recent = self._recent[endpoint]
        return recent.bad / recent.count if recent.count else None

    def share_of_others(self, endpoint: str) -> float | None:
        """Return the same of all other endpoints together."""
        others = [recent for name, recent in self._recent.items() if name != endpoint]
        count = sum(recent.count for recent in others)
        return sum(recent.bad for recent in others) / count if count else None

    def rows(self, endpoint: str) -> list[Request]:
        """Return the last rows that this endpoint gave an unusable answer to."""
        return list(self._recent[endpoint].rows)

    def acquit(self, endpoint: str) -> None:
        """Start the sum anew: it was the prompts."""
        self.suspects.discard(endpoint)
        self._recent[endpoint].total = 0.0

    def forget(self, endpoint: str) -> None:
        """Forget the answers of an endpoint that was put aside: they are no measure for others."""
        self.suspects.discard(endpoint)
        self._recent[endpoint] = _Recent()
