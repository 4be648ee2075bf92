"""Run a fleet: place its ranks on the machines of a cluster, watch them, replace lost ones, end them all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvester.config.config import HarvestConfig
from harvester.config.overrides import Overrides
from harvester.errors import ConfigError, Ending, HarvesterError, RunState, StoreError
from harvester.fleet import cluster as processes
from harvester.fleet.checks import FleetOptions, find_stores, require_divisible, require_possible
from harvester.fleet.cluster import Actor, Cluster, Node, RankLost, connected, is_ready, result
from harvester.fleet.folder import FleetState, folder_of, read_state, require_ranks, write_state
from harvester.fleet.signals import Requests
from harvester.fleet.status import RankView, error_facts, exit_code_of, fleet_status, overall_state
from harvester.observe.counters import PassLimits
from harvester.observe.status import write_status
from harvester.store.journal.lock import StoreLock
from harvester.system.command_line.extras import require
from harvester.system.command_line.version import __version__
from harvester.teacher.policies import build_budget

Watch = Callable[[Mapping[str, Any]], None]
Note = Callable[[str], None]

LOOK_S = 0.25
# Seconds between two looks at each rank, and between two writes of the state.
POLL_S, SAVE_S = 1.0, 2.0
# A rank that is lost this often, with nothing stored in between, ends the fleet.
MOST_LOSSES = 3
# Exit codes of errors that all ranks would meet: configuration, teacher, terms.
_OF_ALL = frozenset({2, 4, 77})
# Outcome of a rank that was not begun before the fleet was to end.
_NOTHING_SENT: Mapping[str, Any] = {"exit_code": 0, "ending": "interrupted"}
# Remedy where ranks are lost.
_RESUMES = "the same command resumes: what was stored is kept"
# Seconds after which a rank that does not begin gets a note.
SLOW_S = 20.0


@dataclass(frozen=True, slots=True)
class FleetSummary:
    """How a fleet ended.

    Attributes:
        ranks: the summary or error of each rank, by number.
        stores: their folders.
        whole: the folder of the whole harvest's store.
        status: the last one.
    """

    exit_code: int
    ranks: Mapping[int, Mapping[str, Any]]
    stores: tuple[str, ...]
    whole: str
    status: Mapping[str, Any]
    folder: str
    exchanges: int
    message_bytes: int


def run(config: Path, options: FleetOptions, watch: Watch, note: Note) -> FleetSummary:
    """Harvest with a fleet until all ranks have ended; the same call resumes.

    Args:
        config: path of harvest.toml, which every machine finds under the same path.
        watch: is called with each status.
        note: is called with a line for the operator.

    Raises:
        ConfigError, PromptError, TermsRefused: nothing was sent.
        HarvesterError: the cluster can't be used, or another fleet holds the folder.
    """
    loaded, flags = require_possible(config, options)
    require("ray", "harvester fleet")  # before a folder is made
    whole = (config.resolve().parent / loaded.store.path).resolve()
    folder = folder_of(whole)
    with StoreLock(folder, started_at=time.time()):
        state = read_state(folder)
        require_ranks(state, options.ranks, folder)
        known = options.ranks or (None if state is None else state.ranks)
        try:
            with connected(options.address, known or 1) as cluster:
                state = state or find_stores(config, cluster, options.ranks)
                require_divisible(config, loaded, flags, state.ranks)
                fleet = _Fleet(config, loaded, flags, options, cluster, state, whole)
                with Requests.installed() as requests:
                    return fleet.run(requests, watch, note)
        except RankLost as lost:
            raise HarvesterError(
                f"a machine of the cluster, or a process there, was lost: {lost}",
                place="harvester fleet",
                remedy="`ray status` shows what is up; the same command resumes",
            ) from None


@dataclass(slots=True)
class _Member:
    """One rank: its process, the call that is under way, and what is known.

    Attributes:
        phase: "waiting" for a machine, "preparing", "ready", "running", "over".
        outcome: summary or error, once it has ended.
        losses: in a row, with nothing stored in between.
    """

    view: RankView = field(default_factory=RankView)
    actor: Actor | None = None
    node: Node | None = None
    call: Any = None
    phase: str = "waiting"
    facts: Mapping[str, Any] = field(default_factory=dict)
    outcome: Mapping[str, Any] | None = None
    losses: int = 0
    polled_at: float = 0.0


class _Fleet:
    """One fleet while it runs. Everything happens in the thread of `run`."""

    def __init__(  # noqa: PLR0913 - one argument for each thing that a fleet is given
        self,
        config: Path,
        loaded: HarvestConfig,
        flags: Overrides,
        options: FleetOptions,
        cluster: Cluster,
        state: FleetState,
        whole_store: Path,
    ) -> None:
        self._config = config
        self._loaded = loaded
        self._options = options
        self._cluster = cluster
        self._state = state
        self._whole_store, self._folder = whole_store, folder_of(whole_store)
        self._members = [_Member() for _ in range(state.ranks)]
        self._budgets: Mapping[str, Any] = {}
        self._overview: Mapping[str, Any] = {}
        self._note: Note = lambda _: None
        self._stops_sent = 0
        # When the second request to end came: ranks that do not answer it are ended.
        self._aborted_at: float | None = None
        self._has_noted_status = False
        self._fault: HarvesterError | None = None
        limits = PassLimits(None, flags.usd, flags.tokens, None, loaded.run.grace_s, flags.budget_span)
        whole = build_budget(loaded, limits, {}, time.time()).ceilings
        teacher = loaded.teacher
        self._coordinator = cluster.coordinator(
            json.dumps(
                {
                    "windows": {a.base_url: teacher.max_concurrency_of(a) for a in teacher.addresses},
                    "budgets": {
                        span.value: list(ceiling.limits)
                        for span, ceiling in whole.items()
                        if ceiling.limits != (None, None)
                    },
                    "ranks": state.ranks,
                    "state": state.coordinator,
                    "longest_attempt_s": loaded.run.longest_attempt_s,
                }
            )
        )
        self._facts = {
            "run_id": f"fleet of {state.ranks}",
            "config": str(config),
            "model": teacher.model,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_at": time.time(),
        }

    def run(self, requests: Requests, watch: Watch, note: Note) -> FleetSummary:
        """Run until all ranks have ended."""
        self._note = note
        try:
            self._watch_ranks(requests, watch)
        except RankLost as lost:  # the coordinator: ranks that hear nothing send nothing
            self._end_for(
                HarvesterError(
                    f"the coordinator was lost: {lost}",
                    place="harvester fleet",
                    remedy=_RESUMES,
                )
            )
        except HarvesterError as error:  # such as a full disk here: the ranks keep what is in flight
            self._end_for(error)
        return self._finish(requests, watch)

    def _watch_ranks(self, requests: Requests, watch: Watch) -> None:
        saved_at = 0.0
        while not all(member.phase == "over" for member in self._members):
            self._pass_on(requests)
            self._end_frozen()
            self._place_waiting()
            for number in range(len(self._members)):
                self._look(number)
            self._start_ready()
            if time.monotonic() - saved_at >= SAVE_S:
                self._save(is_over=False)
                saved_at = time.monotonic()
                watch(self._write_status())
            requests.wait(LOOK_S)

    # Placing

    def _place_waiting(self) -> None:
        if not any(member.phase == "waiting" for member in self._members):
            return
        nodes = self._cluster.nodes()
        if not nodes:
            return
        for number, member in enumerate(self._members):
            if member.phase != "waiting":
                continue
            if self._is_ending:
                self._over(number, _NOTHING_SENT)
                continue
            load = Counter(m.node.id for m in self._members if m.node is not None and m.phase != "over")
            node = self._choose(number, nodes, load)
            each = -(-len(self._members) // len(nodes))
            spec = {
                "config": str(self._config.resolve()),
                "options": dict(self._options.harvest),
                "rank": number,
                "of": len(self._members),
                "pay_again": self._options.pay_again,
            }
            cpus = min(1.0, int(1000 * node.cpus / (each + 1)) / 1000)
            member.actor = self._cluster.rank(json.dumps(spec), self._coordinator, node, cpus)
            member.node, member.phase = node, "preparing"
            member.view.state, member.view.host = "starting", node.host
            expected = self._coordinator.get("expected_run", number)
            member.call, member.polled_at = member.actor.ask_rank("prepare", expected), time.monotonic()

    def _choose(self, number: int, nodes: Sequence[Node], load: Counter[str]) -> Node:
        """Return the machine for a rank: where its store lies, else where the fewest ranks are."""
        host = self._state.hosts.get(number)
        return min(nodes, key=lambda node: (node.host != host, load[node.id], node.id))

    # Watching

    def _look(self, number: int) -> None:
        """See what has come of the call to a rank, and make the next one."""
        member = self._members[number]
        if member.phase == "over":
            return
        if member.call is None:
            if member.phase == "running" and time.monotonic() - member.polled_at >= POLL_S:
                assert member.actor is not None
                member.polled_at = time.monotonic()
                member.call = member.actor.ask_rank("poll")
            return
        if not is_ready(member.call):
            if member.phase == "preparing" and time.monotonic() - member.polled_at > SLOW_S:
                member.view.note = "reads its prompts, or waits for a free CPU of its machine"
            return
        call, member.call = member.call, None
        try:
            reply = json.loads(result(call))
        except RankLost as lost:
            self._lost(number, str(lost))
            return
        except HarvesterError as error:
            self._failed(number, error_facts(error))
            return
        if member.phase == "preparing":
            self._prepared(number, reply)
        else:
            self._polled(number, reply)

    def _prepared(self, number: int, reply: Mapping[str, Any]) -> None:
        member = self._members[number]
        if "error" in reply:
            self._failed(number, reply["error"])
            return
        member.facts = reply
        view = member.view
        view.store, view.rows_total, view.note = reply["store"], reply["rows_total"], ""
        first = next((m.facts for m in self._members if m.facts), reply)
        for name, what in (("config_sha256", str(self._config)), ("prompts_digest", "the prompt files")):
            if first[name] and reply[name] and first[name] != reply[name]:
                error = ConfigError(
                    f"{what} on {view.host} differ from those of another machine of the fleet",
                    place=f"rank {number + 1}",
                    remedy="give all machines the same files, under the same path",
                )
                self._failed(number, error_facts(error))
                return
        member.phase = "ready"

    def _start_ready(self) -> None:
        """Start ranks that are ready, once all have said what was spent: none may get another's money."""
        if any(member.phase in {"waiting", "preparing"} and not member.facts for member in self._members):
            return
        incarnations: dict[int, int] = {}
        for number, member in enumerate(self._members):
            if member.phase != "ready":
                continue
            assert member.node is not None
            facts = {n: member.facts[n] for n in ("spent", "former", "ends_at", "is_same_store")}
            incarnations[number] = self._coordinator.get("register", number, json.dumps(facts))
            self._state.hosts[number] = member.node.host
        if incarnations:  # what earlier runs spent is on disk before further ones spend anything
            self._save(is_over=False)
        for number, incarnation in incarnations.items():
            member = self._members[number]
            assert member.actor is not None
            member.actor.ask_rank("start", incarnation)
            member.phase, member.polled_at = "running", time.monotonic()
            member.view.state = RunState.RUNNING

    def _polled(self, number: int, reply: Mapping[str, Any]) -> None:
        member = self._members[number]
        if reply["status"]:
            member.view.status = reply["status"]
            member.view.state = reply["status"].get("state", member.view.state)
        if reply["is_over"]:
            self._coordinator.get("end", number, False)
            if summary := reply.get("summary"):
                self._over(number, summary)
            else:
                self._failed(number, reply["error"])

    def _failed(self, number: int, error: Mapping[str, Any]) -> None:
        """A rank has ended with an error (`error_facts`)."""
        self._over(number, {"error": error, "exit_code": error["exit_code"]})

    def _over(self, number: int, outcome: Mapping[str, Any]) -> None:
        """A rank has ended; all others end too, if what ended it concerns them."""
        member = self._members[number]
        member.phase, member.outcome, member.call = "over", outcome, None
        if "error" in outcome:
            error = outcome["error"]
            member.view.state, member.view.note = error["code"], error["message"]
            if error["exit_code"] in _OF_ALL:
                self._stop_all()
        if member.actor is not None:
            member.actor.kill()
            member.actor = None

    def _lost(self, number: int, why: str) -> None:
        """Free what a lost rank held, and let another machine go on for it."""
        member = self._members[number]
        stored = member.view.status.get("answers_stored", 0)
        member.losses = 1 if stored else member.losses + 1
        member.view.losses += 1
        self._note(f"rank {number + 1} was lost at {member.view.host}: {why}")
        was_running = member.phase == "running"
        if was_running:
            self._coordinator.get("end", number, True)
        member.actor, member.node, member.phase = None, None, "waiting"
        member.view.state, member.view.status = "lost", {}
        if member.losses > MOST_LOSSES:
            error = HarvesterError(
                f"its process was lost {member.losses} times in a row: {why}",
                place=f"rank {number + 1}",
                remedy="the logs of Ray on its machine say why",
            )
            self._failed(number, error_facts(error))

    # Ending

    @property
    def _is_ending(self) -> bool:
        return self._stops_sent > 0

    def _pass_on(self, requests: Requests) -> None:
        """Pass requests to end on to all ranks: the first drains, the second cuts short."""
        if requests.count > self._stops_sent:
            self._send_stops(requests.count)

    def _send_stops(self, count: int) -> None:
        times, self._stops_sent = count - self._stops_sent, count
        if count > 1 and self._aborted_at is None:
            self._aborted_at = time.monotonic()
        for number, member in enumerate(self._members):
            if member.phase in {"preparing", "ready"}:
                self._over(number, _NOTHING_SENT)
            elif member.phase == "running" and member.actor is not None:
                for _ in range(times):
                    member.actor.ask_rank("stop")

    def _end_frozen(self) -> None:
        """End ranks that answer nothing long after they were told to end at once."""
        if self._aborted_at is None or time.monotonic() - self._aborted_at < processes.CALL_S:
            return
        for number, member in enumerate(self._members):
            if member.phase == "running":
                self._coordinator.get("end", number, True)
                error = HarvesterError(
                    f"it did not end within {processes.CALL_S:g} s of the second request, and was killed",
                    place=f"rank {number + 1}",
                    remedy=_RESUMES,
                )
                self._failed(number, error_facts(error))

    def _stop_all(self) -> None:
        if not self._is_ending:
            self._send_stops(1)

    def _end_for(self, fault: HarvesterError) -> None:
        """Drain all ranks; the fleet ends with this error."""
        self._fault = fault
        self._stop_all()

    def _finish(self, requests: Requests, watch: Watch) -> FleetSummary:
        """Wait for ranks that still drain without a coordinator, and write the last status."""
        until = time.monotonic() + self._loaded.run.grace_s + processes.CALL_S
        written_at = -math.inf
        while any(member.phase == "running" for member in self._members) and time.monotonic() < until:
            for member in self._members:
                if member.phase == "running" and member.actor is not None:
                    _poll_to_end(member)
            if time.monotonic() - written_at >= SAVE_S:
                watch(self._write_status())
                written_at = time.monotonic()
            requests.wait(LOOK_S)
        if self._fault is not None:
            self._keep_run_ids()
            watch(self._write_status(Ending.of(self._fault), exit_code=self._fault.exit_code))
            raise self._fault
        outcomes = {n: member.outcome or {} for n, member in enumerate(self._members)}
        signal_number = requests.number if requests.count else 0
        code = exit_code_of([outcome.get("exit_code", 1) for outcome in outcomes.values()], signal_number)
        try:
            self._save(is_over=True)
        except RankLost as lost:  # with the last rank: what the next fleet knows of the budget is older
            self._note(f"the coordinator was lost at the end: {lost}")
        status = self._write_status(_ending(outcomes, code), exit_code=code)
        watch(status)
        return FleetSummary(
            code,
            outcomes,
            tuple(member.view.store for member in self._members),
            str(self._whole_store),
            status,
            str(self._folder),
            self._overview.get("exchanges", 0),
            self._overview.get("bytes", 0),
        )

    def _keep_run_ids(self) -> None:
        """Write which run each rank made last: the next fleet asks its store what that run spent."""
        ranks = dict((self._state.coordinator or {}).get("ranks", {}))
        for number, member in enumerate(self._members):
            saved, run_id = ranks.get(str(number)), member.view.status.get("run_id")
            if saved is not None and run_id and run_id != saved["run_id"]:
                ranks[str(number)] = {**saved, "run_id": run_id, "is_part": True}
        if ranks:
            self._state.coordinator = {**(self._state.coordinator or {}), "ranks": ranks}
        with contextlib.suppress(StoreError):  # another error is being reported
            write_state(self._folder, self._state)

    # Writing

    def _save(self, *, is_over: bool) -> None:
        self._overview = json.loads(self._coordinator.get("overview", is_over))
        self._budgets = self._overview["budgets"]
        self._state.coordinator = self._overview["state"]
        write_state(self._folder, self._state)

    def _write_status(self, ending: str = "", **more: Any) -> dict[str, Any]:
        views = [member.view for member in self._members]
        state = ending or overall_state(views, is_draining=self._is_ending)
        facts = {**self._facts, "updated_at": time.time(), "tool_version": __version__, **more}
        status = fleet_status(views, state, self._budgets, facts)
        self._keep(status)
        return status

    def _keep(self, status: Mapping[str, Any]) -> None:
        """Write status.json; a status that can't be written ends nothing."""
        try:
            write_status(self._folder, status)
        except OSError as error:
            if not self._has_noted_status:
                self._note(f"can't write the status of the fleet: {error}")
            self._has_noted_status = True


def _poll_to_end(member: _Member) -> None:
    """Ask a rank how far it is; one that is lost is over, as the next fleet goes on for it."""
    assert member.actor is not None
    view = member.view
    try:
        reply = json.loads(member.actor.get("call", "poll"))
    except (RankLost, HarvesterError):
        member.phase, view.state = "over", "lost"
        return
    if reply["status"]:
        view.status, view.state = reply["status"], reply["status"].get("state", view.state)
    if reply["is_over"]:
        member.phase = "over"


def _ending(outcomes: Mapping[int, Mapping[str, Any]], code: int) -> str:
    endings = {str(outcome.get("ending", "failed")) for outcome in outcomes.values()}
    if len(endings) == 1:
        return endings.pop()
    return "interrupted" if code > 128 else next((e for e in sorted(endings) if e != "complete"), "complete")
