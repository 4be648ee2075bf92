"""Which errors retry, and how long to wait: tenacity's algebra of stop, wait and retry values.

Waiting for a rate limit is the limiter's matter and consumes no attempt, so it never comes here.
The law is asked only after a failure; a request that succeeds pays nothing for it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tenacity import RetryCallState, Retrying
from tenacity.retry import retry_if_exception
from tenacity.stop import stop_after_attempt
from tenacity.wait import wait_base, wait_exponential

from harvester.errors import BrokenAnswer, TeacherError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
RETRY_SHARE = 0.1
RETRIES_ON_CREDIT = 20.0
BROKEN_ANSWER_ATTEMPTS = 3
"""A 200 without a completion was probably billed: two further tries, then a dead letter."""


def may_retry(error: BaseException) -> bool:
    """A transient leaf of the tree; the error itself knows."""
    return isinstance(error, TeacherError) and not error.is_permanent


class wait_full_jitter(wait_exponential):  # noqa: N801 - tenacity's laws are lower case
    """Uniform in [0, min(cap, first * 2 ** (attempt - 1))], with our own source of chance.

    "Full jitter" of https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    def __init__(self, chance: random.Random) -> None:
        super().__init__(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        self.chance = chance

    def __call__(self, retry_state: RetryCallState) -> float:
        return self.chance.uniform(0.0, super().__call__(retry_state))


class wait_at_least_asked(wait_base):  # noqa: N801
    """The teacher's Retry-After is a floor under another wait."""

    def __init__(self, other: wait_base) -> None:
        self.other = other

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked = error.retry_after_s if isinstance(error, TeacherError) else None
        return (asked or 0.0) + self.other(retry_state)


class Allowance:
    """The retry budget of a whole run: one retry for ten first tries, twenty on credit, and one a second.

    What would pass it waits, so that a struggling teacher meets little more than the ordinary traffic.
    """

    def __init__(self) -> None:
        self._level = RETRIES_ON_CREDIT
        self._at: float | None = None

    def first_try(self) -> None:
        """A request was sent for the first time."""
        self._level = min(RETRIES_ON_CREDIT, self._level + RETRY_SHARE)

    def retry(self, now: float) -> float:
        """Take one retry; seconds until it may go, for it may be owed."""
        if self._at is not None:
            self._level = min(RETRIES_ON_CREDIT, self._level + max(0.0, now - self._at))
        self._at = now
        self._level -= 1
        return max(0.0, -self._level)


@dataclass(slots=True)
class Backoff:
    """The law of one run. `chance` makes the jitter repeatable in tests.

    Without `retry_billed`, what may have been billed is not tried again.
    """

    max_attempts: int = 5
    retry_billed: bool = True
    chance: random.Random = field(default_factory=random.Random)
    allowance: Allowance = field(default_factory=Allowance)

    def wait_s(self, error: TeacherError, attempts: int) -> float | None:
        """Seconds until the next try after `attempts` tries, None when this was the last."""
        state = _state(error, attempts)
        if not retry_if_exception(may_retry)(state) or (error.maybe_billed and not self.retry_billed):
            return None
        most = min(self.max_attempts, BROKEN_ANSWER_ATTEMPTS if isinstance(error, BrokenAnswer) else 10**6)
        if stop_after_attempt(most)(state):
            return None
        return wait_at_least_asked(wait_full_jitter(self.chance))(state)


def _state(error: TeacherError, attempts: int) -> RetryCallState:
    nothing: Any = None
    state = RetryCallState(retry_object=Retrying(), fn=nothing, args=(), kwargs={})
    state.attempt_number = attempts
    state.set_exception((type(error), error, error.__traceback__))
    return state
