"""Decide which rows need an attempt of their own, and which share the answer of another (single flight).

A row is fresh when the store does not hold its key and no equal request is in flight. Every other row is
written down as a further asker of the one answer, so that the answer is billed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from harvester.api.replies.usage import apportion
from harvester.api.request_builder import exact_microusd
from harvester.api.types import Completion, Request
from harvester.config.teacher_section import PriceSection
from harvester.errors import (
    AttemptTimeout,
    ConnectionBroken,
    PossiblyBilled,
    RateLimited,
    RequestFailed,
    ResultsDeleted,
    TeacherUnavailable,
)
from harvester.observe.counters import Counters
from harvester.run.accept import Acceptance
from harvester.run.dead_letters import PossiblyBilledRequests
from harvester.store.journal.records import (
    Answer,
    AnswerGroup,
    BatchRef,
    DeadLetter,
    HeldAnswer,
    SharedAnswer,
    asker_digest,
)
from harvester.store.journal.writer import AsyncWriter
from harvester.store.reuse import ReusableAnswer, ReuseIndex, find_answers
from harvester.system.clock import Clock
from harvester.teacher.teacher import AttemptResult

# Dead letters with these codes are asked again by the next run. A rejected prompt is not, nor one whose
# answers held no completion: those were probably paid. `--retry-dead` asks them too.
RE_ASKED = frozenset(
    error.code
    for error in (
        TeacherUnavailable,
        AttemptTimeout,
        ConnectionBroken,
        RateLimited,
        ResultsDeleted,
        PossiblyBilled,
    )
)


class InFlight:
    """Requests in flight, by key. At most as many as the queue and the windows hold.

    Args:
        writer: keeps dead letters and further askers.
        tally: counts rows, duplicates, cached and dead ones.
        reuse: finds answers kept under a lower `max_tokens`.
        possibly_billed: requests that must not be sent again.
        acceptance: is told how each row ends; None without `[accept]`.
    """

    def __init__(
        self,
        writer: AsyncWriter,
        tally: Counters,
        reuse: ReuseIndex,
        possibly_billed: PossiblyBilledRequests,
        clock: Clock,
        acceptance: Acceptance | None = None,
    ) -> None:
        self._acceptance = acceptance
        self._writer = writer
        self._tally = tally
        self._reuse = reuse
        self._possibly_billed = possibly_billed
        self._clock = clock
        self._followers: dict[bytes, list[Request]] = {}
        # Keys completed since the last look-up, and the askers submitted since then.
        self._completed: set[bytes] = set()
        self._submitted_askers: dict[tuple[bytes, str, int], bytes] = {}

    async def look_up(self, chunk: Sequence[Request]) -> Mapping[bytes, ReusableAnswer]:
        """Read what the store holds of these. Call `is_fresh` for each of them before the next look-up."""
        # A request that completes after the store was read and before its row is looked at would be in
        # neither place, and be paid twice: such keys are remembered for the length of a chunk.
        self._completed.clear()
        self._submitted_askers.clear()  # the store is read after all of them were submitted
        return await self._writer.call(lambda journal: find_answers(journal, chunk, self._reuse))

    def is_fresh(self, request: Request, held: ReusableAnswer | None) -> bool:
        """Count this row; return False when it needs no attempt of its own."""
        tally = self._tally
        tally.rows += 1
        if self._acceptance is not None:
            self._acceptance.taken(request)
        followers = self._followers.get(request.key)
        if followers is not None:
            followers.append(request)
            tally.duplicates += 1
        elif request.key in self._completed:
            self._add_asker(request, request.key)
            tally.duplicates += 1
            self._note_held(request, request.key)
        elif held is None or _asks_again(held.held):
            return not self._dead_letter_if_possibly_billed(request)
        else:
            self._add_asker_if_new(request, held)
            self._note_held(request, held.key)
            if held.held.state == "dead":
                tally.dead += 1
            else:
                tally.from_cache += 1
                tally.note(tally.cached_outcomes, held.held.outcome)
        return False

    def _note_held(self, request: Request, key: bytes) -> None:
        if self._acceptance is not None:
            self._acceptance.held(request, key)

    def _dead_letter_if_possibly_billed(self, request: Request) -> bool:
        """Write a dead letter for a request that may have been billed before and must not be sent again."""
        failure = self._possibly_billed.failure_of(request)
        if failure is None:
            return False
        self.begin(request)
        self.dead_letter(request, failure)
        return True

    def begin(self, request: Request) -> None:
        """Register the request as in flight: equal ones share its answer from now on."""
        self._followers[request.key] = []

    def complete(self, request: Request, completion: Completion | None = None) -> None:
        """Its answer, or dead letter (None), is durable: write those who shared it down as its askers."""
        self._completed.add(request.key)
        followers = self._followers.pop(request.key, [])
        for follower in followers:
            self._add_asker(follower, request.key)
        if self._acceptance is not None:
            for ended in (request, *followers):
                self._acceptance.answered(ended, completion)

    def is_open(self, key: bytes) -> bool:
        """Whether a row of this pass waits for the answer to this key."""
        return key in self._followers

    def note_completed(self, key: bytes) -> None:
        """Note that the answer to a key is durable for which no row of this pass waits yet."""
        self._completed.add(key)

    def dead_letter(self, request: Request, failure: RequestFailed, batch: BatchRef | None = None) -> None:
        """Write a dead letter; it is counted when it is durable. `batch` is the one in which it failed."""

        def stored() -> None:
            if batch is not None and not self.is_open(request.key):
                self.note_completed(request.key)  # its row is not read yet, or belongs to other prompts
                return
            self._tally.dead += 1
            self.complete(request)

        letter = dead_record(request, self._possibly_billed.relabel(failure), self._clock.wall())
        self._writer.submit(replace(letter, batch=batch), stored)

    def keep(self, request: Request) -> None:
        """A request that was to be asked again keeps its answer: write down who waited for the new one."""
        self._completed.add(request.key)
        for follower in self._followers.pop(request.key, []):
            self._add_asker(follower, request.key)

    def release(self, request: Request) -> None:
        """Forget a request without writing anything: the next run sends it, and its followers, again."""
        self._followers.pop(request.key, None)

    def _add_asker_if_new(self, request: Request, held: ReusableAnswer) -> None:
        """Write the row down as an asker of a held answer, unless the store has it with the same metadata."""
        answer, prompt, sample_index = held.held, request.prompt, request.sample_index
        newest = answer.asker
        if answer.shared_with or self._submitted_askers:  # rarely, and there are many rows
            submitted = self._submitted_askers.get((held.key, prompt.id, sample_index))
            newest = submitted or answer.last_digest(prompt.id, sample_index)
        if newest != asker_digest(prompt, sample_index):
            self._add_asker(request, held.key)

    def _add_asker(self, request: Request, key: bytes) -> None:
        row = (key, request.prompt.id, request.sample_index)
        self._submitted_askers[row] = asker_digest(request.prompt, request.sample_index)
        self._writer.submit(SharedAnswer(key, request.prompt, request.sample_index), lambda: None)


def answer_record(request: Request, answered: AttemptResult) -> Answer:
    """Make the journal's record of an answer: raw bytes, what was asked, what it cost."""
    raw, parsed = answered.raw, answered.completion
    return Answer(
        attempt_id=answered.attempt_id,
        key=request.key,
        raw=raw.body,
        status=raw.status,
        prompt=request.prompt,
        sample_index=request.sample_index,
        body=request.body,
        outcome=parsed.outcome,
        input_tokens=parsed.usage.input_tokens,
        output_tokens=parsed.usage.output_tokens,
        cost_microusd=answered.cost_microusd,
        attempts=answered.attempts,
        latency_s=raw.latency_s,
        at=raw.received_at,
        endpoint=raw.endpoint,
        charged=answered.charged,
    )


def answer_group(request: Request, answered: AttemptResult, price: PriceSection | None) -> AnswerGroup:
    """Make the journal's record of the answers to a request for several.

    Cost and charge of the request are split over the rows that got an answer, so that the sums are those of
    the request.
    """
    assert answered.choices is not None
    pairs = zip(request.rows, answered.choices.answers, strict=False)  # fewer may have come
    kept = [(row, choice) for row, choice in pairs if choice is not None]
    usages = [choice.completion.usage for _, choice in kept]
    # The exact price of each row, in millionths of the unit.
    worth = [
        round(1e6 * exact_microusd(price, usage.input_tokens, usage.output_tokens, usage.cached_tokens))
        for usage in usages
    ]
    costs = apportion(answered.cost_microusd, worth)
    tokens, microusd = answered.charged or (answered.completion.usage.total, answered.cost_microusd)
    token_parts = apportion(tokens, [usage.total for usage in usages])
    charges = zip(token_parts, apportion(microusd, worth), strict=True)
    answers = []
    for (row, choice), cost, charged in zip(kept, costs, charges, strict=True):
        part = AttemptResult(
            replace(answered.raw, body=choice.raw),
            choice.completion,
            answered.attempt_id,
            answered.attempts,
            cost,
            charged,
        )
        answers.append(answer_record(row, part))
    first = answered.attempt_id
    return AnswerGroup(tuple(answers), tuple(range(first, first + len(request.rows))))


def dead_record(request: Request, failure: RequestFailed, at: float) -> DeadLetter:
    """Make a dead letter: the row and why it gets no answer. `at` is in Unix seconds."""
    return DeadLetter(
        key=request.key,
        prompt=request.prompt,
        sample_index=request.sample_index,
        body=request.body,
        code=failure.error.code,
        message=str(failure.error),
        attempts=failure.attempts,
        at=at,
    )


def _asks_again(held: HeldAnswer) -> bool:
    """Whether a request with this entry in the store is sent again."""
    return held.state == "dead" and held.outcome in RE_ASKED
