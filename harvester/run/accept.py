"""Ask further samples of a prompt until enough of its answers pass their verifier (`[accept]`).

Every prompt is first asked `per_prompt` times. When all of these answers are judged, as many further samples
are asked as are missing, and so on until enough have passed or `of` were asked. Stored answers count like new
ones: a resumed run judges them again and goes on where the killed one ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harvester.api.request_builder import RequestBuilder, requests
from harvester.api.types import Completion, Prompt, Request
from harvester.config.config import HarvestConfig
from harvester.errors import Ending
from harvester.observe.counters import Counters
from harvester.quality.verifiers.verifiers import AnswerVerdict, Candidate, Verifiers
from harvester.run.endings import PassEnding
from harvester.store.journal.records import asker_digest

if TYPE_CHECKING:
    from harvester.store.shards.schema import Sample

# Answers judged in one call of a thread.
BATCH = 256

# A row of the corpus: the key of its answer, and a digest of the prompt that asked for it.
Row = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class AcceptSetup:
    """What accepting needs beside the configuration.

    Attributes:
        store: where stored answers are read from.
        verdicts: of the answers that the store held when the run began.
        accepted: number of them that the prompts of this run accept; counted for `until` only.
        is_met: whether these are as many as `until` asks for.
        count_further: called for each further request, which no prompt file announced.
    """

    store: Path
    verifiers: Verifiers
    verdicts: Mapping[Row, AnswerVerdict]
    accepted: int
    is_met: bool
    count_further: Callable[[], None]


def prepare_accept(
    store: Path,
    config: HarvestConfig,
    verifiers: Verifiers,
    prompts: Iterable[Prompt],
    count_further: Callable[[], None],
) -> AcceptSetup:
    """Judge the answers that a store holds, and count those that `prompts` can accept.

    Raises:
        StoreError: the store can't be read.
        PromptError: a prompt can't be used.
    """
    from harvester.export.score import COLUMNS, candidate_of
    from harvester.store.reader import Corpus

    verdicts = {
        _row_of(sample): verifiers.judge(candidate_of(sample)).verdict
        for sample in Corpus.open(store).samples(COLUMNS)
    }
    accepted, until = 0, config.accept.until if config.accept is not None else None
    if until is not None and AnswerVerdict.PASSED in verdicts.values():
        feed = requests(prompts, config, range(config.most_samples))
        accepted = sum(
            verdicts.get((request.key, asker_digest(request.prompt, request.sample_index)))
            == AnswerVerdict.PASSED
            for request in feed
        )
    is_met = until is not None and accepted >= until
    return AcceptSetup(store, verifiers, verdicts, accepted, is_met, count_further)


@dataclass(slots=True)
class _OpenPrompt:
    """A prompt that may need further samples: how many are asked so far, and of these ended and passed."""

    prompt: Prompt
    asked: int
    ended: int = 0
    passed: int = 0


@dataclass(frozen=True, slots=True)
class _EndedRow:
    """A row that has ended: with a new answer, with the stored answer of `key`, or with neither."""

    request: Request
    completion: Completion | None = None
    key: bytes | None = None


class Acceptance:
    """Judges the rows of a pass as they end, and says which further requests are needed.

    Memory grows with the prompts in flight, and by a verdict for each answer stored before. Everything but
    judging runs on the event loop.
    """

    def __init__(
        self, config: HarvestConfig, setup: AcceptSetup, tally: Counters, ending: PassEnding
    ) -> None:
        assert config.accept is not None
        self._builder = RequestBuilder(config)
        self._accept = config.accept
        self._setup = setup
        self._tally = tally
        self._ending = ending
        self._open: dict[tuple[str, str, int], _OpenPrompt] = {}
        self._ended: asyncio.Queue[_EndedRow] = asyncio.Queue()
        self._further: deque[Request] = deque()
        # Set when there are further requests, when no prompt is open any more, and when the pass drains.
        self.changed = asyncio.Event()
        ending.when_draining(self.changed.set)
        if setup.is_met:
            tally.accepted = setup.accepted
            ending.drain(Ending.ACCEPTED)

    @property
    def is_open(self) -> bool:
        """Whether a prompt may still need further samples."""
        return bool(self._open)

    def next_requests(self, most: int) -> list[Request]:
        """Take further requests, up to `most`."""
        self.changed.clear()
        count = min(most, len(self._further))
        return [self._further.popleft() for _ in range(count)]

    def taken(self, request: Request) -> None:
        """Note that a row is taken up; it will end, unless the pass drains."""
        self._open.setdefault(_line(request), _OpenPrompt(request.prompt, asked=self._accept.per_prompt))

    def answered(self, request: Request, completion: Completion | None) -> None:
        """Note a row with a new answer, or with a dead letter (None)."""
        self._ended.put_nowait(_EndedRow(request, completion))

    def held(self, request: Request, key: bytes) -> None:
        """Note a row whose answer, or dead letter, the store holds under this key."""
        self._ended.put_nowait(_EndedRow(request, key=key))

    async def judge_rows(self) -> None:
        """Judge rows as they end, until cancelled. Judging may take long: it runs in a thread."""
        while True:
            rows = [await self._ended.get()]
            while len(rows) < BATCH and not self._ended.empty():
                rows.append(self._ended.get_nowait())
            verdicts = await asyncio.to_thread(self._judge, rows)
            for row, verdict in zip(rows, verdicts, strict=True):
                self._note(row.request, verdict)
                self._ended.task_done()

    async def finish(self) -> None:
        """Wait until all rows that ended are judged and counted."""
        await self._ended.join()

    def _judge(self, rows: Sequence[_EndedRow]) -> list[AnswerVerdict | None]:
        """Return the verdicts, None for a row without an answer."""
        unknown = {row.key for row in rows if row.key is not None and _place(row) not in self._setup.verdicts}
        stored = _read_answers(self._setup.store, unknown) if unknown else {}
        verdicts: list[AnswerVerdict | None] = []
        for row in rows:
            if row.key is None:
                answer = row.completion
                given = None if answer is None else (answer.text, str(answer.outcome))
            elif (known := self._setup.verdicts.get(_place(row))) is not None:
                verdicts.append(known)
                continue
            else:
                given = stored.get(row.key)
            verdicts.append(None if given is None else self._judge_one(row.request.prompt, *given))
        return verdicts

    def _judge_one(self, prompt: Prompt, text: str | None, outcome: str) -> AnswerVerdict:
        candidate = Candidate(text, outcome, prompt.reference, prompt.tags, prompt.metadata)
        return self._setup.verifiers.judge(candidate).verdict

    def _note(self, request: Request, verdict: AnswerVerdict | None) -> None:
        tally, accept = self._tally, self._accept
        prompt = self._open[_line(request)]
        prompt.ended += 1
        if verdict == AnswerVerdict.PASSED:
            prompt.passed += 1
            tally.accepted += 1
            if accept.until is not None and tally.accepted >= accept.until:
                self._ending.drain(Ending.ACCEPTED)
        elif verdict == AnswerVerdict.FAILED:
            tally.rejected += 1
        elif verdict == AnswerVerdict.UNVERIFIABLE:
            tally.unverifiable += 1
        if prompt.ended < prompt.asked:
            return
        missing = min(accept.per_prompt - prompt.passed, accept.of - prompt.asked)
        if missing > 0:
            samples = range(prompt.asked, prompt.asked + missing)
            prompt.asked += missing
            for further in self._builder.build(prompt.prompt, samples):
                self._further.append(further)
                self._setup.count_further()
        else:
            del self._open[_line(request)]
        self.changed.set()


def _line(request: Request) -> tuple[str, str, int]:
    """Return what tells prompts apart: a line may stand twice in the files, with one id."""
    return request.prompt.id, request.prompt.file, request.prompt.line


def _place(row: _EndedRow) -> Row:
    assert row.key is not None
    return row.key, asker_digest(row.request.prompt, row.request.sample_index)


def _row_of(sample: Sample) -> Row:
    prompt = Prompt(sample.prompt_id, (), sample.reference, tuple(sample.tags), metadata=sample.metadata)
    return bytes.fromhex(sample.key), asker_digest(prompt, sample.sample_index)


def _read_answers(store: Path, keys: Collection[bytes]) -> dict[bytes, tuple[str | None, str]]:
    """Return text and outcome of these stored answers: one walk over the corpus.

    It is needed for answers that another prompt asked for, or this one with another reference.
    """
    from harvester.store.reader import Corpus

    found: dict[bytes, tuple[str | None, str]] = {}
    for sample in Corpus.open(store).samples(("key", "completion", "outcome")):
        key = bytes.fromhex(sample.key)
        if key in keys:
            found[key] = sample.completion, sample.outcome
    return found


def expected_asked(per_prompt: int, of: int, pass_rate: float) -> float:
    """Return the expected number of answers asked of a prompt, each of which passes with `pass_rate`.

    Asking ends with the `per_prompt`-th passed answer, or after `of`: E[min(of, T)] is the sum over t below
    `of` of P(T > t), and T > t when fewer than `per_prompt` of t answers passed.
    """
    expected = 0.0
    # chance[c]: c of the answers so far passed, for c below per_prompt
    chance = [1.0] + [0.0] * (per_prompt - 1)
    for _ in range(of):
        expected += sum(chance)
        chance = [
            chance[c] * (1 - pass_rate) + (chance[c - 1] * pass_rate if c else 0.0) for c in range(per_prompt)
        ]
    return expected
