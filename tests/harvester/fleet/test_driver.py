"""How the driver of a fleet ends, with played processes: what the timing of real ones rarely brings about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import ConfigError, HarvesterError, StoreFull
from harvester.fleet import cluster, driver
from harvester.fleet.checks import FleetOptions, require_possible
from harvester.fleet.folder import FleetState, folder_of
from harvester.fleet.signals import Requests
from harvester.fleet.status import error_facts
from harvester.library import HarvestOptions
from harvester.mock_teacher.running import RunningMock
from tests.harvester.run.test_shards import write

Mock = Callable[..., RunningMock]


@dataclass
class Played:
    """A rank: what it answers to `prepare`, whether it heeds a stop, and how long it drains."""

    prepared: Mapping[str, Any]
    is_frozen: bool = False
    polls_to_drain: int = 0
    calls: list[str] = field(default_factory=list)
    is_killed: bool = False

    def ask_rank(self, method: str, *_: object) -> Any:
        self.calls.append(method)
        if method == "prepare":
            return json.dumps(self.prepared)
        if method == "poll" and not self.is_frozen:
            return self.poll()
        return None

    def poll(self) -> str:
        is_stopping = "stop" in self.calls
        self.polls_to_drain -= is_stopping
        is_over = is_stopping and self.polls_to_drain < 0
        summary = {"exit_code": 0, "ending": "interrupted"}
        return json.dumps({"status": {}, "is_over": is_over, "summary": summary if is_over else None})

    def get(self, *_: object) -> str:
        return self.poll()

    def kill(self) -> None:
        self.is_killed = True


class PlayedCluster:
    """A cluster of one machine whose coordinator always answers."""

    def __init__(self, ranks: list[Played]) -> None:
        self.ranks = ranks
        self.placed = iter(ranks)

    def nodes(self) -> list[cluster.Node]:
        return [cluster.Node("n", "host", 4.0)]

    def coordinator(self, _spec: str) -> PlayedCluster:
        return self

    def rank(self, *_: object) -> Played:
        return next(self.placed)

    def get(self, method: str, *_: object) -> Any:
        if method == "overview":
            return json.dumps({"state": {}, "budgets": {}, "exchanges": 0, "bytes": 0})
        return {"expected_run": "", "register": 1, "end": None}[method]


def good(number: int) -> dict[str, Any]:
    facts = {"config_sha256": "c", "prompts_digest": "p", "rows_total": 2, "store": f"store-{number}"}
    return {**facts, "spent": {}, "former": [0, 0], "ends_at": {}, "is_same_store": True}


def run(ranks: list[Played], tmp_path: Path, mock: RunningMock, requests: Requests) -> driver.FleetSummary:
    config = write(tmp_path, mock, 2)
    options = FleetOptions(None, len(ranks), False, HarvestOptions())
    loaded, flags = require_possible(config, options)
    played: Any = PlayedCluster(ranks)
    whole = tmp_path / "store"
    folder_of(whole).mkdir()
    fleet = driver._Fleet(config, loaded, flags, options, played, FleetState(len(ranks)), whole)
    return fleet.run(requests, lambda _: None, lambda _: None)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "is_ready", lambda call: call is not None)
    monkeypatch.setattr(driver, "result", lambda call: call)
    monkeypatch.setattr(driver, "LOOK_S", 0.01)
    monkeypatch.setattr(driver, "POLL_S", 0.01)
    monkeypatch.setattr(driver, "SAVE_S", 0.05)


def test_a_rank_that_was_ended_does_not_come_back(mock_teacher: Mock, tmp_path: Path) -> None:
    error = error_facts(ConfigError("is wrong", place="harvest.toml", remedy="mend it"))
    ranks = [Played({"error": error}), Played(good(1)), Played(good(2))]
    summary = run(ranks, tmp_path, mock_teacher(), Requests())
    assert summary.exit_code == 2
    assert summary.ranks[0]["error"]["message"] == "is wrong"
    assert all(rank.is_killed for rank in ranks)
    assert not any("start" in rank.calls for rank in ranks)


def test_a_full_disk_of_the_driver_drains_all_ranks(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        if all("start" in rank.calls for rank in ranks):
            raise StoreFull("no space is left", place="fleet.json")

    monkeypatch.setattr(driver, "write_state", full)
    written: list[Mapping[str, Any]] = []
    monkeypatch.setattr(driver, "write_status", lambda _, status: written.append(status))
    ranks = [Played(good(0), polls_to_drain=10), Played(good(1))]
    with pytest.raises(StoreFull):
        run(ranks, tmp_path, mock_teacher(), Requests())
    assert all(rank.calls.count("stop") == 1 for rank in ranks)
    assert "draining" in [status["state"] for status in written]
    assert (written[-1]["state"], written[-1]["exit_code"]) == ("store_full", 5)
    assert all("exit_code" not in status for status in written[:-1])


def test_a_status_that_can_not_be_written_ends_nothing(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full(*_: object) -> None:
        tries.append(1)
        if len(tries) == 3:
            requests._note(15, None)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(driver, "write_status", full)
    requests = Requests()
    summary = run([Played(good(0))], tmp_path, mock_teacher(), requests)
    assert (summary.exit_code, len(tries) > 3) == (143, True)


def test_a_rank_that_answers_nothing_is_ended_after_the_second_request(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CALL_S", 0.2)
    requests = Requests()
    ranks = [Played(good(0), is_frozen=True), Played(good(1))]

    def ask(times: int) -> None:
        if all("start" in rank.calls for rank in ranks) and requests.count < 2:
            requests._note(15, None)

    monkeypatch.setattr(driver, "write_state", lambda *_: ask(1))
    summary = run(ranks, tmp_path, mock_teacher(), requests)
    assert "did not end within" in summary.ranks[0]["error"]["message"]
    assert ranks[0].is_killed
    assert summary.ranks[1]["ending"] == "interrupted"


def test_a_lost_cluster_is_an_error_in_words(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise cluster.RankLost("the head node does not answer")

    monkeypatch.setattr(driver, "require", lambda *_: None)
    monkeypatch.setattr(driver, "connected", lost)
    config = write(tmp_path, mock_teacher(), 2)
    with pytest.raises(HarvesterError, match="does not answer"):
        driver.run(config, FleetOptions(None, 2, False, HarvestOptions()), lambda _: None, lambda _: None)
