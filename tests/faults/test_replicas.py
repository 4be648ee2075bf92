"""Several addresses of one teacher: one that turns to noise, dies, comes back, or is killed in the middle."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harvester.config import config as settings
from harvester.errors import ConfigError
from harvester.mock_teacher.faults.script import read_rules
from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import MockSettings
from harvester.observe.report import prometheus, report
from harvester.observe.status import current_status, status_lines
from harvester.run.background import replica_watch
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.reader import Corpus
from harvester.system.clock import SystemClock
from tests.faults.bench import run_harvest
from tests.harvester.killed_runs import KilledRuns, quick_folder

Mock = Callable[..., RunningMock]
NOISE = "qzx vrrk lmbo pfft wug"
OFTEN = {"replicas_every_s": 1}
# On a busy machine an answer may take long: that is not what is tested.
PATIENT = {"deadline_s": 60, "max_attempts": 5}


def many(count: int) -> list[str]:
    return [f"What is {n} + {3 * n}?" for n in range(count)]


def texts(store: Path) -> Counter[str]:
    return Counter(sample.completion or "" for sample in Corpus.open(store).samples(["completion"]))


def addresses(store: Path) -> dict[str, Mapping[str, Any]]:
    return {entry["endpoint"]: entry for entry in current_status(store)["replicas"]}


@pytest.mark.parametrize("after", [0, pytest.param(60, marks=pytest.mark.slow)])
def test_an_address_that_turns_to_noise_is_put_aside_and_its_answers_are_taken_back(
    mock_teacher: Mock, tmp_path: Path, after: int
) -> None:
    """Every answer is well-formed; only its words tell."""
    bad, *good = (mock_teacher(latency_s=0.02) for _ in range(3))
    ended = run_harvest(
        bad,
        tmp_path,
        [{"action": "content", "value": NOISE, "after": after}],
        prompts=many(400),
        teacher={"replicas": [mock.base_url for mock in good], "limits": {"max_concurrency": 8}},
        clock=SystemClock(),
        run=PATIENT,
        canary=OFTEN,
    )
    assert ended.fired > 3
    assert (ended.exit_code, ended.totals.held) == (0, 400)
    assert texts(ended.store)[NOISE] == 0
    status = current_status(ended.store)
    assert status["taken_back"] == ended.totals.reopened > 0
    assert status["answers_stored"] == 400
    entry = addresses(ended.store)[bad.base_url]
    assert (entry["state"], entry["put_aside"], entry["canary"]) == ("aside", 1, "differs")
    assert entry["taken_back"] == status["taken_back"]
    assert [addresses(ended.store)[mock.base_url]["state"] for mock in good] == ["up", "up"]
    lines = "\n".join(status_lines(status))
    assert f"{bad.base_url}: aside (its answer to the canary differs from that of 2 of 2 others)" in lines
    assert any("put aside" in complaint for complaint in status["complaints"])
    taken = [json.loads(line) for line in (ended.store / paths.RETRIED).read_text().splitlines()]
    assert len(taken) == status["taken_back"]
    assert f'harvester_replica_state{{endpoint="{bad.base_url}",state="aside"}} 1' in prometheus.metrics_text(
        ended.store
    )
    report.write_report(ended.store, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "differs from that of 2 of 2 others" in page
    for store in (ended.store, ended.store / paths.CANARY):
        assert not verify_with_bill(store, repair=False).findings
    billed = sum(mock.totals()["requests"] for mock in (bad, *good))
    with Journal.open(ended.store / paths.CANARY, read_only=True) as canaries:
        assert billed == ended.totals.answers + canaries.totals().answers


@pytest.mark.slow
def test_an_address_of_two_that_turns_differs_from_what_it_said(mock_teacher: Mock, tmp_path: Path) -> None:
    bad, good = mock_teacher(latency_s=0.02), mock_teacher(latency_s=0.02)
    ended = run_harvest(
        bad,
        tmp_path,
        [{"action": "content", "value": NOISE, "after": 40}],
        prompts=many(200),
        teacher={"replicas": [good.base_url], "limits": {"max_concurrency": 4}},
        clock=SystemClock(),
        run=PATIENT,
        canary=OFTEN,
    )
    assert (ended.exit_code, texts(ended.store)[NOISE]) == (0, 0)
    assert addresses(ended.store)[bad.base_url]["state"] == "aside"


def test_two_addresses_that_differ_from_the_start_are_told_apart_by_nobody(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    bad, good = mock_teacher(), mock_teacher()
    ended = run_harvest(
        bad,
        tmp_path,
        [{"action": "content", "value": NOISE}],
        prompts=many(60),
        teacher={"replicas": [good.base_url]},
        run=PATIENT,
        canary=OFTEN,
    )
    assert (ended.exit_code, ended.totals.held) == (0, 60)
    assert {entry["state"] for entry in addresses(ended.store).values()} == {"up"}
    assert any("no majority" in complaint for complaint in current_status(ended.store)["complaints"])


def test_an_address_whose_answers_are_empty_is_compared_with_the_others(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    """The canary is answered well: the share of empty answers tells, and that others answer these rows."""
    bad, *good = (mock_teacher(latency_s=0.01) for _ in range(3))
    ended = run_harvest(
        bad,
        tmp_path,
        [{"action": "empty_content", "prompt": "What is", "after": 20}],
        prompts=many(500),
        teacher={"replicas": [mock.base_url for mock in good], "limits": {"max_concurrency": 4}},
        clock=SystemClock(),
        run=PATIENT,
        canary={"replicas_every_s": 3600},
    )
    entry = addresses(ended.store)[bad.base_url]
    assert ended.fired
    assert (ended.exit_code, entry["state"]) == (0, "aside")
    assert "such rows were answered elsewhere" in entry["why"]
    assert ended.totals.held_outcomes.get("empty", 0) == 0


def test_hard_prompts_put_nobody_aside(mock_teacher: Mock, tmp_path: Path) -> None:
    faults = [{"action": "empty_content", "prompt": "7"}]
    first, *others = (mock_teacher(faults=faults) for _ in range(3))
    ended = run_harvest(
        first,
        tmp_path,
        faults,
        prompts=many(300),
        teacher={"replicas": [mock.base_url for mock in others], "limits": {"max_concurrency": 8}},
        run=PATIENT,
        canary={"replicas_every_s": 5},
    )
    assert ended.totals.held_outcomes["empty"] > 60
    assert [entry["state"] for entry in addresses(ended.store).values()] == ["up"] * 3
    assert ended.totals.reopened == 0


@pytest.mark.slow
def test_an_address_that_is_good_again_gets_rows_again(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_watch, "FIRST_PROBE_S", 0.1)
    bad, *good = (mock_teacher(latency_s=0.03) for _ in range(3))
    fired: list[int] = []

    def watch(status: Mapping[str, Any]) -> None:
        if not fired and any(entry["state"] == "aside" for entry in status["replicas"]):
            fired.append(sum(bad.fired().values()))
            bad.set_faults([])

    ended = run_harvest(
        bad,
        tmp_path,
        [{"action": "content", "value": NOISE}],
        prompts=many(500),
        teacher={"replicas": [mock.base_url for mock in good], "limits": {"max_concurrency": 6}},
        clock=SystemClock(),
        watch=watch,
        run=PATIENT,
        canary=OFTEN,
    )
    entry = addresses(ended.store)[bad.base_url]
    assert (ended.exit_code, ended.totals.held, texts(ended.store)[NOISE]) == (0, 500, 0)
    assert fired
    assert fired[0] > 3
    assert (entry["state"], entry["put_aside"]) == ("up", 1)
    assert any("gets rows again" in complaint for complaint in current_status(ended.store)["complaints"])
    endpoints = Counter(sample.endpoint for sample in Corpus.open(ended.store).samples(["endpoint"]))
    assert endpoints[bad.base_url] > 20


def test_own_limits_hold_for_their_address(mock_teacher: Mock, tmp_path: Path) -> None:
    limited, free = mock_teacher(rpm=600, burst_s=0.5, latency_s=0.02), mock_teacher(latency_s=0.05)
    replica = {"base_url": limited.base_url, "limits": {"requests_per_minute": 600, "max_concurrency": 3}}
    in_flight: list[int] = []
    ended = run_harvest(
        free,
        tmp_path,
        prompts=many(150),
        teacher={"replica": [replica], "limits": {"max_concurrency": 4}},
        clock=SystemClock(),
        watch=lambda status: in_flight.extend(
            entry["in_flight"] for entry in status["replicas"] if entry["endpoint"] == limited.base_url
        ),
        run=PATIENT,
        canary={"replicas_every_s": 0},
    )
    assert (ended.exit_code, ended.totals.answers) == (0, 150)
    assert limited.state()["statuses"].get("429", 0) == 0
    assert limited.totals()["requests"] > 5
    assert max(in_flight) <= 3


def test_all_addresses_die_as_one_does(mock_teacher: Mock, tmp_path: Path) -> None:
    codes = []
    for count in (1, 3):
        mocks = [mock_teacher(latency_s=0.02) for _ in range(count)]
        for mock in mocks[1:]:
            mock.set_faults([{"action": "status", "status": 500, "after": 10}])
        folder = tmp_path / str(count)
        folder.mkdir()
        ended = run_harvest(
            mocks[0],
            folder,
            [{"action": "status", "status": 500, "after": 10}],
            prompts=many(200),
            teacher={"replicas": [mock.base_url for mock in mocks[1:]], "limits": {"max_concurrency": 4}},
            run={"patience_s": 3, "max_attempts": 2},
            canary=OFTEN,
        )
        assert 0 < ended.totals.answers < 200
        codes.append(ended.exit_code)
    assert codes[0] == codes[1] == 10


@pytest.mark.slow
def test_an_address_that_dies_and_comes_back_works_again(mock_teacher: Mock, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    good = mock_teacher(latency_s=0.03)
    dying = start_in_thread(MockSettings(port=port, latency_s=0.03))
    back: list[RunningMock] = []

    def watch(status: Mapping[str, Any]) -> None:
        entry = next((e for e in status["replicas"] if e["endpoint"] == dying.base_url), {})
        if not dying.is_stopped and entry.get("answers", 0) > 20:
            dying.stop()
        elif dying.is_stopped and not back and entry.get("state") == "down":
            back.append(start_in_thread(MockSettings(port=port, latency_s=0.03, faults=read_rules([]))))

    try:
        ended = run_harvest(
            good,
            tmp_path,
            prompts=many(900),
            teacher={"replicas": [dying.base_url], "limits": {"max_concurrency": 8}},
            clock=SystemClock(),
            run={**PATIENT, "patience_s": 600},
            watch=watch,
            canary={"replicas_every_s": 0},
        )
        assert dying.is_stopped
        assert back
        assert (ended.exit_code, ended.totals.answers, ended.totals.dead) == (0, 900, 0)
        assert back[0].totals()["requests"] > 20
        assert addresses(ended.store)[dying.base_url]["state"] == "up"
    finally:
        for mock in (dying, *back):
            mock.stop()


@pytest.mark.slow
def test_kills_with_several_addresses_lose_and_pay_nothing_twice(mock_teacher: Mock) -> None:
    """One address turns to noise meanwhile: whatever is killed when, none of it is left at the end."""
    mocks = [mock_teacher(latency_s=0.05) for _ in range(3)]
    with quick_folder() as folder:
        (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in many(900)))
        urls = json.dumps([mock.base_url for mock in mocks[1:]])
        config = folder / "harvest.toml"
        config.write_text(
            f'[teacher]\nbase_url = "{mocks[0].base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
            f"replicas = {urls}\n[teacher.limits]\nmax_concurrency = 8\n[sampling]\nmax_tokens = 64\n"
            '[prompts]\nfiles = ["p.jsonl"]\n[store]\npath = "store"\nmin_free_mib = 1\nshard_mib = 0.01\n'
            "[canary]\nreplicas_every_s = 0.5\n"
        )
        killed = 0
        with KilledRuns(config) as runs:
            for number in range(4):
                if number == 2:
                    mocks[0].set_faults([{"action": "content", "value": NOISE}])
                status, _ = runs.run(20.0, f"journal.after_commit:{12 + 3 * number}")
                killed += status == -9
            assert runs.run(600.0)[0] == 0
        store = folder / "store"
        assert killed == 4
        assert mocks[0].fired()
        with Journal.open(store, read_only=True) as journal:
            totals = journal.totals()
        assert (totals.held, totals.paid_twice) == (900, 0)
        assert texts(store)[NOISE] == 0
        assert not verify_with_bill(store, repair=False).findings


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"replica": [{"base_url": "http://127.0.0.1:2/v1"}] * 2}, "stands there twice"),
        ({"replica": [{"base_url": "http://127.0.0.1:2/v1", "weight": 0}]}, "weight"),
        ({"replica": [{"base_url": "http://127.0.0.1:2/v1", "wieght": 2}]}, "did you mean"),
        ({"replica": [{"base_url": "http://user:secret@127.0.0.1:2/v1"}]}, "base_url"),
        ({"replica": [{"base_url": "http://127.0.0.1:2/v1", "api_key_env": "OTHER"}]}, "api_key_env"),
    ],
)
def test_a_replica_that_can_not_be_is_refused(teacher: Mapping[str, Any], message: str) -> None:
    table = {"base_url": "http://127.0.0.1:1/v1", "model": "m", **teacher}
    with pytest.raises(ConfigError) as refused:
        settings.parse({"teacher": table, "prompts": {"files": ["p"]}}, place="harvest.toml")
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_plain_list_means_entries_with_defaults() -> None:
    urls = ["http://127.0.0.1:2/v1", "http://127.0.0.1:3/v1"]
    base = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}

    def parsed(**more: Any) -> settings.HarvestConfig:
        table = {"teacher": {**base, **more}, "prompts": {"files": ["p"]}}
        return settings.parse(table, place="harvest.toml")

    plain, described = parsed(replicas=urls), parsed(replica=[{"base_url": url} for url in urls])
    assert plain.teacher.addresses == described.teacher.addresses
    assert plain.teacher.base_urls == (base["base_url"], *urls)
    assert (plain.teacher.key_name, described.teacher.teacher_id) == (
        base["base_url"],
        f"{base['base_url']}|m",
    )
    first = parsed(replica=[{"base_url": base["base_url"], "weight": 3, "limits": {"max_concurrency": 5}}])
    assert first.teacher.base_urls == (base["base_url"],)
    assert first.teacher.max_concurrency_of(first.teacher.addresses[0]) == 5
    assert "replica" not in plain.teacher.model_dump(mode="json")  # hashes of earlier configurations hold
