"""Keep track of answers whose address has not been checked since, and take them back if it turned out bad.

An answer is proven by a check of its address that was sent after the answer came. Unproven ones are in the
journal like all others, for they are paid; they are not sealed. Taking them back moves them to
`retried.jsonl` and asks their rows again, before all others.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from harvester.api.types import Request
from harvester.observe.counters import Counters
from harvester.run.background.proof_marks import EarlierRows, load_earlier, mark_proved
from harvester.run.in_flight import InFlight
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Answer
from harvester.store.journal.writer import AsyncWriter
from harvester.store.maintain.seal_hold import SealHold
from harvester.system.clock import Clock

# A check of an address is due when so many of its answers are unproven.
MANY = 500


@dataclass(frozen=True, slots=True)
class _UnprovenRow:
    request: Request
    outcome: str
    at: float


@dataclass(slots=True)
class Unproven:
    """Rows by base URL, in the order in which their answers came.

    Attributes:
        on_add: called for each answer.
        is_on: whether there is a check that would prove them; else none are kept.
        earlier: answers that earlier runs left unproven, by base URL.
        asks_again: False where rows are asked again by the next run only, as what is needed is known to more
            than their worker (`[accept]`).
    """

    writer: AsyncWriter
    in_flight: InFlight
    tally: Counters
    clock: Clock
    model: str
    hold: SealHold
    put_first: Callable[[Iterable[Request]], None]
    asks_again: bool = True
    is_on: bool = False
    on_add: Callable[[str], None] = lambda _: None
    earlier: dict[str, EarlierRows] = field(default_factory=dict)
    _rows: defaultdict[str, deque[_UnprovenRow]] = field(default_factory=lambda: defaultdict(deque))

    def add(self, request: Request, answer: Answer) -> None:
        """Note an answer that was submitted to the journal."""
        if self.is_on:
            self._rows[answer.endpoint].append(_UnprovenRow(request, answer.outcome, answer.at))
            self.on_add(answer.endpoint)

    def count(self, url: str) -> int:
        """Number of unproven answers of an address."""
        return len(self._rows[url]) + (len(self.earlier[url].keys) if url in self.earlier else 0)

    @property
    def first_at(self) -> float:
        """When the first unproven answer came, in Unix seconds; infinity where there is none."""
        first = (row.at for rows in self._rows.values() for row in rows)
        return min((*first, *(rows.first_at for rows in self.earlier.values())), default=math.inf)

    async def load_earlier(self, urls: Sequence[str]) -> None:
        """Read what earlier runs left unproven."""
        now = self.clock.wall()
        self.earlier = await self.writer.call(lambda j: load_earlier(j, urls, self.model, now))

    async def prove(self, url: str, sent_at: float) -> None:
        """Note that an address passed a check that was sent at this time, in Unix seconds."""
        self._rows[url] = deque(row for row in self._rows[url] if row.at >= sent_at)
        self.earlier.pop(url, None)
        await self.writer.call(lambda journal: mark_proved(journal, url, self.model, sent_at))

    def prove_all(self) -> None:
        """Count all as proven: nothing can tell."""
        self._rows.clear()
        self.earlier.clear()

    def stop(self) -> None:
        """Keep none any more: there are no checks."""
        self.is_on = False
        self.prove_all()

    async def take_back(self, url: str) -> int:
        """Take all unproven answers of an address out of the journal, and ask their rows again.

        Returns:
            How many answers that were.

        Raises:
            StoreError: the disk refuses.
        """
        from harvester.store.maintain.reopen import reopen_journalled

        await self.writer.flush()
        rows = {row.request.key: row for row in self._rows.pop(url, ())}
        rows = {key: row for key, row in rows.items() if not self.in_flight.is_open(key)}
        earlier = self.earlier.pop(url, EarlierRows()).keys
        if not rows and not earlier:
            return 0
        if self.asks_again:
            for row in rows.values():  # equal requests wait for the new answer
                self.in_flight.begin(row.request)

        def reopen(journal: Journal) -> set[bytes]:
            return reopen_journalled(journal, journal.path.parent, rows.keys() | earlier)

        taken: set[bytes] = set()
        try:
            async with self.hold.lock:
                taken = await self.writer.call(reopen)
        finally:
            if self.asks_again:
                for key in rows.keys() - taken:
                    self.in_flight.keep(rows[key].request)
        for key in taken & rows.keys():
            self.tally.answers_stored -= 1
            self.tally.outcomes[rows[key].outcome] -= 1
        self.tally.taken_back += len(taken)
        if self.asks_again:
            self.put_first(rows[key].request for key in rows if key in taken)
        return len(taken)
