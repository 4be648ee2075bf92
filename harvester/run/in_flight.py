"""Single flight: which rows need a send of their own, and who shares whose answer.

A row is fresh when the store does not hold its key and no equal request is under way. Everyone else is
written down as a further asker of the one answer, so that it is billed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harvester.api.types import Request
from harvester.errors import GaveUp
from harvester.observe.counters import Tally
from harvester.run.possibly_billed import PossiblyBilledRequests
from harvester.store.journal.records import Answer, DeadLetter, HeldAnswer, SharedAnswer, asker_of
from harvester.store.journal.writer import AsyncWriter
from harvester.store.reuse import ReusableAnswer, ReuseIndex, look_up
from harvester.system.clock import Clock
from harvester.teacher.teacher import Answered

RE_ASKED = frozenset(
    {"unavailable", "timeout", "connection", "broken_answer", "rate_limited", "possibly_billed"}
)
"""Dead letters of these kinds get another chance in the next run; a rejected prompt never does."""


class InFlight:
    """Requests under way, by key. Its size is bounded by the queue and the window."""

    def __init__(
        self,
        scribe: AsyncWriter,
        tally: Tally,
        ceilings: ReuseIndex,
        suspects: PossiblyBilledRequests,
        clock: Clock,
    ) -> None:
        self._suspects = suspects
        self._clock = clock
        self._scribe = scribe
        self._tally = tally
        self._ceilings = ceilings
        self._under_way: dict[bytes, list[Request]] = {}
        self._landed: set[bytes] = set()
        self._told: dict[tuple[bytes, str, int], bytes] = {}

    async def look_up(self, chunk: Sequence[Request]) -> Mapping[bytes, ReusableAnswer]:
        """What the store holds of these. Call `is_fresh` for each of them before the next look-up."""
        # A flight that lands after the store was read and before its row is looked at would be in
        # neither place, and be paid twice: such landings are remembered for the length of a chunk.
        self._landed.clear()
        self._told.clear()  # the store is asked after all of it was submitted
        return await self._scribe.call(lambda journal: look_up(journal, chunk, self._ceilings))

    def is_fresh(self, request: Request, found: ReusableAnswer | None) -> bool:
        """Count this row; False when it needs no flight of its own."""
        tally = self._tally
        tally.rows += 1
        followers = self._under_way.get(request.key)
        if followers is not None:
            followers.append(request)
            tally.duplicates += 1
        elif request.key in self._landed:
            self._note_asker(request, request.key)
            tally.duplicates += 1
        elif found is None or _asks_again(found.held):
            sentence = self._suspects.sentence(request)
            if sentence is not None:
                self.take_off(request)
                self.bury(request, sentence)
            return sentence is None
        else:
            self._tell(request, found)
            tally.dead += found.held.state == "dead"
            tally.from_cache += found.held.state != "dead"
        return False

    def take_off(self, request: Request) -> None:
        """This request is under way from now on."""
        self._under_way[request.key] = []

    def land(self, request: Request) -> None:
        """Its ending is durable: those who shared it are written down as its askers."""
        self._landed.add(request.key)
        for follower in self._under_way.pop(request.key, ()):
            self._note_asker(follower, request.key)

    def bury(self, request: Request, gone: GaveUp) -> None:
        """A dead letter: it counts as one when it is durable."""

        def stored() -> None:
            self._tally.dead += 1
            self.land(request)

        last = self._suspects.named(gone)
        self._scribe.submit(dead_record(request, last, self._clock.wall()), stored)

    def drop(self, request: Request) -> None:
        """It was not sent; it and its followers stay open for the next run."""
        self._under_way.pop(request.key, None)

    def _tell(self, request: Request, found: ReusableAnswer) -> None:
        """A held answer has one more row, or what stays at home of a row is not what was told last."""
        held, prompt, sample_index = found.held, request.prompt, request.sample_index
        newest = held.asker
        if held.further or self._told:  # rarely, and there are many rows
            told = self._told.get((found.key, prompt.id, sample_index))
            newest = told or held.newest(prompt.id, sample_index)
        if newest != asker_of(prompt, sample_index):
            self._note_asker(request, found.key)

    def _note_asker(self, request: Request, key: bytes) -> None:
        row = (key, request.prompt.id, request.sample_index)
        self._told[row] = asker_of(request.prompt, request.sample_index)
        self._scribe.submit(SharedAnswer(key, request.prompt, request.sample_index), lambda: None)


def answer_record(request: Request, answered: Answered) -> Answer:
    """What the journal keeps of an answer: raw bytes, what was asked, what it cost."""
    raw, parsed = answered.raw, answered.completion
    return Answer(
        attempt_id=answered.attempt_id,
        key=request.key,
        raw=raw.body,
        status=raw.status,
        prompt=request.prompt,
        sample_index=request.sample_index,
        body=request.body,
        outcome=str(parsed.outcome),
        input_tokens=parsed.usage.input_tokens,
        output_tokens=parsed.usage.output_tokens,
        cost_microusd=answered.cost_microusd,
        attempts=answered.attempts,
        latency_s=raw.latency_s,
        at=raw.received_at,
        endpoint=raw.endpoint,
    )


def dead_record(request: Request, gone: GaveUp, at: float) -> DeadLetter:
    """A dead letter: the row and why it will get no answer."""
    return DeadLetter(
        key=request.key,
        prompt=request.prompt,
        sample_index=request.sample_index,
        body=request.body,
        code=gone.error.code,
        message=str(gone.error),
        attempts=gone.attempts,
        at=at,
    )


def _asks_again(held: HeldAnswer) -> bool:
    """Whether a request that the store knows is worth another send."""
    return held.state == "dead" and held.outcome in RE_ASKED
