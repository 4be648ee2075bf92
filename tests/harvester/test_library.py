"""Test the Python API of the harvester: threads, running event loops, events, errors, samples."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # noqa: F401 - pyarrow imports it, and its `six` adds an import hook
import pyarrow as pa
import pytest

import harvester
from harvester.errors import ConfigError, HarvesterError, StoreError, UsageError
from harvester.mock_teacher.running import RunningMock
from harvester.observe.status import current_status, read_status
from harvester.store.reader import Corpus
from harvester.store.shards.seal import seal
from harvester.store.where import Where
from harvester.system.background import Running, StopRequests
from tests.harvester.store_rows import fill, open_store
from tests.journey.run_process import write_folder
from tests.waiting import until

Mock = Callable[..., RunningMock]


def process_state() -> tuple[Any, ...]:
    """What a library must leave alone."""
    return (
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        dict(os.environ),
        list(sys.meta_path),
        resource.getrlimit(resource.RLIMIT_NOFILE),
    )


@pytest.fixture
def few_files() -> Iterator[None]:
    """Allow fewer open files than a run of 300 requests at once needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_a_harvest_leaves_the_process_as_it_was_and_sends_nothing_twice(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 12, teacher="[teacher.limits]\nmax_concurrency = 300")
    before, events, threads, allowed = process_state(), [], set(), set()
    frozen = gc.get_freeze_count()

    def note(event: harvester.HarvestEvent) -> None:
        events.append(event)
        threads.add(threading.current_thread())
        allowed.add(resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    summary = harvester.harvest(config, on_event=note)
    assert (summary.ending, summary.exit_code, summary.counts.answers_stored) == ("complete", 0, 12)
    assert process_state() == before
    assert gc.get_freeze_count() <= frozen
    assert max(allowed) > 256  # it was raised meanwhile
    assert (events[-1].state, events[-1].rows_done, events[-1].rows_total) == ("complete", 12, 12)
    assert events[-1].status["run_id"] == summary.run_id
    assert threading.main_thread() not in threads
    again = harvester.harvest(str(config))
    assert (again.counts.requests_sent, again.counts.from_cache) == (0, 12)
    assert mock.totals()["requests"] == 12


def test_events_come_to_an_iterator_of_a_running_loop(mock_teacher: Mock, tmp_path: Path) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 5)

    async def cell() -> tuple[list[str], int, int]:
        running = harvester.start(config, limit=3)
        states = [event.state async for event in running]
        summary = await running
        rest = harvester.harvest(config)  # a plain call, as in a cell of a notebook
        return states, summary.counts.answers_stored, rest.counts.answers_stored

    states, stored, rest = asyncio.run(cell())
    assert (states[-1], stored, rest) == ("rows", 3, 2)


# A run of 30 rows then takes 26 s at two requests at a time: it does not end before it is told to.
SLOW_AFTER_FOUR = [{"action": "delay", "delay_s": 2, "after": 4}]


def test_stop_drains_and_the_same_call_goes_on(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(max_concurrency=2, faults=SLOW_AFTER_FOUR)
    config = write_folder(tmp_path, mock.base_url, 30, teacher="[teacher.limits]\nmax_concurrency = 2")

    async def stop_early() -> harvester.Summary:
        running = harvester.start(config)
        async for event in running:
            if event.answers_stored:
                running.stop()
                break
        return await running

    stopped = asyncio.run(stop_early())
    assert (stopped.ending, stopped.exit_code) == ("interrupted", 130)
    assert 0 < stopped.counts.answers_stored < 30
    mock.set_faults([])
    rest = harvester.harvest(config)
    assert rest.counts.from_cache == stopped.counts.answers_stored
    assert mock.totals()["requests"] == 30


def test_ctrl_c_drains_before_it_is_raised(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(max_concurrency=2, faults=SLOW_AFTER_FOUR)
    config = write_folder(tmp_path, mock.base_url, 30, teacher="[teacher.limits]\nmax_concurrency = 2")
    sent: list[int] = []

    def press(event: harvester.HarvestEvent) -> None:
        if event.answers_stored and not sent:
            sent.append(event.answers_stored)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        harvester.harvest(config, on_event=press)
    assert sent
    stored = Corpus.open(tmp_path / "store").count()
    assert 0 < stored < 30
    assert mock.totals()["requests"] == stored


def test_what_a_callback_raises_ends_the_run_and_reaches_the_caller(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 3)

    def fail(event: harvester.HarvestEvent) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        harvester.harvest(config, on_event=fail)
    assert harvester.harvest(config).exit_code == 0  # the store was let go


# Eight requests at a time of a second each: a run of 200 rows does not end before it is told to.
EIGHT_AT_ONCE = "[teacher.limits]\nmax_concurrency = 8"


def assert_drained(store: Path, mock: RunningMock) -> None:
    """What was on the wire has arrived and is stored."""
    stored = Corpus.open(store).count()
    assert 0 < stored < 200
    assert mock.totals()["requests"] == mock.state()["received"] == stored
    status = current_status(store)
    assert (status["state"], status["possibly_billed"]) == ("interrupted", 0)
    assert list((store / "shards").glob("*.parquet"))


def test_what_a_callback_raises_loses_no_request_in_flight(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=1.0)
    config = write_folder(tmp_path, mock.base_url, 200, teacher=EIGHT_AT_ONCE)
    in_flight: list[int] = []

    def fail(event: harvester.HarvestEvent) -> None:
        assert not in_flight, "called again after it raised"
        if count := mock.state()["in_flight"]:
            in_flight.append(count)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        harvester.harvest(config, progress=False, on_event=fail)
    assert in_flight
    assert_drained(tmp_path / "store", mock)


PROGRAM = """
import asyncio, sys
import harvester

async def main():
    running = harvester.start(sys.argv[1])
    async for event in running:
        if event.status["in_flight"]:
            raise ZeroDivisionError

asyncio.run(main())
"""


def test_a_program_that_fails_elsewhere_loses_no_request_in_flight(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher(latency_s=1.0)
    config = write_folder(tmp_path, mock.base_url, 200, teacher=EIGHT_AT_ONCE)
    command = [sys.executable, "-c", PROGRAM, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError"
    assert_drained(tmp_path / "store", mock)


LEAVING_PROGRAM = """
import sys, time
from pathlib import Path
import harvester
from harvester.observe.status import read_status

running = harvester.start(sys.argv[1])
store = Path(sys.argv[1]).parent / "store"
while not read_status(store).get("in_flight"):
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_wait_of_a_program_that_ends(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=600.0)
    config = write_folder(tmp_path, mock.base_url, 200, teacher=EIGHT_AT_ONCE)
    command = [sys.executable, "-c", LEAVING_PROGRAM, str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        until(lambda: read_status(tmp_path / "store").get("state") == "draining")
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=240)
    assert said == ""
    status = current_status(tmp_path / "store")
    assert status["state"] == "aborted"  # not "died"
    assert status["possibly_billed"] >= max(1, mock.state()["received"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "3/2"}, "no shard"),
        ({"shard": (1, 3)}, "(1, 3)"),
        ({"limit": 0}, "limit"),
        ({"limit": 2.5}, "a whole number"),
        ({"limit": True}, "a whole number"),
        ({"max_usd": "5"}, "max_usd"),
        ({"max_runtime": "soon"}, "max_runtime"),
        ({"finish_by": "tomorrow"}, "finish_by"),
        ({"retry": ["ok"]}, "'ok' is no outcome"),
        ({"budget_per": "week"}, "'week' is none of run, store, day, month"),
        ({"transport": "pigeon"}, "'pigeon' is none of online, batch, hybrid"),
        ({"on_event": 3}, "give a function"),
        ({"max_rows": 3}, "no such option"),
    ],
)
def test_options_that_can_not_be_used_are_named(
    options: dict[str, Any], message: str, mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    with pytest.raises(UsageError, match=re.escape(message)):
        harvester.harvest(write_folder(tmp_path, mock.base_url, 1), **options)
    assert mock.totals()["requests"] == 0


def test_errors_have_a_place_and_a_remedy(tmp_path: Path) -> None:
    for call in (harvester.harvest, harvester.plan, harvester.curate, harvester.open):
        with pytest.raises(HarvesterError) as caught:
            call(tmp_path / "none.toml")
        assert caught.value.place
        assert caught.value.remedy
    for call in (harvester.harvest, harvester.plan, harvester.curate, harvester.open):
        with pytest.raises(UsageError, match="3 is no path"):
            call(3)
    with pytest.raises(UsageError, match="'completion' is a text"):
        harvester.open(tmp_path, columns="completion")
    with pytest.raises(UsageError, match="no store is here"):
        harvester.open(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'harvesting'"):
        harvester.harvesting  # noqa: B018 - reading it is the test


def test_plan_and_curate_are_those_of_the_commands(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 4)
    plan = harvester.plan(config)
    assert (plan.rows, plan.cached, plan.permitted) == (4, 0, True)
    assert mock.state()["received"] == 0
    harvester.harvest(config)
    curate = tmp_path / "curate.toml"
    filters = 'filters = ["finished", {pattern = "none has this"}]'
    curate.write_text(f'corpus = "store"\nout = "unused"\n{filters}\n')
    counts = harvester.curate(curate, out=tmp_path / "curated", page=tmp_path / "page.html")
    assert (counts.kept, sum(counts.dropped.values()), counts.out) == (0, 4, tmp_path / "curated")
    assert "pattern" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "unused").exists()
    assert len(list(harvester.open(config))) == 4


def write_store(store: Path) -> None:
    """A store of three shards and a journal with unsealed answers."""
    with open_store(store) as journal:
        for first in (0, 10, 20):
            fill(journal, range(first, first + 10))
            seal(journal, store, target_bytes=1 << 20, everything=True)
        fill(journal, range(30, 35))


def test_samples_are_those_that_the_condition_chooses(tmp_path: Path) -> None:
    write_store(tmp_path)
    everything = list(harvester.open(tmp_path))
    assert len(everything) == 35
    for condition in (
        {"prompt_id": "p12"},
        {"prompt_id": ["p3", "p33", "none"]},
        {"prompt_id": "p12", "run": "run-1"},
        {"prompt_id": "p12", "outcome": "truncated"},
        'not = {prompt_id = ["p1", "p2"]}',
        {"task": "sum"},
        {"sample": 0, "prompt_id": "p4"},
        {"run": "another"},
    ):
        wanted = [sample for sample in everything if Where.parse(condition).matches(sample)]
        assert list(harvester.open(tmp_path, where=condition)) == wanted
        keys = harvester.open(tmp_path, columns=["key"], where=condition)
        assert [sample.key for sample in keys] == [sample.key for sample in wanted]
        assert all(sample.prompt_id == "" for sample in keys)
    sealed = harvester.open(tmp_path, include_unsealed=False, where={"prompt_id": "p33"})
    assert list(sealed) == []


def test_row_groups_without_a_match_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harvester.store.shards import batching

    write_store(tmp_path)
    read: list[int] = []
    batch_group = batching.batch_group

    def counted(file: Any, number: int, columns: Any) -> Any:
        read.append(number)
        return batch_group(file, number, columns)

    monkeypatch.setattr(batching, "batch_group", counted)
    assert len(list(harvester.open(tmp_path, where={"prompt_id": "p12"}))) == 1
    assert len(read) == 1  # of three shards
    assert len(list(harvester.open(tmp_path))) == 35
    assert len(read) == 1 + 3


def test_samples_become_arrow_and_pandas(tmp_path: Path) -> None:
    write_store(tmp_path)
    samples = harvester.open(tmp_path, columns=["prompt_id", "completion", "messages"])
    table = samples.to_arrow()
    assert table.schema.names == ["prompt_id", "completion", "messages"]
    assert table.column("prompt_id").to_pylist() == [sample.prompt_id for sample in samples]
    frame = samples.to_pandas()
    assert list(frame["completion"]) == [sample.completion for sample in samples]
    empty = harvester.open(tmp_path, columns=["key"], where={"run": "another"}).to_arrow()
    assert (empty.num_rows, empty.schema.field("key").type) == (0, pa.string())
    with pytest.raises(UsageError, match="no column 'answer'"):
        harvester.open(tmp_path, columns=["answer"])
    with pytest.raises(ConfigError, match="unknown field 'modell'"):
        harvester.open(tmp_path, where={"modell": "a"})


def test_a_damaged_row_is_an_error_also_where_rows_are_chosen(tmp_path: Path) -> None:
    write_store(tmp_path)
    shard = sorted((tmp_path / "shards").glob("*.parquet"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(StoreError):
        list(harvester.open(tmp_path, where={"prompt_id": "p2"}))


def test_a_second_stop_request_is_heard_and_a_timeout_leaves_the_work_alone() -> None:
    heard: list[int] = []
    goes_on = threading.Event()

    def work(emit: Callable[[str], None], requests: StopRequests) -> int:
        emit("began")
        with requests.heard_by(lambda: (heard.append(1), goes_on.set())):
            goes_on.wait(240)
        return 7

    running: Running[str, int] = Running("test", work)
    with pytest.raises(TimeoutError):
        running.result(timeout_s=0.01)
    assert not running.is_over
    running.stop()
    assert running.result() == 7
    assert heard == [1]


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; import harvester; harvester.__all__; dir(harvester)\n"
        "print([m for m in sys.modules if m.startswith('harvester.')])\n"
        "harvester.open; harvester.start; harvester.__version__\n"
        "print([m for m in ('httpx', 'pyarrow', 'pydantic', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_every_public_name_is_there() -> None:
    assert {name: getattr(harvester, name) for name in harvester.__all__}.keys() == set(harvester.__all__)
    assert set(harvester.__all__) <= set(dir(harvester))
