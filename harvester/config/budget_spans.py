"""Name the spans for which the ceilings of a budget hold, and compute when they begin and end. Pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from enum import StrEnum


class BudgetSpan(StrEnum):
    """For how long the ceilings of a budget hold."""

    RUN = "run"  # one run, together with the runs just before it that were killed
    STORE = "store"  # all runs of the store
    DAY = "day"  # a day, UTC
    MONTH = "month"  # a calendar month, UTC

    def start(self, wall: float) -> float:
        """Return when the span that holds the time `wall` began, in Unix seconds; -inf for run and store."""
        midnight = datetime.fromtimestamp(wall, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        if self is BudgetSpan.DAY:
            return midnight.timestamp()
        if self is BudgetSpan.MONTH:
            return midnight.replace(day=1).timestamp()
        return -math.inf

    def end(self, wall: float) -> float:
        """Return when the span that holds the time `wall` ends, in Unix seconds; inf for run and store."""
        if self is BudgetSpan.DAY:
            return self.start(wall) + 86_400
        if self is BudgetSpan.MONTH:
            day_of_next_month = datetime.fromtimestamp(self.start(wall), UTC) + timedelta(days=32)
            return day_of_next_month.replace(day=1).timestamp()
        return math.inf
