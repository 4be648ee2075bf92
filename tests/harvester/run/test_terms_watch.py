"""Test the check of the terms during a run: unreadable terms are reported, then count as refused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import Ending, StoreError
from harvester.observe.status import read_status
from harvester.run import job
from harvester.run.background import schedule_watch, terms_watch
from harvester.run.background.heartbeat import Watch
from harvester.run.control import client
from harvester.store.maintain import seal_task
from tests.faults import bench

MANY = tuple(f"What is {n} + 21?" for n in range(400))
SLOW = {"limits": {"max_concurrency": 2}}


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("ASK_EVERY_S", 0.15), ("ASK_AGAIN_S", 0.05), ("LISTEN_EVERY_S", 0.05)):
        monkeypatch.setattr(terms_watch, name, seconds)


def tearing(path: Path) -> Watch:
    """A watcher that leaves a torn file here as soon as there is an answer."""

    def watch(status: Mapping[str, Any]) -> None:
        if status["answers_stored"]:
            path.write_text("bad = = ")

    return watch


@pytest.mark.usefixtures("_often")
def test_terms_that_can_not_be_read_are_reported_and_read_again(tmp_path: Path, mock_teacher, monkeypatch):
    monkeypatch.setattr(terms_watch, "MOST_LOOKS", 10_000)
    torn = tmp_path / "terms" / "x.toml"
    torn.parent.mkdir()
    sent: list[bool] = []
    monkeypatch.setattr(
        job,
        "require_still_permitted",
        lambda *args, ask=job.require_still_permitted: (sent.append(torn.exists()), ask(*args)),
    )

    def watch(status: Mapping[str, Any]) -> None:
        if status["answers_stored"] and not sent.count(True):
            torn.write_text("bad = = ")
        elif status["complaints"] and torn.exists():
            torn.unlink()
        elif status["complaints"] and not sent[-1]:  # asked again
            asyncio.get_running_loop().run_in_executor(None, client.ask, tmp_path / "store", "stop")

    ended = bench.run_harvest(mock_teacher(latency_s=0.03), tmp_path, prompts=MANY, teacher=SLOW, watch=watch)
    assert ended.exit_code == 10
    status = read_status(ended.store)
    assert (status["state"], len(status["complaints"])) == ("stopped", 1)
    assert str(torn) in status["complaints"][0]
    assert list((ended.store / "shards").glob("*.parquet"))


@pytest.mark.usefixtures("_often")
def test_terms_that_stay_unreadable_end_the_run_by_name(tmp_path: Path, mock_teacher):
    torn = tmp_path / "permissions" / "x.toml"
    torn.parent.mkdir()

    ended = bench.run_harvest(
        mock_teacher(latency_s=0.03), tmp_path, prompts=MANY, teacher=SLOW, watch=tearing(torn)
    )
    assert ended.exit_code == 77
    assert str(torn) in ended.output
    assert 0 < ended.totals.answers < 400
    assert read_status(ended.store)["state"] == Ending.TERMS
    assert not list((ended.store / "shards").glob("*.parquet"))


def test_terms_that_can_not_be_read_at_the_end_leave_the_answers_unsealed(tmp_path: Path, mock_teacher):
    torn = tmp_path / "terms" / "x.toml"
    torn.parent.mkdir()

    ended = bench.run_harvest(mock_teacher(), tmp_path, watch=tearing(torn))
    assert (ended.exit_code, ended.totals.answers) == (77, 3)
    assert str(torn) in ended.output
    assert not list((ended.store / "shards").glob("*.parquet"))
    torn.unlink()
    assert bench.run(tmp_path / "harvest.toml")[0] == 0
    assert list((ended.store / "shards").glob("*.parquet"))


def test_a_background_task_that_fails_is_reported_at_once_and_changes_no_ending(
    tmp_path: Path, mock_teacher, monkeypatch
):
    async def die(*_: Any, **__: Any) -> None:
        raise ValueError("a fault of ours")

    async def fail(*_: Any, **__: Any) -> None:
        raise StoreError("no room", place="shards")

    monkeypatch.setattr(schedule_watch, "watch", die)
    monkeypatch.setattr(seal_task, "seal_periodically", fail)
    seen: list[Mapping[str, Any]] = []
    mock = mock_teacher(latency_s=0.3)
    ended = bench.run_harvest(mock, tmp_path, watch=seen.append)
    assert (ended.exit_code, ended.totals.answers) == (0, 3)
    complaints = ["hours: stopped by a fault of ours", "sealing: stopped by shards: no room"]
    assert any(sorted(status["complaints"]) == complaints and status["state"] == "running" for status in seen)
    assert read_status(ended.store)["state"] == "complete"


def test_without_a_warden_the_answer_is_no(tmp_path: Path, mock_teacher, monkeypatch):
    async def die(*_: Any) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(terms_watch, "watch", die)
    ended = bench.run_harvest(mock_teacher(latency_s=0.1), tmp_path, prompts=MANY, teacher=SLOW)
    assert (ended.exit_code, ended.totals.answers < 400) == (77, True)
    assert "the terms can't be asked: terms: stopped by a fault of ours" in ended.output
