"""Decide which errors are retried and how long to wait: tenacity's retry, stop and wait values.

Waiting for a rate limit is the limiter's job and uses up no attempt. `RateLimited` comes here only when the
limiter found that the row alone is refused: then it is not tried again. Failures before anything was sent (no
connection) use up no attempt either: only the time out of reach ends them, in the circuit breaker.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, stop_never
from tenacity.stop import stop_base
from tenacity.wait import wait_base, wait_exponential

from harvester.errors import BrokenAnswer, RateLimited, TeacherError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
# A wait that the teacher names for one row is honoured up to this.
LONGEST_ROW_WAIT_S = 600.0
# Longest wait after a failed connection. The circuit breaker adds its own pauses.
LONGEST_CONNECT_WAIT_S = 1.0
# Retry budget: retries allowed per first attempt, and the most that can be saved up.
RETRY_SHARE = 0.1
MOST_SAVED_RETRIES = 20.0
# A 200 without a completion was probably billed: at most three attempts, then a dead letter.
BROKEN_ANSWER_ATTEMPTS = 3
# All retries of one run after such answers: a few, and one for every 20 rows asked. A teacher that breaks
# half of its answers is then paid for 5 % more requests than rows, not for 100 % more.
BROKEN_ANSWER_RETRIES = 3
BROKEN_ANSWER_RETRY_SHARE = 0.05
# Each further endpoint may break this many answers before it counts as down, and the rows go to another one.
BROKEN_ANSWER_RETRIES_PER_REPLICA = 20

_T = TypeVar("_T")
Send = Callable[[int], Awaitable[_T]]
Sleep = Callable[[float], Awaitable[None]]


class FullJitter(wait_exponential):
    """Wait a uniform time in [0, min(longest, FIRST_WAIT_S * 2 ** (attempt - 1))] seconds.

    "Full jitter" of https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/. tenacity's own
    `wait_random_exponential` is the same but draws from the global generator, which tests can't repeat.
    """

    def __init__(self, chance: random.Random, longest_s: float) -> None:
        super().__init__(multiplier=FIRST_WAIT_S, max=longest_s)
        self.chance = chance

    def __call__(self, retry_state: RetryCallState) -> float:
        return self.chance.uniform(0.0, super().__call__(retry_state))


class RetryAfter(wait_base):
    """Wait as long as the teacher asked in `Retry-After`, 0 when it asked for nothing.

    Only this row waits, and with it the end of the run: a wait of hours is not honoured.
    """

    def __call__(self, retry_state: RetryCallState) -> float:
        error = _error_of(retry_state)
        return min((error.retry_after_s if error else None) or 0.0, LONGEST_ROW_WAIT_S)


class StopOnBrokenAnswers(stop_base):
    """Stop after an answer without a completion, once the row or the run has used up its retries."""

    def __init__(self, budget: RetryBudget) -> None:
        self._budget = budget

    def __call__(self, retry_state: RetryCallState) -> bool:
        if not isinstance(_error_of(retry_state), BrokenAnswer):
            return False
        return (
            retry_state.attempt_number >= BROKEN_ANSWER_ATTEMPTS or not self._budget.take_for_broken_answer()
        )


def _error_of(retry_state: RetryCallState) -> TeacherError | None:
    error = retry_state.outcome.exception() if retry_state.outcome else None
    return error if isinstance(error, TeacherError) else None


def was_sent(error: TeacherError) -> bool:
    """Whether the request may have reached the teacher."""
    return error.status is not None or error.maybe_billed


class RetryBudget:
    """Bounds the retries of a whole run, so that a failing teacher gets little more than normal traffic.

    Each first attempt earns a tenth of a retry and each second earns one, up to 20 saved; a retry beyond that
    waits; one for which no file descriptor was left takes none. ("Handling overload" in Google's "Site
    Reliability Engineering", chapter 21, has per-client retry budgets of 10 %.)

    Answers without a completion were probably paid, so their retries have a bound that time does not raise.

    Args:
        replicas: further endpoints, to which a row goes after a broken answer.
    """

    def __init__(self, replicas: int = 0) -> None:
        self._saved = MOST_SAVED_RETRIES
        self._refilled_at: float | None = None
        self._for_broken_answers = BROKEN_ANSWER_RETRIES + replicas * float(BROKEN_ANSWER_RETRIES_PER_REPLICA)

    def first_attempt(self) -> None:
        """Earn a tenth of a retry: a request is sent for the first time."""
        self._saved = min(MOST_SAVED_RETRIES, self._saved + RETRY_SHARE)
        self._for_broken_answers += BROKEN_ANSWER_RETRY_SHARE

    def take_for_broken_answer(self) -> bool:
        """Spend one of the retries after answers without a completion; False if none is left."""
        if self._for_broken_answers < 1:
            return False
        self._for_broken_answers -= 1
        return True

    def take(self, now: float) -> float:
        """Spend one retry; returns the seconds to wait before it, 0 when one was saved up."""
        if self._refilled_at is not None:
            self._saved = min(MOST_SAVED_RETRIES, self._saved + max(0.0, now - self._refilled_at))
        self._refilled_at = now
        self._saved -= 1
        return max(0.0, -self._saved)


@dataclass(slots=True)
class RetryPolicy:
    """How the requests of one run are retried.

    Attributes:
        max_attempts: attempts that were sent, the first included.
        retry_billed: whether a request is sent again after an attempt that may have been billed.
        chance: source of the jitter; tests pass a seeded one.
    """

    max_attempts: int = 5
    retry_billed: bool = True
    chance: random.Random = field(default_factory=random.Random)
    budget: RetryBudget = field(default_factory=RetryBudget)

    async def run(self, send: Send[_T], sleep: Sleep) -> _T:
        """Await `send(attempt number)` until it returns, with waits in between.

        Args:
            sleep: awaits the given seconds; it may return early.

        Raises:
            TeacherError: the last error, when it must not be retried or the attempts are used up.
        """

        def retrying() -> AsyncRetrying:
            return AsyncRetrying(
                retry=retry_if_exception(self._may_retry),
                stop=stop_after_attempt(self.max_attempts) | StopOnBrokenAnswers(self.budget),
                wait=RetryAfter() + FullJitter(self.chance, LONGEST_WAIT_S),
                sleep=sleep,
                reraise=True,
            )

        async def connect(number: int) -> _T:
            return await _run(lambda: self._reconnecting(sleep), lambda _: send(number))

        return await _run(retrying, connect)

    def _reconnecting(self, sleep: Sleep) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(_never_left),
            stop=stop_never,
            wait=FullJitter(self.chance, LONGEST_CONNECT_WAIT_S),
            sleep=sleep,
            reraise=True,
        )

    def _may_retry(self, error: BaseException) -> bool:
        if not isinstance(error, TeacherError) or error.is_permanent or not was_sent(error):
            return False
        if isinstance(error, RateLimited):
            return False
        return self.retry_billed or not error.maybe_billed


def _never_left(error: BaseException) -> bool:
    return isinstance(error, TeacherError) and not error.is_permanent and not was_sent(error)


async def _run(retrying: Callable[[], AsyncRetrying], send: Send[_T]) -> _T:
    """Retry as tenacity says. The first attempt is made without it: its bookkeeping costs 0.1 ms a request,
    and nearly all first attempts succeed.
    """
    try:
        return await send(1)
    except TeacherError as error:
        first_error = error
    async for attempt in retrying():
        with attempt:
            number = attempt.retry_state.attempt_number
            if number == 1:
                raise first_error
            return await send(number)
    raise AssertionError("tenacity returns a result or raises")
