"""Check the addresses of a teacher against each other during a pass: is each as good as the others?

Each address is asked the same short prompt now and then (a canary), and its words are compared with those
that most addresses agree on. One whose answer differs is asked twice more, and the others once: if they
still agree among themselves and it does not, it is put aside. So is one that gives unusable answers far
more often than the others (`teacher.answer_shares`), once rows that it failed were answered by another
address; else it was the prompts. What it answered since its last good canary is taken back (`unproven`). An
address that is put aside is probed, at growing intervals, and gets rows again after two good canaries.

Where addresses differ and no majority says which is right, nothing is concluded, and the operator is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvester.api.request_builder import requests
from harvester.api.types import UNUSABLE, Completion, Prompt, Request
from harvester.config.config import HarvestConfig
from harvester.errors import (
    BrokenAnswer,
    EndpointDown,
    HarvesterError,
    NotSent,
    Parked,
    PromptError,
    TeacherError,
)
from harvester.observe.canary import distance
from harvester.prompts import reader
from harvester.run.background.canary_store import Asker, CanaryStore
from harvester.run.background.proof_marks import load_reference, save_reference
from harvester.run.background.unproven import MANY, Unproven
from harvester.run.in_flight import answer_record
from harvester.teacher.endpoints import Endpoints

BUILT_IN = "Write the numbers from one to eight as English words, separated by commas, and nothing else."
# An address that is put aside is probed after this time, and after twice as long each time, up to LONGEST.
FIRST_PROBE_S = 5.0
LONGEST_PROBE_S = 300.0
GOOD_PROBES = 2
SHORTEST_PAUSE_S = 0.05
# An address is checked at most this often, whatever is suspected.
URGENT_EVERY_S = 1.0
# Further looks at an address whose canary differs.
LOOKS = 2


@dataclass(slots=True)
class _Address:
    """What is known of one address.

    Attributes:
        said: its last answer to the canary, None before the first.
        checked_at: monotonic seconds of its last check, while it gets rows.
        probe_at: when it is probed next, while it is put aside.
        probe_s: wait before the next probe, while it is put aside.
        good_probes: in a row.
        aside: how often it was put aside.
        taken_back: answers.
        task: a check under way.
    """

    url: str
    said: str | None = None
    checked_at: float = -math.inf
    probe_at: float = 0.0
    probe_s: float = FIRST_PROBE_S
    good_probes: int = 0
    aside: int = 0
    taken_back: int = 0
    task: asyncio.Task[None] | None = None


class ReplicaWatch:
    """Watches the addresses of one teacher during a pass.

    Args:
        root: folder of harvest.toml.
        canaries: keeps the answers to the canaries.
        complain: gets what the operator should know.
    """

    def __init__(
        self,
        config: HarvestConfig,
        root: Path,
        endpoints: Endpoints,
        unproven: Unproven,
        canaries: CanaryStore,
        complain: Callable[[HarvesterError], None],
    ) -> None:
        self._config = config
        self._root = root
        self._endpoints = endpoints
        self._unproven = unproven
        self._canaries = canaries
        self._complain = complain
        self._clock = endpoints.policies.clock
        self._addresses = {queue.endpoint: _Address(queue.endpoint) for queue in endpoints.queues}
        # What most addresses answered.
        self._reference: str | None = None
        self._wake = asyncio.Event()
        self._asker: Asker | None = None
        self._prompt: Prompt | None = None
        self._asked = 0
        self._agreed_at = -math.inf
        self._is_over = False
        # Set when the canaries can be asked, or can't be for good; and after the first look at all addresses.
        self._is_open = asyncio.Event()
        self._has_looked = asyncio.Event()
        self._is_undecided = False
        unproven.is_on = True
        unproven.on_add = self._note_answer
        unproven.hold.hold_from(lambda: unproven.first_at)
        endpoints.on_suspect = self._wake.set

    def _note_answer(self, url: str) -> None:
        """Wake the watch where a check may be due."""
        is_first, count = self._asker is None, self._unproven.count(url)
        if is_first or count % MANY == 0 or self._endpoints.queue_of(url).aside_reason:
            self._wake.set()

    async def watch(self) -> None:
        """Check until cancelled, or until the canaries can't be asked any more; then nothing is concluded."""
        await self._clock.wait(self._wake, math.inf)  # nothing is paid before there are answers
        try:
            await self._open_and_watch()
        except NotSent:
            return
        except HarvesterError as error:
            self._give_up(error)
        finally:
            self._is_open.set()
            self._has_looked.set()

    async def _open_and_watch(self) -> None:
        self._prompt = await asyncio.to_thread(self._read_prompt)
        async with self._canaries.asker(self._endpoints) as self._asker:
            self._is_open.set()
            try:
                await self._watch()
            finally:
                self._asker = None
                await self._cancel_checks()

    @property
    def has_earlier(self) -> bool:
        """Whether an earlier run left answers that are not proven."""
        return bool(self._unproven.earlier)

    async def prove_earlier(self) -> None:
        """Wait until the addresses were looked at, and what an earlier run left was proven or taken back."""
        self._wake.set()
        await self._has_looked.wait()

    def _give_up(self, error: HarvesterError) -> None:
        self._unproven.stop()
        self._complain(error)

    async def _watch(self) -> None:
        asker = self._asker
        if asker is not None and self._prompt is not None:
            teacher_id, text = self._config.teacher.teacher_id, self._prompt_text()
            self._reference = await self._unproven.writer.call(
                lambda journal: load_reference(journal, teacher_id, text)
            )
        while True:
            self._wake.clear()
            every_s = self._config.canary.replicas_every_s
            if self._reference is None and self._clock.now() - self._agreed_at >= every_s:
                await self._agree()
            for address in self._addresses.values():
                if address.task is None and not self._is_over and self._is_due(address):
                    self._begin(address)
            if not self._has_looked.is_set():
                await asyncio.gather(*self._tasks(), return_exceptions=True)
                self._has_looked.set()
            await self._clock.wait(self._wake, self._pause_s())

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [address.task for address in self._addresses.values() if address.task is not None]

    def _prompt_text(self) -> str:
        assert self._prompt is not None
        return str(self._prompt.messages[-1].get("content"))

    async def _refer_to(self, text: str) -> None:
        """Take an answer as the reference, in later runs too."""
        self._reference, self._is_undecided = text, False
        teacher_id, prompt = self._config.teacher.teacher_id, self._prompt_text()
        await self._unproven.writer.call(lambda journal: save_reference(journal, teacher_id, prompt, text))

    def _pause_s(self) -> float:
        """Seconds until the next check is due."""
        now, every_s = self._clock.now(), self._config.canary.replicas_every_s
        times = [now + every_s]
        for address in self._addresses.values():
            queue = self._endpoints.queue_of(address.url)
            if address.task is not None or queue.is_down:
                continue
            if queue.aside_reason:
                times.append(address.probe_at)
            elif self._unproven.count(address.url):
                times.append(address.checked_at + every_s)
        return max(SHORTEST_PAUSE_S, min(times) - now)

    def _is_due(self, address: _Address) -> bool:
        queue, now = self._endpoints.queue_of(address.url), self._clock.now()
        count = self._unproven.count(address.url)
        if queue.aside_reason:
            return count > 0 or (now >= address.probe_at and not queue.is_down)
        if queue.is_down or self._reference is None:
            return False
        waited_s = now - address.checked_at
        is_urgent = count >= MANY or address.url in self._endpoints.shares.suspects
        if is_urgent and waited_s >= URGENT_EVERY_S:
            return True
        return count > 0 and waited_s >= self._config.canary.replicas_every_s

    def _begin(self, address: _Address) -> None:
        """Check an address beside the others: a slow one holds nobody up."""

        def ended(task: asyncio.Task[None]) -> None:
            address.task = None
            self._wake.set()
            if task.cancelled() or (error := task.exception()) is None or isinstance(error, NotSent):
                return
            if not isinstance(error, HarvesterError):
                error = HarvesterError(f"checks of the addresses stopped by {error!r}", place="canary")
            self._give_up(error)

        if not self._endpoints.queue_of(address.url).aside_reason:
            address.checked_at = self._clock.now()
        address.task = asyncio.create_task(self._check(address))
        address.task.add_done_callback(ended)

    async def _cancel_checks(self) -> None:
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self) -> bool:
        """Check every address with unproven rows a last time; return whether rows are asked again.

        Rows that no check can prove any more count as proven: nothing is known against them.

        Raises:
            HarvesterError: the canaries can't be asked, or rows can't be taken back.
        """
        if self._unproven.first_at == math.inf or self._endpoints.draining.is_set():
            return False
        await self._is_open.wait()
        before = self._unproven.tally.taken_back
        await asyncio.gather(*self._tasks(), return_exceptions=True)
        if self._asker is not None:
            if self._reference is None:
                await self._agree()
            unproven = [address for address in self._addresses.values() if self._unproven.count(address.url)]
            await asyncio.gather(*map(self._check, unproven))
        is_again = self._unproven.tally.taken_back > before and self._unproven.asks_again
        if not is_again:
            self._unproven.prove_all()
        return is_again

    async def rest(self, patience_s: float) -> None:
        """Begin no check any more, and wait at most `patience_s` for those under way: they are paid for."""
        self._is_over = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await asyncio.gather(*self._tasks(), return_exceptions=True)

    async def _check(self, address: _Address) -> None:
        """Ask an address its canary, and act on what it answers."""
        queue, url = self._endpoints.queue_of(address.url), address.url
        if queue.aside_reason:
            await self._take_back(address)
            if self._clock.now() >= address.probe_at and not queue.is_down:
                await self._probe(address)
            return
        sent_at = self._clock.wall()
        text = await self._ask(url)
        if text is None or self._reference is None:
            return
        if not self._agrees(text):
            await self._look_again(address, text, sent_at)
            self._endpoints.shares.acquit(url)
            return
        if url in self._endpoints.shares.suspects:
            await self._ask_elsewhere(address)
            self._endpoints.shares.acquit(url)
        if not queue.aside_reason:
            await self._unproven.prove(url, sent_at)

    async def _probe(self, address: _Address) -> None:
        """Look whether an address that is put aside may have rows again."""
        text = await self._ask(address.url)
        is_good = text is not None and self._agrees(text)
        if not is_good and text is not None:
            address.probe_s = min(LONGEST_PROBE_S, 2 * address.probe_s)
        address.probe_at = self._clock.now() + address.probe_s
        address.good_probes = address.good_probes + 1 if is_good else 0
        if address.good_probes < GOOD_PROBES:
            return
        address.checked_at = self._clock.now()
        self._endpoints.queue_of(address.url).put_aside("")
        self._complain(
            HarvesterError("answers as the others do again, and gets rows again", place=address.url)
        )

    async def _look_again(self, address: _Address, text: str, sent_at: float) -> None:
        """Decide between an address and the others, where its answer differs from what they gave before."""
        for _ in range(LOOKS):
            sent_again_at, again = self._clock.wall(), await self._ask(address.url)
            if again is None:
                return
            if self._agrees(again):
                await self._unproven.prove(address.url, sent_again_at)
                return
        up = [
            queue for queue in self._endpoints.queues if queue.endpoint != address.url and not queue.is_down
        ]
        # Where all others are put aside, they are asked: the teacher may have changed, one after the other.
        others = [queue.endpoint for queue in up if not queue.aside_reason] or [q.endpoint for q in up]
        answers = [said for said in await self._ask_all(others) if said is not None]
        if not answers:
            return
        agreeing = sum(self._agrees(said) for said in answers)
        if agreeing > len(answers) / 2:
            await self._put_aside(
                address, f"its answer to the canary differs from that of {agreeing} of {len(answers)} others"
            )
        elif sum(distance(said, text) <= self._tolerance for said in answers) > len(answers) / 2:
            await self._refer_to(text)  # all of them changed: that is the teacher's matter
            await self._unproven.prove(address.url, sent_at)
        else:
            self._note_undecided()

    async def _ask_elsewhere(self, address: _Address) -> None:
        """Ask rows that a suspect gave unusable answers to at another address: was it the prompts?"""
        shares, url = self._endpoints.shares, address.url
        others = [queue for queue in self._endpoints.queues if queue.endpoint != url and queue.gets_rows]
        rows = shares.rows(url)
        if not others or not rows:
            return
        asked = (self._is_usable(row, others[at % len(others)].endpoint) for at, row in enumerate(rows))
        usable = sum(await asyncio.gather(*asked))
        if usable * 2 <= len(rows):
            shares.acquit(url)
            return
        share, usual = shares.share(url) or 0.0, shares.share_of_others(url) or 0.0
        await self._put_aside(
            address,
            f"{share:.0%} of its last answers are unusable, {usual:.0%} of the others'; {usable} of "
            f"{len(rows)} such rows were answered elsewhere",
        )

    async def _is_usable(self, row: Request, url: str) -> bool:
        """Whether an address gives a usable answer to a row."""
        try:
            answer = await self._complete(replace(row, rows=()), url)
        except BrokenAnswer:
            return False
        return answer is not None and answer.outcome not in UNUSABLE

    async def _put_aside(self, address: _Address, reason: str) -> None:
        queue = self._endpoints.queue_of(address.url)
        if queue.aside_reason or not self._endpoints.may_put_aside(address.url):
            return
        address.probe_s = min(LONGEST_PROBE_S, FIRST_PROBE_S * 2.0**address.aside)
        address.probe_at = self._clock.now() + address.probe_s
        address.aside, address.good_probes = address.aside + 1, 0
        self._endpoints.shares.forget(address.url)
        queue.put_aside(reason)
        self._endpoints.on_room()
        taken = await self._take_back(address)
        self._complain(
            HarvesterError(
                f"put aside: {reason}; {taken:,} of its answers since its last good canary are taken back",
                place=address.url,
                remedy="look at that server; it gets rows again once it answers as the others do",
            )
        )

    async def _take_back(self, address: _Address) -> int:
        taken = await self._unproven.take_back(address.url)
        address.taken_back += taken
        return taken

    async def _agree(self) -> None:
        """Let all addresses answer the canary, and take what most of them say as the reference."""
        self._agreed_at = self._clock.now()
        urls = [queue.endpoint for queue in self._endpoints.queues if queue.gets_rows]
        sent_at = self._clock.wall()
        answers = {
            url: said for url, said in zip(urls, await self._ask_all(urls), strict=True) if said is not None
        }
        near = {
            url: [other for other in answers if distance(said, answers[other]) <= self._tolerance]
            for url, said in answers.items()
        }
        best = max(near, key=lambda url: len(near[url]), default="")
        if not best or (len(near[best]) <= len(answers) / 2 and len(urls) > 1):
            if answers:
                self._note_undecided()
            return
        await self._refer_to(answers[best])
        now = self._clock.now()
        for url in answers:
            self._addresses[url].checked_at = now
            if url in near[best]:
                await self._unproven.prove(url, sent_at)
            elif len(answers) > 2:
                await self._look_again(self._addresses[url], answers[url], sent_at)

    def _note_undecided(self) -> None:
        """Say once that the addresses differ. What can't be told apart is not held back."""
        self._unproven.prove_all()
        if self._is_undecided:
            return
        self._is_undecided = True
        self._complain(
            HarvesterError(
                "the addresses of [teacher] answer the same prompt differently, and no majority says which "
                "is right: nothing is concluded from their words",
                place="canary",
                remedy="do they serve the same weights? Set [canary] prompts with a definite answer, a "
                "larger tolerance, or replicas_every_s = 0",
            )
        )

    @property
    def _tolerance(self) -> float:
        return self._config.canary.tolerance

    def _agrees(self, text: str) -> bool:
        return self._reference is not None and distance(self._reference, text) <= self._tolerance

    async def _ask_all(self, urls: Sequence[str]) -> list[str | None]:
        return list(await asyncio.gather(*(self._ask(url) for url in urls)))

    async def _ask(self, url: str) -> str | None:
        """Return what an address answers to the canary, "" for nothing usable; None if it can't be asked."""
        try:
            completion = await self._complete(self._canary(), url)
        except BrokenAnswer:
            text = ""
        else:
            if completion is None:
                return None
            text = completion.text or completion.refusal or ""
        self._addresses[url].said = text
        return text

    async def _complete(self, request: Request, url: str) -> Completion | None:
        """Ask one address once; the paid answer is kept in the store of canaries.

        Raises:
            BrokenAnswer: it answered, but with no completion.
        """
        if self._asker is None:
            raise NotSent
        self._asked += 1
        mark = f"{request.key.hex()}|{url}|{self._canaries.record.run_id}|{self._asked}".encode()
        metadata = {"replica": url}
        request = replace(
            request,
            key=hashlib.sha256(mark).digest(),
            prompt=replace(request.prompt, metadata=metadata),
        )
        try:
            answered = await self._asker.teacher.ask_at(request, url)
        except BrokenAnswer:
            raise
        except (TeacherError, EndpointDown, Parked):
            return None
        spent = self._canaries.spent
        record = answer_record(request, answered)

        def paid() -> None:
            spent.answers_stored += 1
            spent.cost_microusd += record.cost_microusd

        self._asker.writer.submit(record, paid)
        answered.raw.release()
        return answered.completion

    def _canary(self) -> Request:
        """Return the canary as it is asked: one sample, at temperature 0 where rows have a temperature."""
        sampling = self._config.sampling.model_copy(update={"samples": 1})
        if sampling.temperature is not None:
            sampling = sampling.model_copy(update={"temperature": 0.0})
        config = self._config.model_copy(update={"sampling": sampling})
        assert self._prompt is not None
        return next(iter(requests([self._prompt], config)))

    def _read_prompt(self) -> Prompt:
        """Return the first of the canary prompts, or the built-in one.

        Raises:
            PromptError: it can't be used.
        """
        name = self._config.canary.prompts
        if name is None:
            return Prompt("replica-canary", ({"role": "user", "content": BUILT_IN},))
        for prompt in reader.read((name,), self._root):
            return prompt
        raise PromptError("holds no prompt", place=name, remedy='write one: {"prompt": "..."}')

    def gauges(self) -> list[dict[str, Any]]:
        """Return state and pace of each address, with what the checks found, as JSON values."""
        gauges = []
        for gauge in self._endpoints.gauges():
            address = self._addresses[gauge["endpoint"]]
            gauges.append(
                {
                    **gauge,
                    "canary": self._canary_text(address),
                    "put_aside": address.aside,
                    "taken_back": address.taken_back,
                }
            )
        return gauges

    def _canary_text(self, address: _Address) -> str:
        if address.said is None:
            return ""
        if self._reference is None:
            return "undecided"
        return "agrees" if self._agrees(address.said) else "differs"
