"""The allocator: whatever gets lost, the parts are at most the whole, and follow what each rank can use."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harvester.fleet.allocator import EXPIRY_S, Allocator
from harvester.fleet.parts import Account, divide_budget, divide_count
from harvester.run.allotment import FENCE_S
from harvester.teacher.sharing.fair_shares import Want

URL = "http://teacher/v1"
PLACES = 40
TOKENS = 10_000
# What one request may cost.
REQUEST = 90
# How long one may be in flight; then it is charged.
LONGEST_S = 60.0


@dataclass
class Store:
    """The ledger of one rank's store."""

    spent: int = 0


@dataclass
class ModelRank:
    """A rank as `run.allotment` makes it: it applies answers, and holds when it hears nothing."""

    number: int
    store: Store
    incarnation: int
    born_at: float
    heard_at: float = -math.inf
    share: float = 0.0
    places: int = 0
    ceiling: int = 0
    demand: float = math.inf
    is_short: bool = False
    is_final: bool = False
    # When each request in flight was sent.
    in_flight_since: list[float] = field(default_factory=list)

    @property
    def reserved(self) -> int:
        return REQUEST * len(self.in_flight_since)

    def sends(self, now: float) -> bool:
        return now - self.heard_at <= FENCE_S and self.share > 0 and self.places >= 1

    def report(self, now: float, *, left: bool = False) -> dict[str, Any]:
        short, self.is_short = self.is_short, False
        row = {
            "teacher": "",
            "id": f"r{self.number}",
            "pid": self.number,
            "config": "",
            "at": now - self.born_at,
            "weight": 1,
            "demand": None if self.demand == math.inf else self.demand,
            "share": self.share,
            "rate": 0.0,
            "found": 0.0,
            "learned_at": None,
        }
        window = {
            "allocated": self.places,
            "in_flight": len(self.in_flight_since),
            "size": len(self.in_flight_since),
            "wants_more": len(self.in_flight_since) >= self.places,
            "most": PLACES,
        }
        budget = {"spent": [self.store.spent, 0], "ceiling": [self.ceiling, None], "ends_at": None}
        return {
            "run_id": f"run-{self.number}",
            "left": left,
            "rows": {URL: row},
            "windows": {URL: window},
            "budgets": {"run": budget},
            "reserved": [self.reserved, 0],
            "short": [REQUEST, 0] if short else None,
        }

    def apply(self, answer: dict[str, Any], began: float) -> None:
        self.heard_at = began
        self.share = answer["shares"][URL][0]
        self.places = answer["windows"][URL]
        self.ceiling = max(answer["budgets"]["run"][0], self.store.spent + self.reserved)
        self.is_final = answer["is_final"]

    def send(self, now: float) -> None:
        """Send a request, if everything allows it."""
        if not self.sends(now) or len(self.in_flight_since) >= self.places:
            return
        if self.store.spent + self.reserved + REQUEST > self.ceiling:
            self.is_short = True
            return
        self.in_flight_since.append(now)

    def fill(self, now: float) -> None:
        """Send as many requests as there are places."""
        for _ in range(PLACES):
            self.send(now)

    def answer(self, cost: int) -> None:
        if self.in_flight_since:
            self.in_flight_since.pop()
            self.store.spent += cost

    def time_out(self, now: float) -> None:
        """Charge what was in flight for too long."""
        late = [since for since in self.in_flight_since if since <= now - LONGEST_S]
        self.store.spent += REQUEST * len(late)
        self.in_flight_since = [since for since in self.in_flight_since if since > now - LONGEST_S]


class World:
    def __init__(self, ranks: int, now: float = 1000.0) -> None:
        self.now = now
        self.allocator = Allocator(
            {URL: PLACES}, {"run": (TOKENS, None)}, ranks, now, longest_attempt_s=LONGEST_S
        )
        self.stores: list[Store] = []
        self.ranks = [self.begin(number, None) for number in range(ranks)]

    def begin(self, number: int, store: Store | None) -> ModelRank:
        is_same = store is not None or self.allocator.expected_run(number) == ""
        if store is None:
            store = Store()
            self.stores.append(store)
        spent = {"run": (store.spent, 0)}
        ends: dict[str, float | None] = {"run": None}
        incarnation = self.allocator.register(number, spent, ends, is_same_store=is_same, now=self.now)
        return ModelRank(number, store, incarnation, self.now)

    def exchange(self, rank: ModelRank, fate: str = "heard") -> None:
        if fate == "unsent":
            return
        report = rank.report(self.now)
        answer = self.allocator.exchange(rank.number, rank.incarnation, report, self.now)
        if fate == "heard" and answer is not None:
            rank.apply(answer, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for rank in self.ranks:
            rank.time_out(self.now)

    def lose(self, number: int, *, keeps_store: bool) -> None:
        """Kill a rank with what it has in flight; its ledger counts these as possibly billed."""
        old = self.ranks[number]
        old.store.spent += old.reserved
        old.in_flight_since.clear()
        self.allocator.end(number, is_lost=True)
        self.ranks[number] = self.begin(number, old.store if keeps_store else None)

    def check(self) -> None:
        sending = [rank for rank in self.ranks if rank.sends(self.now)]
        assert sum(rank.share for rank in sending) <= 1 + 1e-9
        assert sum(rank.places for rank in sending) <= PLACES
        assert sum(len(rank.in_flight_since) for rank in self.ranks) <= PLACES
        reserved = sum(rank.reserved for rank in self.ranks)
        assert sum(store.spent for store in self.stores) + reserved <= TOKENS


FATES = st.sampled_from(["heard", "heard", "heard", "unheard", "unsent"])
WAITS = st.sampled_from([0.1, 0.5, 3.0, EXPIRY_S + 1, LONGEST_S + EXPIRY_S + 1])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("exchange"), st.integers(0, 4), FATES),
        st.tuples(st.just("send"), st.integers(0, 4), st.integers(1, 30)),
        st.tuples(st.just("answer"), st.integers(0, 4), st.integers(0, REQUEST)),
        st.tuples(st.just("demand"), st.integers(0, 4), st.sampled_from([0.0, 0.05, 0.3, math.inf])),
        st.tuples(st.just("wait"), st.integers(0, 4), WAITS),
        st.tuples(st.just("lose"), st.integers(0, 4), st.booleans()),
        st.tuples(st.just("round"), st.integers(0, 4), st.integers(1, 3)),
    ),
    max_size=80,
)


def _happen(world: World, what: str, number: int, value: Any) -> None:
    rank = world.ranks[number]
    if what == "exchange":
        world.exchange(rank, value)
    elif what == "send":
        for _ in range(value):
            rank.send(world.now)
    elif what == "answer":
        rank.answer(value)
    elif what == "demand":
        rank.demand = value
    elif what == "wait":
        world.wait(value)
    elif what == "lose":  # a successor starts when the lock of the store is free, or in another store
        world.lose(number, keeps_store=value)
    else:
        for each in world.ranks * value:
            world.exchange(each)


@settings(deadline=None, max_examples=120)
@given(ranks=st.integers(1, 5), events=EVENTS)
@example(  # two requests are in flight while their rank is silent, and after it
    ranks=3,
    events=[
        ("round", 0, 1),
        ("send", 0, 2),
        ("lose", 1, False),
        ("demand", 1, 0.0),
        ("wait", 0, EXPIRY_S + 1),
        ("round", 0, 1),
    ],
)
def test_the_parts_are_never_more_than_the_whole(ranks: int, events: list[tuple[str, int, Any]]) -> None:
    world = World(ranks)
    for what, number, value in events:
        _happen(world, what, number % ranks, value)
        world.check()


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.integers(1, 5),
    speeds=st.lists(st.integers(1, 12), min_size=5, max_size=5),
    costs=st.lists(st.integers(20, REQUEST), min_size=7, max_size=7),
)
def test_the_budget_is_used_to_the_last_request_and_then_all_ranks_end(
    ranks: int, speeds: list[int], costs: list[int]
) -> None:
    world = World(ranks)
    for turn in range(1000):
        for rank, speed in zip(world.ranks, speeds, strict=False):
            for step in range(speed):
                rank.send(world.now)
                rank.answer(costs[(turn + step) % 7])
            rank.send(world.now)
            world.exchange(rank)
            world.check()
        world.now += 0.5
        if all(rank.is_final for rank in world.ranks):
            break
    assert all(rank.is_final for rank in world.ranks), "money is left, and nobody may spend it"
    reserved = sum(rank.reserved for rank in world.ranks)
    assert TOKENS - sum(store.spent for store in world.stores) - reserved < REQUEST


def test_a_share_follows_what_each_can_use_and_nobody_starves() -> None:
    world = World(4)
    for _ in range(4):
        for rank in world.ranks:
            world.exchange(rank)
    assert [round(rank.share, 3) for rank in world.ranks] == [0.25] * 4
    assert sum(rank.places for rank in world.ranks) == PLACES
    for rank in world.ranks[1:]:
        rank.demand = 0.02
    for _ in range(4):
        world.now += 0.5
        for rank in world.ranks:
            world.exchange(rank)
    assert world.ranks[0].share > 0.9
    assert all(rank.share >= 0.02 for rank in world.ranks)
    world.ranks[2].demand = math.inf
    for _ in range(4):
        world.now += 0.5
        for rank in world.ranks:
            world.exchange(rank)
    assert [rank.share for rank in world.ranks] == pytest.approx([0.475, 0.025, 0.475, 0.025], abs=0.01)


def test_a_silent_rank_sends_nothing_before_its_part_is_given_away() -> None:
    assert FENCE_S + 2 < EXPIRY_S
    world = World(2)
    for _ in range(2):
        for rank in world.ranks:
            world.exchange(rank)
    world.now += EXPIRY_S + 0.1
    assert not world.ranks[0].sends(world.now)
    for _ in range(2):
        world.exchange(world.ranks[1])
    assert world.ranks[1].share == pytest.approx(1.0)
    world.exchange(world.ranks[0])
    assert world.ranks[0].share == 0.0  # until the other one has lowered its own
    for _ in range(3):
        for rank in world.ranks:
            world.exchange(rank)
            world.check()
    assert [rank.share for rank in world.ranks] == pytest.approx([0.5, 0.5])


def test_the_places_of_a_silent_rank_are_free_when_nothing_can_be_in_flight_there() -> None:
    world = World(2)
    for _ in range(4):
        for rank in world.ranks:
            world.exchange(rank)
            rank.fill(world.now)
    held = world.ranks[0].places
    assert held == len(world.ranks[0].in_flight_since) == PLACES / 2
    for seconds, free in ((EXPIRY_S + 0.1, 0), (LONGEST_S - 1, 0), (1.1, held)):
        world.wait(seconds)
        for _ in range(2):
            world.exchange(world.ranks[1])
            world.ranks[1].fill(world.now)
        world.check()
        assert world.ranks[1].places == PLACES - held + free
    world.exchange(world.ranks[0])
    assert world.ranks[0].places == 0  # until the other one has less in flight
    for _ in range(PLACES):
        world.ranks[1].answer(REQUEST)
    for _ in range(4):
        for rank in reversed(world.ranks):
            world.exchange(rank)
            rank.fill(world.now)
            world.check()
    assert world.ranks[0].places == held


def test_a_process_that_was_replaced_gets_nothing() -> None:
    world = World(2)
    old = world.ranks[0]
    world.lose(0, keeps_store=True)
    assert world.allocator.exchange(0, old.incarnation, old.report(world.now), world.now) is None


def _with_spending() -> World:
    world = World(2)
    for _ in range(2):
        for rank in world.ranks:
            world.exchange(rank)
    for rank in world.ranks:
        for _ in range(10):
            rank.send(world.now)
            rank.answer(REQUEST)
        world.exchange(rank)
    return world


def _left(allocator: Allocator) -> float | None:
    return allocator.budgets()["run"]["tokens_left"]


def test_after_a_kill_the_budget_of_the_run_goes_on_and_after_an_end_it_begins_anew() -> None:
    world = _with_spending()
    spent = 2 * 10 * REQUEST
    for is_over, left in ((False, TOKENS - spent), (True, TOKENS)):
        after = Allocator(
            {URL: PLACES}, {"run": (TOKENS, None)}, 2, 0.0, world.allocator.state(is_over=is_over)
        )
        # The first rank had ended before the kill, so its store begins a new run; the other one goes on.
        here = 0 if is_over else 10 * REQUEST
        after.register(0, {"run": (0, 0)}, {"run": None}, is_same_store=True, now=0.0)
        after.register(1, {"run": (here, 0)}, {"run": None}, is_same_store=True, now=0.0)
        assert _left(after) == left


def test_what_a_run_spent_after_the_state_was_written_counts_once() -> None:
    """A fleet that lost its coordinator drains: its stores know more than the state, and their runs ended."""
    world = _with_spending()
    known, spent = 10 * REQUEST, 13 * REQUEST
    after = Allocator({URL: PLACES}, {"run": (TOKENS, None)}, 2, 0.0, world.allocator.state(is_over=False))
    drained = {
        "spent": {"run": (0, 0)},
        "ends_at": {"run": None},
        "former": (spent, 0),
        "is_same_store": True,
    }
    after.register(0, **drained, now=0.0)
    assert _left(after) == TOKENS - spent - known
    after.register(0, **drained, now=1.0)  # its process was lost before it sent anything
    assert _left(after) == TOKENS - spent - known
    # A run that was killed is a part of the next one, which reports it.
    killed = drained | {"spent": {"run": (spent, 0)}}
    after.register(1, **killed, now=1.0)
    assert _left(after) == TOKENS - 2 * spent
    # What a fleet spent that ended by itself never counts, whatever becomes of the next one.
    state = world.allocator.state(is_over=True)
    for _ in range(3):
        anew = Allocator({URL: PLACES}, {"run": (TOKENS, None)}, 2, 0.0, state)
        state = anew.state(is_over=False)
        anew.register(0, **drained, now=0.0)
        assert _left(anew) == TOKENS
    # And what counts is written down once.
    state = after.state(is_over=False)
    again = Allocator({URL: PLACES}, {"run": (TOKENS, None)}, 2, 0.0, state)
    again.register(0, **drained, now=0.0)
    assert _left(again) == TOKENS - 2 * spent


def test_what_a_lost_store_was_granted_counts_as_spent() -> None:
    world = _with_spending()
    granted = world.ranks[0].ceiling
    assert granted > 10 * REQUEST
    after = Allocator({URL: PLACES}, {"run": (TOKENS, None)}, 2, 0.0, world.allocator.state(is_over=False))
    after.register(0, {}, {"run": None}, is_same_store=False, now=0.0)
    after.register(1, {"run": (10 * REQUEST, 0)}, {"run": None}, is_same_store=True, now=0.0)
    assert _left(after) == TOKENS - granted - 10 * REQUEST


def test_a_new_day_has_its_whole_budget() -> None:
    allocator = Allocator({URL: PLACES}, {"day": (TOKENS, 5_000_000)}, 1, 0.0)
    allocator.register(0, {"day": (TOKENS, 4_000_000)}, {"day": 100.0}, is_same_store=True, now=0.0)
    assert allocator.budgets()["day"]["tokens_left"] == 0
    allocator.end(0, is_lost=True)
    allocator.register(0, {}, {"day": 200.0}, is_same_store=False, now=1.0)
    assert allocator.budgets()["day"]["tokens_left"] == TOKENS
    assert allocator.budgets()["day"]["microusd_left"] == 5_000_000


@given(st.integers(5, 500), st.lists(st.sampled_from([0.0, 0.1, 0.7, math.inf]), min_size=1, max_size=5))
def test_counts_add_up_and_nobody_gets_none(whole: int, demands: list[float]) -> None:
    parts = divide_count(whole, {rank: Want(1, demand) for rank, demand in enumerate(demands)})
    assert sum(parts.values()) <= whole
    assert min(parts.values()) >= 1
    if math.inf in demands:
        assert sum(parts.values()) >= whole - len(demands)


def test_the_last_money_goes_to_one_rank_whose_request_fits() -> None:
    ceiling = ("run", 0)
    accounts = {
        number: Account({ceiling: 45}, {ceiling: 40}, (0, 0), short=(8, 0), is_active=True)
        for number in range(3)
    }
    targets = divide_budget({ceiling: 130}, {ceiling: 0}, accounts)
    assert {rank: granted[ceiling] for rank, granted in targets.granted.items()} == {0: 50, 1: 40, 2: 40}
    assert not targets.final
    assert divide_budget({ceiling: 127}, {ceiling: 0}, accounts).final == {0, 1, 2}
