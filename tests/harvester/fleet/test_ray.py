"""`harvester fleet` on a Ray cluster of several nodes of this machine, against a mock teacher process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock, start_process
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import is_held
from harvester.store.reader import Corpus
from tests.harvester.run.test_shards import rows_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: `make test-ray` installs it"),
    # Ray's own modules, and those of its processes that outlive a test.
    pytest.mark.filterwarnings("ignore"),
]

SECRET = "sk-fleet-1234567890-not-to-be-seen"
NODES = 4
DONE_S = 120.0

# A budget that less than half of 1,500 rows fit.
NINE_THOUSAND_TOKENS = """
[teacher.limits]
max_concurrency = 40
[sampling]
max_tokens = 64
[budget]
tokens = 9000
"""


@contextlib.contextmanager
def _cluster(nodes: int) -> Iterator[Any]:
    """Start a cluster whose processes have the credential in their environment, as those of a team have."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["FLEET_KEY"] = SECRET
    arguments = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
        yield cluster
    finally:
        os.environ.pop("FLEET_KEY", None)
        cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with _cluster(NODES) as running:
        yield running


@pytest.fixture
def teacher() -> Iterator[Callable[..., RunningMock]]:
    with contextlib.ExitStack() as stack:
        yield lambda *flags: stack.enter_context(start_process("--accuracy", "1.0", *flags))


def write(root: Path, mock: RunningMock, prompts: int, more: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"p{n}", "prompt": f"What is {n} + {n % 7}?", "n": n} for n in range(prompts)]
    (root / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / "harvest.toml"
    path.write_text(
        f'[teacher]\nbase_url = "{mock.base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        'api_key_env = "FLEET_KEY"\n[prompts]\nfiles = ["p.jsonl"]\n' + more
    )
    return path


class Fleet:
    """A `harvester fleet` under way."""

    def __init__(self, config: Path, *options: object) -> None:
        self.folder = config.parent / "store-fleet"
        command = [sys.executable, "-m", "harvester", "fleet", config, "--json", *options]
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def status(self) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        except FileNotFoundError:
            return {}
        return values if values["pid"] == self.process.pid else {}

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        until = time.monotonic() + DONE_S
        while time.monotonic() < until:
            if condition(status := self.status()):
                return status
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        raise AssertionError(f"it did not come: {self.status()}")

    def result(self) -> tuple[int, dict[str, Any], str]:
        out, err = self.process.communicate(timeout=DONE_S)
        assert SECRET not in out + err
        return self.process.returncode, json.loads(out) if out else {}, err


def fleet(config: Path, *options: object) -> tuple[int, dict[str, Any], str]:
    return Fleet(config, *options).result()


def harvest(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_KEY", SECRET)
    command = [sys.executable, "-m", "harvester", "run", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DONE_S)
    assert done.returncode == 0, done.stderr


def asked(mock: RunningMock) -> Counter[str]:
    """How often each body was answered."""
    return Counter(entry["body_sha256"] for entry in mock.ledger()["entries"])


def raylet_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(e.split(b"=")[1] for e in environment if e.startswith(b"RAY_RAYLET_PID=")))


def pids_named(name: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(name.encode()):
                found.append(int(folder.name))
    return found


def rank_pids(status: dict[str, Any]) -> dict[int, int]:
    return {rank["rank"]: rank["pid"] for rank in status["ranks"] if rank["pid"]}


def test_four_ranks_store_what_one_run_stores(
    cluster: Any, teacher: Callable[..., RunningMock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock = teacher()
    more = "[sampling]\nmax_tokens = 64\nsamples = 2\n"
    harvest(write(tmp_path / "one", mock, 300, more), monkeypatch)
    once = mock.totals()
    config = write(tmp_path / "four", mock, 300, more)
    code, result, err = fleet(config, "--address", cluster.address, "--merge")
    assert code == 0, err
    assert (result["ending"], len(result["ranks"])) == ("complete", NODES)
    assert all(rank["rows_done"] for rank in result["ranks"])
    assert result["merged"] == str(tmp_path / "four" / "store")
    assert rows_of(tmp_path / "four" / "store") == rows_of(tmp_path / "one" / "store")
    twice = mock.totals()
    assert twice["answers"] - once["answers"] == once["answers"] == 600
    # The same command again asks nothing, and says so.
    code, result, _ = fleet(config, "--address", cluster.address)
    assert (code, result["requests_sent"], result["rows_total"]) == (0, 0, 600)
    assert mock.totals() == twice
    # Without the folder of the fleet it finds the stores, and their number.
    shutil.rmtree(tmp_path / "four" / "store-fleet")
    code, result, err = fleet(config, "--address", cluster.address, "--ranks", 3)
    assert (code, "stores of a split into 4" in err) == (2, True)
    code, result, err = fleet(config, "--address", cluster.address)
    assert (code, result["requests_sent"], len(result["ranks"])) == (0, 0, NODES), err
    shown = subprocess.run(
        [sys.executable, "-m", "harvester", "status", str(tmp_path / "four" / "store-fleet")],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert len([line for line in shown.stdout.splitlines() if line.startswith("rank ")]) == NODES
    # Neither logs, nor what Ray writes of its processes, nor a command line holds the key.
    session = Path(cluster.head_node.get_session_dir_path())
    for path in [*session.rglob("*"), *(tmp_path / "four").rglob("*")]:
        with contextlib.suppress(OSError):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    for folder in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert SECRET.encode() not in folder.read_bytes()


def test_a_killed_node_costs_only_what_was_in_flight_there(
    teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = teacher("--latency", "0.4", "--rpm", "6000")
    config = write(
        tmp_path, mock, 1500, "[sampling]\nmax_tokens = 64\n[teacher.limits]\nrequests_per_minute = 6000\n"
    )
    with _cluster(3) as cluster:
        running = Fleet(config, "--address", cluster.address, "--ranks", 4)
        status = running.wait_for(
            lambda s: all(r["rows_done"] > 20 for r in s.get("ranks", [{"rows_done": 0}]))
        )
        pids = rank_pids(status)
        keeps = {raylet_of(pid) for pid in pids_named("ray::Coordinator")}
        assert keeps, "the coordinator was not found"
        victims = {rank: pid for rank, pid in pids.items() if raylet_of(pid) not in keeps}
        raylet = raylet_of(next(iter(victims.values())))
        victims = {rank: pid for rank, pid in victims.items() if raylet_of(pid) == raylet}
        flying = mock.state()["in_flight"]
        for pid in [raylet, *victims.values()]:  # a machine that loses its power
            os.kill(pid, signal.SIGKILL)
        code, result, err = running.result()
    assert code == 0, err
    lost = {rank["rank"] for rank in result["ranks"] if rank["losses"]}
    assert lost == set(victims), "the kill did not hit what it should"
    for rank in lost:
        with Journal.open(tmp_path / f"store-{rank}-of-4", read_only=True) as journal:
            with journal.reading() as connection:
                endings = [e for (e,) in connection.execute("SELECT ending FROM runs ORDER BY run")]
            assert endings == ["killed", "complete"]
            in_flight = len(list(journal.possibly_billed(in_flight=True)))
        assert 0 < in_flight <= flying
    counts = asked(mock)
    assert len(counts) == 1500, "a row was never asked"
    repeated = sum(counts.values()) - 1500
    assert 0 < repeated <= flying
    assert max(counts.values()) == 2
    assert result["answers_stored"] + result["from_cache"] == 1500
    statuses = mock.state()["statuses"]
    assert statuses.get("429", 0) <= 0.02 * sum(statuses.values())


def test_the_limit_is_used_and_held_in_sum(
    cluster: Any, teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = teacher("--latency", "0.1", "--rpm", "6000", "--hide-limits")
    limits = (
        "[teacher.limits]\nrequests_per_minute = 6000\nmax_concurrency = 40\n[sampling]\nmax_tokens = 64\n"
    )
    running = Fleet(write(tmp_path, mock, 1500, limits), "--address", cluster.address)
    begun = running.wait_for(lambda s: s.get("requests_sent", 0) > 100)
    first, at = mock.state()["admitted"], time.monotonic()
    while running.process.poll() is None and mock.state()["admitted"] < 1300:
        time.sleep(0.05)
    rate = (mock.state()["admitted"] - first) / (time.monotonic() - at)
    code, result, err = running.result()
    assert code == 0, err
    assert begun["ranks"][0]["share"] is None or begun["ranks"][0]["share"] <= 1
    state = mock.state()
    assert state["most_in_flight"] <= 40
    assert state["statuses"].get("429", 0) <= 0.01 * 1500
    assert rate >= 0.85 * 100
    # Two reports a second of each rank, and a few at its beginning and end.
    assert result["messages"] > 4 * 2


def test_a_signal_drains_all_ranks_and_the_same_command_resumes(
    cluster: Any, teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = teacher("--latency", "0.2")
    config = write(
        tmp_path, mock, 1200, "[teacher.limits]\nmax_concurrency = 32\n[sampling]\nmax_tokens = 64\n"
    )
    running = Fleet(config, "--address", cluster.address, "--ranks", 4)
    running.wait_for(lambda s: s.get("answers_stored", 0) > 100)
    running.process.send_signal(signal.SIGTERM)
    code, result, err = running.result()
    assert code == 143, err
    assert {rank["state"] for rank in result["ranks"]} == {"interrupted"}
    answered = mock.totals()["answers"]
    assert 100 < answered == result["answers_stored"] < 1200
    # A rank whose store is gone is not begun anew behind one's back.
    shutil.move(tmp_path / "store-2-of-4", tmp_path / "elsewhere")
    code, result, err = fleet(config, "--address", cluster.address)
    assert code == 5
    assert "does not lie on this machine" in result["ranks"][1]["error"]["message"]
    # The other ranks are done meanwhile; nothing was asked twice.
    assert [rank["ending"] for rank in result["ranks"] if rank["rank"] != 2] == ["complete"] * 3
    shutil.move(tmp_path / "elsewhere", tmp_path / "store-2-of-4")
    code, result, err = fleet(config, "--address", cluster.address)
    assert code == 0, err
    assert set(asked(mock).values()) == {1}
    assert mock.totals()["answers"] == 1200


def test_the_budget_is_spent_once_also_after_the_driver_was_killed(
    cluster: Any, teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = teacher("--latency", "0.2")
    config = write(tmp_path, mock, 1500, NINE_THOUSAND_TOKENS)
    running = Fleet(config, "--address", cluster.address)
    running.wait_for(lambda s: s.get("answers_stored", 0) > 150)
    running.process.kill()
    running.process.communicate()
    code, result, err = fleet(config, "--address", cluster.address)
    assert code == 10, err
    assert {rank["ending"] for rank in result["ranks"]} == {"budget"}
    spent = mock.totals()["total_tokens"]
    assert 150 * 13 < spent <= 9000
    with contextlib.ExitStack() as stack:
        stores = [tmp_path / f"store-{n}-of-4" for n in range(1, 5)]
        journals = [stack.enter_context(Journal.open(store, read_only=True)) for store in stores]
        billed = sum(len(list(journal.possibly_billed(in_flight=True))) for journal in journals)
    # What a kill left unanswered counts with its reservation; else less than one request is left.
    assert spent >= 9000 - 190 - 190 * billed


def test_a_lost_coordinator_drains_all_ranks_and_the_same_command_resumes(
    cluster: Any, teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    """Ranks that hear nothing send nothing; what was in flight is stored, and the budget holds over both."""
    mock = teacher("--latency", "0.2")
    config = write(tmp_path, mock, 1500, NINE_THOUSAND_TOKENS)
    before = set(pids_named("ray::Coordinator"))
    running = Fleet(config, "--address", cluster.address)
    running.wait_for(lambda s: s.get("answers_stored", 0) > 150)
    (coordinator,) = set(pids_named("ray::Coordinator")) - before
    os.kill(coordinator, signal.SIGKILL)
    code, _, err = running.result()
    assert code == 1, err
    assert "the coordinator was lost" in err
    assert "the same command resumes" in err
    paid = mock.totals()["answers"]
    stores = [tmp_path / f"store-{n}-of-4" for n in range(1, 5)]
    assert sum(Corpus.open(store).count() for store in stores) == paid
    assert not any(is_held(store) for store in stores)
    code, _, err = fleet(config, "--address", cluster.address)
    assert code == 10, err
    assert set(asked(mock).values()) == {1}
    assert 9000 - 190 <= mock.totals()["total_tokens"] <= 9000


def test_a_store_that_is_gone_is_fetched_from_its_mirror(
    cluster: Any, teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = teacher("--latency", "0.05")
    config = write(
        tmp_path,
        mock,
        400,
        f'[store]\nmirror = "{(tmp_path / "mirror").as_uri()}"\n[sampling]\nmax_tokens = 64\n',
    )
    code, result, err = fleet(config, "--address", cluster.address, "--ranks", 2)
    assert code == 0, err
    shutil.rmtree(tmp_path / "store-1-of-2")
    code, result, err = fleet(config, "--address", cluster.address)
    assert code == 0, err
    assert (result["requests_sent"], result["from_cache"]) == (0, 400)
    assert set(asked(mock).values()) == {1}


def test_terms_that_refuse_send_nothing(
    cluster: Any, teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = teacher()
    config = write(tmp_path, mock, 10)
    config.write_text(config.read_text().replace('terms = "mock-teacher"', 'terms = "openai"'))
    code, _, err = fleet(config, "--address", cluster.address)
    assert (code, mock.state()["received"]) == (77, 0), err
