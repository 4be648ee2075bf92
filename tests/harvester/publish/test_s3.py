"""Publish to and read from a real S3 server, with kills, broken connections and refusals on the way."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harvester.store.published import local_store
from tests.commands import Command, run
from tests.harvester.publish.published_store import grow, make_store, publish, rows, share
from tests.s3_server import BUCKET, ENVIRONMENT, FaultProxy, S3Server, refused, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running(tmp_path_factory.mktemp("s3") / "moto.log") as started:
        yield started


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 30 rows in three shards."""
    folder = make_store(tmp_path / "run" / "store", range(30), shards=3)
    share(folder, 4, "second")
    return folder


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Callable[[Callable[[str, str], str]], FaultProxy]]:
    opened: list[FaultProxy] = []

    def start(rule: Callable[[str, str], str]) -> FaultProxy:
        opened.append(FaultProxy(server.port, rule))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def key_prefix(tmp_path: Path) -> str:
    return f"{tmp_path.name}/corpus"


def url_of(tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{key_prefix(tmp_path)}"


def shards_there(server: S3Server, tmp_path: Path) -> list[str]:
    return server.names(f"{key_prefix(tmp_path)}/shards/")


def has_manifest(server: S3Server, tmp_path: Path) -> bool:
    return f"{key_prefix(tmp_path)}/publication.json" in server.names()


def test_all_goes_there_and_comes_back(server: S3Server, store: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    facts, done = publish(store, url)
    assert done.returncode == 0, done.stderr
    assert (facts["rows"], facts["uploaded"], facts["is_new"]) == (30, 8, True)
    copy = local_store(url)
    assert rows(copy) == rows(store)
    manifest = json.loads(server.get(f"{key_prefix(tmp_path)}/publication.json"))
    assert [len(server.get(f"{key_prefix(tmp_path)}/{each['name']}")) for each in manifest["shards"]] == [
        each["size_bytes"] for each in manifest["shards"]
    ]
    facts, _ = publish(store, url)
    assert (facts["uploaded"], facts["is_new"]) == (0, False)
    exported = run("harvester", ["export", url, tmp_path / "out", "--json"])
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["rows"] == 31
    toml = tmp_path / "curate.toml"
    toml.write_text(f'corpus = "{url}"\nout = "curated"\n')
    curated = run("harvester", ["curate", toml, "--json"])
    assert json.loads(curated.stdout)["kept"] == 31, curated.stderr


# `publish.amid_upload` lies between the parts of an object, `after_upload` before it is read back.
STEPS = [
    "publish.amid_upload:4",
    "publish.after_upload:2",
    "publish.after_object:5",
    "publish.before_manifest:1",
    "publish.after_upload:9",
    "publish.after_manifest:1",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_is_made_good(server: S3Server, store: Path, tmp_path: Path, step: str) -> None:
    url = url_of(tmp_path)
    _, killed = publish(store, url, environment={"HARVESTER_FAILPOINT": step})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    is_there = step in {"publish.after_upload:9", "publish.after_manifest:1"}
    assert has_manifest(server, tmp_path) == is_there  # it is the last of nine objects
    before = set(server.names(key_prefix(tmp_path)))
    facts, done = publish(store, url)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(server.get(f"{key_prefix(tmp_path)}/publication.json"))
    named = [each["name"] for each in (*manifest["shards"], manifest["asks"], *manifest["files"])]
    whole = [name for name in named if f"{key_prefix(tmp_path)}/{name}" in before]
    assert facts["uploaded"] == len(named) - len(whole)  # what was whole was not uploaded again
    assert rows(local_store(url)) == rows(store)
    grow(store, range(30, 33))
    _, killed = publish(store, url, environment={"HARVESTER_FAILPOINT": "publish.before_manifest"})
    assert killed.returncode == -signal.SIGKILL
    assert len(rows(local_store(url))) == 31  # what was published before is still there, whole
    _, done = publish(store, url)
    assert done.returncode == 0, done.stderr
    assert rows(local_store(url)) == rows(store)


@pytest.mark.parametrize("fault", ["500", "cut", "cut upload"])
def test_a_fault_that_passes_is_retried(
    store: Path, tmp_path: Path, proxy: Callable[..., FaultProxy], fault: str
) -> None:
    left = [2]

    def rule(method: str, path: str) -> str:
        if method == "PUT" and "/shards/" in path and left[0]:
            left[0] -= 1
            return fault
        return ""

    broken = proxy(rule)
    _, done = publish(store, url_of(tmp_path), environment=broken.environment)
    assert len(broken.fired) == 2
    assert done.returncode == 0, done.stderr
    assert rows(local_store(url_of(tmp_path))) == rows(store)


def test_a_server_that_fails_on_leaves_no_manifest(
    server: S3Server, store: Path, tmp_path: Path, proxy: Callable[..., FaultProxy]
) -> None:
    broken = proxy(lambda method, path: "500" if method == "PUT" and "/papers/" in path else "")
    _, done = publish(store, url_of(tmp_path), environment=broken.environment)
    assert done.returncode == 5
    assert "error[remote_store]" in done.stderr
    assert "Traceback" not in done.stderr
    assert broken.fired
    assert not has_manifest(server, tmp_path)
    _, done = publish(store, url_of(tmp_path))
    assert done.returncode == 0
    assert rows(local_store(url_of(tmp_path))) == rows(store)


def test_an_object_that_is_truncated_there_is_uploaded_again(
    server: S3Server, store: Path, tmp_path: Path, proxy: Callable[..., FaultProxy]
) -> None:
    """Between upload and read back the server loses half of a shard: once, or whenever it is looked at."""

    def losing(times: int) -> FaultProxy:
        left = [times]

        def rule(method: str, path: str) -> str:
            name = path.split("?")[0].removeprefix(f"/{BUCKET}/")
            if method == "HEAD" and "/shards/" in path and left[0]:
                left[0] -= 1
                server.put(name, server.get(name)[:-100])
                return " "  # forwarded
            return ""

        return proxy(rule)

    once = losing(1)
    _, done = publish(store, url_of(tmp_path), environment=once.environment)
    assert len(once.fired) == 1
    assert done.returncode == 0, done.stderr
    assert rows(local_store(url_of(tmp_path))) == rows(store)
    always = losing(100)
    _, done = publish(store, f"{url_of(tmp_path)}-other", environment=always.environment)
    assert len(always.fired) >= 2
    assert done.returncode == 5
    assert "read back" in done.stderr
    assert f"{key_prefix(tmp_path)}-other/publication.json" not in server.names()


def test_the_server_dies_in_the_middle(store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "second.log") as own:

        def rule(method: str, path: str) -> str:
            if method == "PUT" and "/papers/" in path:
                own.kill()
            return ""

        dying = FaultProxy(own.port, rule)
        _, done = publish(store, url_of(tmp_path), environment=dying.environment)
        dying.close()
        assert refused(own.port)
        assert done.returncode == 5
        assert "error[remote_store]" in done.stderr
        own.start()  # without any object: it held them in memory
        _, done = publish(store, url_of(tmp_path), environment=own.environment)
        assert done.returncode == 0, done.stderr


def test_a_slow_server_is_waited_for(store: Path, tmp_path: Path, proxy: Callable[..., FaultProxy]) -> None:
    slow = proxy(lambda method, path: "slow" if method == "PUT" else "")
    _, done = publish(store, url_of(tmp_path), environment=slow.environment)
    assert done.returncode == 0, done.stderr
    assert len(slow.fired) == 9


def test_a_bucket_that_is_not_there(store: Path) -> None:
    _, done = publish(store, "s3://no-such-bucket/x")
    assert done.returncode == 5
    assert "no such bucket" in done.stderr
    read = run("harvester", ["export", "s3://no-such-bucket/x", "out"])
    assert read.returncode == 5
    assert "no such bucket" in read.stderr


def test_no_permission(store: Path, tmp_path: Path, proxy: Callable[..., FaultProxy]) -> None:
    writing = proxy(lambda method, path: "403" if method == "PUT" else "")
    _, done = publish(store, url_of(tmp_path), environment=writing.environment)
    assert writing.fired
    assert done.returncode == 5
    assert "ACCESS_DENIED" in done.stderr
    assert "right" in done.stderr
    nothing = proxy(lambda method, path: "403")
    for words in (["publish", store, url_of(tmp_path)], ["export", url_of(tmp_path), tmp_path / "out"]):
        done = run("harvester", words, environment=nothing.environment)
        assert done.returncode == 5
        assert "ACCESS_DENIED" in done.stderr
        assert "Traceback" not in done.stderr
        assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in done.stderr


def test_a_reader_names_what_is_wrong_there(server: S3Server, store: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    publish(store, url)
    first, second, third = shards_there(server, tmp_path)
    good = server.get(first)
    server.put(first, good[:-10])
    server.delete(second)
    server.put(third, b"x" * len(server.get(third)))
    _, done = publish(store, url)
    assert done.returncode == 1
    for name, what in ((first, "has changed"), (second, "is missing"), (third, "has changed")):
        assert f"{name.rsplit('/', 1)[-1]} {what}" in done.stderr
    done = run("harvester", ["export", url, tmp_path / "out"])
    assert done.returncode == 5
    assert "not what was published" in done.stderr or "torn" in done.stderr
    _, done = publish(store, url, "--repair")
    assert done.returncode == 0, done.stderr
    assert server.get(first) == good
    assert rows(local_store(url)) == rows(store)


def test_two_publishers_and_a_reader_at_once(server: S3Server, store: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    publish(store, url)
    grow(store, range(30, 40))
    both = [Command("harvester", ["publish", store, url]) for _ in range(2)]
    deadline = time.monotonic() + 240
    while any(command.poll() is None for command in both):
        assert len(rows(local_store(url))) in {31, 41}
        assert time.monotonic() < deadline
    for command in both:
        out, err = command.communicate()
        assert command.returncode == 0, (out, err)
    assert rows(local_store(url)) == rows(store)
