"""Allocate limits and budget to the ranks of a fleet. Pure: the time is an argument, messages are values.

Every rank reports twice a second (`run.allotment`) and gets its part. One rule holds for rates, requests in
flight and money: what was allocated counts as held until the rank itself reports less, so the parts are never
more than the whole together, whichever message is lost. The rates of a rank that is silent for EXPIRY_S are
free again: it has sent nothing for a while then. Its places are free when nothing that it sent can be in
flight any more. Its money is not: only its store can say what was spent, which its successor reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harvester.config.budget_spans import BudgetSpan
from harvester.fleet.parts import Account, CeilingKey, divide_budget, divide_count, within
from harvester.run.allotment import FENCE_S, Message, decoded_row, encoded_row
from harvester.teacher.sharing.fair_shares import Want, divide
from harvester.teacher.sharing.limit_leases import HYSTERESIS, LEAST, LedgerRow

# A rank that is silent for this long has no part of the rates any more; it has sent nothing since FENCE_S.
EXPIRY_S = FENCE_S + 4.0
# Ranks that are to start have their part reserved for so long.
START_S = 30.0
# What a rank whose places are not all taken wants of them: so many times the size of its window.
_HEADROOM = 1.5


@dataclass(slots=True)
class _Rank:
    """What is known of one rank.

    Attributes:
        heard_at: when it reported last; minus infinity if it never did, or is not there.
        offset: its monotonic time plus this is ours; None before its first report.
        rows: what it reported of its rates, in our time, by base URL; `share` is what it holds.
        windows: places that it holds, by base URL.
        wanted: part of all places that it could use, by base URL.
        account: its budget.
        run_id: its last run, "" for none.
        is_part: that run is part of this fleet, or of one that did not end by itself: the budget of a run
            goes on with what it spent.
        incarnation: how often the rank was started; reports of an earlier process do not count.
        is_over: it has ended, or is lost: it holds no rate and no place.
    """

    heard_at: float = -math.inf
    offset: float | None = None
    rows: dict[str, LedgerRow] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, float] = field(default_factory=dict)
    account: Account = field(default_factory=lambda: Account(is_active=False))
    run_id: str = ""
    is_part: bool = False
    incarnation: int = 0
    is_over: bool = False


class Allocator:
    """Allocates the limits and the budget of one fleet.

    Args:
        windows: most requests in flight, by base URL; at least one for each rank.
        budgets: tokens and micro-dollars of each span, None for no ceiling.
        ranks: how many there are.
        now: monotonic seconds.
        state: of an earlier fleet of this harvest (`state`), None for none. If that one was killed, the
            budget of a run goes on where it was.
        longest_attempt_s: how long a request can be in flight. So long after a silent rank has stopped
            sending, its places are free.
    """

    def __init__(
        self,
        windows: Mapping[str, int],
        budgets: Mapping[str, tuple[int | None, int | None]],
        ranks: int,
        now: float,
        state: Message | None = None,
        longest_attempt_s: float = math.inf,
    ) -> None:
        self._longest_attempt_s = longest_attempt_s
        self._windows = dict(windows)
        self._whole: dict[CeilingKey, int] = {
            (span, unit): limit
            for span, limits in budgets.items()
            for unit, limit in enumerate(limits)
            if limit is not None
        }
        self._ranks = {rank: _Rank() for rank in range(ranks)}
        self._began = now
        self._elsewhere: dict[CeilingKey, int] = dict.fromkeys(self._whole, 0)
        self._ends_at: dict[str, float] = {}
        self.exchanges = 0
        if state is not None:
            self._resume(state)

    # From one fleet to the next

    def state(self, *, is_over: bool) -> dict[str, Any]:
        """Return what the next fleet must know, as JSON values.

        Args:
            is_over: the fleet has ended by itself: the budget of a run begins anew.
        """
        return {
            "is_over": is_over,
            "elsewhere": [[*ceiling, amount] for ceiling, amount in self._elsewhere.items()],
            "ends_at": {span: at for span, at in self._ends_at.items() if math.isfinite(at)},
            "ranks": {
                str(number): {
                    "run_id": rank.run_id,
                    "is_part": rank.is_part,
                    "granted": [[*ceiling, amount] for ceiling, amount in rank.account.granted.items()],
                    "spent": [[*ceiling, amount] for ceiling, amount in rank.account.spent.items()],
                }
                for number, rank in self._ranks.items()
            },
        }

    def _resume(self, state: Message) -> None:
        spans = {span for span, _ in self._whole}
        if state["is_over"]:
            spans.discard(BudgetSpan.RUN.value)
        self._ends_at = {span: at for span, at in state["ends_at"].items() if span in spans}
        self._elsewhere |= _ceilings(state["elsewhere"], spans)
        for number, saved in state["ranks"].items():
            rank = self._ranks[int(number)]
            rank.run_id = saved["run_id"]
            rank.is_part = not state["is_over"] and saved.get("is_part", True)
            rank.account.granted = _ceilings(saved["granted"], spans)
            rank.account.spent = _ceilings(saved["spent"], spans)

    def expected_run(self, number: int) -> str:
        """Return the run that the store of this rank must hold, "" for none."""
        return self._ranks[number].run_id

    def register(
        self,
        number: int,
        spent: Mapping[str, tuple[int, int]],
        ends_at: Mapping[str, float | None],
        *,
        former: tuple[int, int] = (0, 0),
        is_same_store: bool,
        now: float,
    ) -> int:
        """Take up a rank that is about to start, with what its store says was spent; return its incarnation.

        Args:
            spent: tokens and micro-dollars, by span; of a run those of earlier ones that were killed.
            former: of the run before (`expected_run`), however that ended, and of those directly before it
                that were killed. It counts where that run is part of a fleet that did not end by itself: the
                state on disk is older than what was spent.
            is_same_store: it goes on with the store that it had. In a new one nothing of what the rank was
                granted before is written down, so all of that counts as spent.
        """
        before, rank = self._ranks[number], _Rank()
        goes_on = before.is_part and before.incarnation == 0
        self._start_new_spans(ends_at)
        rank.run_id = before.run_id
        for ceiling in self._whole:
            known = before.account.granted.get(ceiling, 0)
            if is_same_store:  # one that was fetched from a mirror holds no spending of before
                known = before.account.spent.get(ceiling, 0)
                if goes_on and ceiling[0] == BudgetSpan.RUN.value:
                    known = max(known, former[ceiling[1]])
            here = spent.get(ceiling[0], (0, 0))[ceiling[1]]
            rank.account.spent[ceiling] = rank.account.granted[ceiling] = here
            self._elsewhere[ceiling] += max(0, known - here) if is_same_store else known
        rank.account.is_active = True
        rank.incarnation = before.incarnation + 1
        self._ranks[number] = rank
        self._began = now
        return rank.incarnation

    def _start_new_spans(self, ends_at: Mapping[str, float | None]) -> None:
        """Forget what was spent elsewhere, and by ranks that are gone, in spans that are over."""
        for span, at in ends_at.items():
            if at is None or at <= self._ends_at.get(span, -math.inf):
                continue
            is_new, self._ends_at[span] = span in self._ends_at, at
            if not is_new:
                continue
            for ceiling in [ceiling for ceiling in self._whole if ceiling[0] == span]:
                self._elsewhere[ceiling] = 0
                for rank in self._ranks.values():
                    if not rank.account.is_active:
                        rank.account.granted[ceiling] = rank.account.spent[ceiling] = 0

    # While the fleet runs

    def end(self, number: int, *, is_lost: bool) -> None:
        """Take note that a rank has ended, or that its process is gone: what it held is free.

        The money of a lost rank is not: its account stays as it was until its successor has read the store.
        """
        rank = self._ranks[number]
        rank.is_over, rank.heard_at = True, -math.inf
        rank.rows, rank.windows, rank.wanted = {}, {}, {}
        rank.account.is_active = False
        if not is_lost:
            rank.account.reserved = (0, 0)
            rank.account.granted = dict(rank.account.spent)

    def exchange(self, number: int, incarnation: int, report: Message, now: float) -> dict[str, Any] | None:
        """Take a rank's report and return its part (`run.allotment`); None where it has been replaced."""
        self.exchanges += 1
        if self._ranks[number].is_over or self._ranks[number].incarnation != incarnation:
            return None
        for silent, rank in self._ranks.items():
            if silent != number:
                self._free_silent(rank, now)
        rank = self._ranks[number]
        self._note(rank, report, now)
        if report["left"]:
            self.end(number, is_lost=False)
            return {"shares": {}, "windows": {}, "budgets": {}, "is_final": True}
        budgets, is_final = self._budget_of(number)
        present, coming = self._present(now)
        return {
            "shares": {url: self._share_of(number, url, present, coming) for url in rank.rows},
            "windows": {url: self._window_of(number, url, present, coming) for url in report["windows"]},
            "budgets": budgets,
            "is_final": is_final,
        }

    def _free_silent(self, rank: _Rank, now: float) -> None:
        """Free what a rank that is silent for too long can't be using any more."""
        if rank.heard_at < now - EXPIRY_S:
            rank.rows, rank.wanted = {}, {}
        if rank.heard_at < now - EXPIRY_S - self._longest_attempt_s:
            rank.windows = {}

    def _note(self, rank: _Rank, report: Message, now: float) -> None:
        was_silent = rank.heard_at < now - EXPIRY_S
        rank.heard_at = now
        if report["run_id"] and report["run_id"] != rank.run_id:
            rank.run_id, rank.is_part = report["run_id"], True
        for url, values in report["rows"].items():
            row = decoded_row(values)
            if rank.offset is None:
                rank.offset = now - row.at
            held = 0.0 if was_silent else min(row.share, rank.rows[url].share if url in rank.rows else 0.0)
            learned_at = row.learned_at + rank.offset
            rank.rows[url] = replace(row, at=now, share=held, learned_at=learned_at)
        for url, window in report["windows"].items():
            held_places = min(window["allocated"], rank.windows.get(url, 0))
            rank.windows[url] = max(held_places, window["in_flight"])
            most = self._windows[url]
            could_use = math.inf if window["wants_more"] else window["size"] * _HEADROOM / most
            rank.wanted[url] = min(could_use, window["most"] / most)
        account = rank.account
        account.reserved = (report["reserved"][0], report["reserved"][1])
        account.short = None if report["short"] is None else (report["short"][0], report["short"][1])
        self._start_new_spans({span: values["ends_at"] for span, values in report["budgets"].items()})
        for span, values in report["budgets"].items():
            for unit in (0, 1):
                if (ceiling := (span, unit)) in self._whole:
                    account.spent[ceiling] = values["spent"][unit]
                    account.granted[ceiling] = values["ceiling"][unit]

    def _present(self, now: float) -> tuple[list[int], int]:
        """Return the ranks that take part, and how many more are about to."""
        present = [n for n, rank in self._ranks.items() if rank.heard_at >= now - EXPIRY_S]
        coming = [n for n, rank in self._ranks.items() if rank.heard_at == -math.inf and not rank.is_over]
        return present, len(coming) if now - self._began < START_S else 0

    def _share_of(
        self, number: int, url: str, present: Collection[int], coming: int
    ) -> tuple[float, list[dict[str, Any]]]:
        """Return a rank's share of the rate limits of an address, and who has learned most recently."""
        rows = {n: self._ranks[n].rows[url] for n in present if url in self._ranks[n].rows}
        row = rows[number]
        least = LEAST / (len(rows) + coming)
        wants = {str(n): Want(each.weight, max(least, each.demand)) for n, each in rows.items()}
        wants |= {f"coming {n}": Want(row.weight) for n in range(coming)}
        target = divide(wants)[str(number)]
        free = 1.0 - sum(each.share for each in rows.values())
        share = within(target, row.share, free)
        if row.share > 0 and free >= 0 and abs(share - row.share) <= HYSTERESIS * row.share:
            share = row.share
        if share < least / 2:  # too little to begin with: it waits until others have lowered theirs
            share = 0.0
        self._ranks[number].rows[url] = replace(row, share=max(row.share, share))
        return share, self._lessons(rows, number)

    def _lessons(self, rows: Mapping[int, LedgerRow], number: int) -> list[dict[str, Any]]:
        """Return the row of the rank that learned last about the rate, in the time of this rank."""
        learned = [(each.learned_at, n) for n, each in rows.items() if each.rate]
        if not learned or (newest := max(learned)[1]) == number:
            return []
        row, offset = rows[newest], self._ranks[number].offset or 0.0
        return [encoded_row(replace(row, at=row.at - offset, learned_at=row.learned_at - offset))]

    def _window_of(self, number: int, url: str, present: Collection[int], coming: int) -> int:
        """Return how many requests a rank may have in flight at an address."""
        wants = {n: Want(1, self._ranks[n].wanted.get(url, 0.0)) for n in present}
        wants |= {-1 - n: Want(1) for n in range(coming)}
        held = {n: rank.windows.get(url, 0) for n, rank in self._ranks.items()}
        held_by_silent = sum(places for n, places in held.items() if n not in present)
        target = divide_count(max(len(wants), self._windows[url] - held_by_silent), wants)[number]
        places = int(within(target, held[number], self._windows[url] - sum(held.values())))
        self._ranks[number].windows[url] = max(held[number], places)
        return places

    def _budget_of(self, number: int) -> tuple[dict[str, list[int | None]], bool]:
        """Return a rank's ceilings by span, and whether they can't grow any more."""
        accounts = {n: rank.account for n, rank in self._ranks.items()}
        targets = divide_budget(self._whole, self._elsewhere, accounts)
        account = accounts[number]
        budgets: dict[str, list[int | None]] = {}
        for ceiling, target in targets.granted[number].items():
            free = self._whole[ceiling] - self._elsewhere[ceiling]
            free -= sum(each.granted.get(ceiling, 0) for each in accounts.values())
            granted = int(within(target, account.granted[ceiling], free))
            account.granted[ceiling] = max(account.granted[ceiling], granted)
            budgets.setdefault(ceiling[0], [None, None])[ceiling[1]] = granted
        return budgets, number in targets.final

    def budgets(self) -> dict[str, dict[str, float | None]]:
        """Return the ceilings of the whole harvest and what was spent, as `budgets` of a status."""
        spans: dict[str, dict[str, float | None]] = {}
        for (span, unit), limit in self._whole.items():
            accounts = [rank.account for rank in self._ranks.values()]
            spent = self._elsewhere[span, unit] + sum(a.spent.get((span, unit), 0) for a in accounts)
            reserved = sum(a.reserved[unit] for a in accounts if a.is_active)
            name, none = ("tokens", "microusd")[unit], ("tokens", "microusd")[1 - unit]
            values = spans.setdefault(span, {none: None, f"{none}_spent": 0, f"{none}_left": None})
            values |= {name: limit, f"{name}_spent": spent, f"{name}_left": max(0, limit - spent - reserved)}
            values["ends_at"] = self._ends_at.get(span)
        return spans


def _ceilings(rows: Collection[Any], spans: Collection[str]) -> dict[CeilingKey, int]:
    """Return amounts by ceiling as `Allocator.state` wrote them, of these spans."""
    return {(span, unit): amount for span, unit, amount in rows if span in spans}
