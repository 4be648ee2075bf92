"""Files of a store are ours or refused: nothing is written through a link, and nothing waits for a FIFO."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.config import dotenv
from harvester.errors import ConfigError, HarvesterError, StoreError
from harvester.observe import timeline
from harvester.observe.report.prometheus import metrics_text
from harvester.observe.report.report import write_report
from harvester.observe.report.server import build_app
from harvester.observe.status import current_status, read_status, write_status
from harvester.run.control import client
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock, is_held, read_holder
from harvester.store.maintain.purge import purge_store
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.reader import Corpus
from harvester.store.shards import proved
from harvester.store.shards.seal import seal
from harvester.system import output_path, own_files
from harvester.terms.records import parse
from tests.harvester.store_rows import fill, key_of, open_store
from tests.hostile.runs import harvest
from tests.hostile.server import hostile_teacher


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with open_store(tmp_path / "store") as journal:
        fill(journal, range(5))
    return tmp_path / "store"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("do not touch")
    return path


def seal_all(store: Path) -> None:
    """What `harvester seal` does once the terms are asked."""
    with StoreLock(store, started_at=0), Journal.open(store) as journal:
        seal(journal, store, target_bytes=1 << 20, everything=True)


def write_dead_letters(store: Path) -> None:
    with Journal.open(store) as journal:
        journal.write_dead_letters(store)


WRITERS: dict[str, Callable[[Path], object]] = {
    "LOCK": seal_all,
    "status.json": lambda store: write_status(store, {"state": "running"}),
    "trace.jsonl": lambda store: timeline.TimelineWriter(store, "run").note({}, {}),
    "dead_letters.jsonl": write_dead_letters,
    "journal.db-wal": seal_all,
    "report.html": lambda store: write_report(store, store / "report.html"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link(name: str, store: Path, precious: Path) -> None:
    (store / name).unlink(missing_ok=True)
    (store / name).symlink_to(precious)
    message = "symbolic link"
    try:
        WRITERS[name](store)
    except HarvesterError as error:
        message = str(error)
    assert "symbolic link" in message
    assert precious.read_text() == "do not touch"


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_names_of_temporary_files_can_not_be_planted(kind: str, store: Path, precious: Path) -> None:
    planted = [f".{name}.tmp" for name in ("status.json", "dead_letters.jsonl", "trace.jsonl", "report.html")]
    for name in (*planted, f".report.html.{os.getpid()}.tmp"):
        if kind == "link":
            (store / name).symlink_to(precious)
        else:
            (store / name).mkdir()
    for name in WRITERS:
        WRITERS[name](store)
    assert precious.read_text() == "do not touch"
    assert read_status(store)["state"] == "running"


def test_a_quarantine_elsewhere_is_not_emptied(store: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "part-precious").touch()
    (store / "quarantine").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="not a folder of the store"):
        purge_store(store, None, "p1")
    assert (elsewhere / "part-precious").exists()


READERS: dict[str, Callable[[Path], object]] = {
    "status": current_status,
    "metrics": metrics_text,
    "report": lambda store: write_report(store, store.parent / "r.html"),
    "read": lambda store: sum(1 for _ in Corpus.open(store).samples()),
    "verify": lambda store: verify_with_bill(store, repair=False),
    "held": is_held,
    "seal": seal_all,
    "stop": lambda store: client.ask(store, "stop"),
}


@pytest.mark.parametrize(
    "name", ["LOCK", "status.json", "trace.jsonl", "journal.db", "journal.db-wal", "control.sock"]
)
def test_a_fifo_in_the_place_of_a_file_is_waited_for_by_nobody(name: str, store: Path) -> None:
    (store / name).unlink(missing_ok=True)
    os.mkfifo(store / name)

    def read_all() -> None:
        for reader in READERS.values():
            try:
                reader(store)
            except HarvesterError:
                continue

    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_a_fifo_in_the_place_of_a_shard_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal_all(store)
    monkeypatch.setattr(proved, "_proved", set())
    (shard,) = (store / "shards").glob("*.parquet")
    shard.unlink()
    os.mkfifo(shard)
    for name in ("report", "read"):
        with pytest.raises(StoreError, match="not a regular file"):
            READERS[name](store)


def test_an_endless_status_is_no_status(store: Path) -> None:
    (store / "status.json").symlink_to("/dev/zero")
    assert read_status(store) == {}


@pytest.mark.parametrize("name", [".env", "terms/x.toml", "permissions/x.toml", "harvest.toml"])
def test_a_fifo_in_the_place_of_a_configuration_is_named(name: str, tmp_path: Path) -> None:
    with hostile_teacher() as teacher:
        harvest(tmp_path, teacher.base_url, ["a"])
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        from tests.faults.bench import run

        exit_code, said = run(tmp_path / "harvest.toml")
    assert exit_code == 2
    assert "not a regular file" in said


def test_a_configuration_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("A=1\n")
    (tmp_path / ".env").symlink_to("real")
    assert dotenv.variables(tmp_path)["A"] == "1"


def test_another_users_file_is_not_written(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    for work in (seal_all, Journal.open, lambda store: StoreLock(store, started_at=0).__enter__()):
        with pytest.raises(StoreError, match="belongs to another user"):
            work(store)


def test_a_store_that_may_not_be_entered_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    def refuse(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "lstat", refuse)
    monkeypatch.setattr(Path, "stat", refuse)
    for name in ("status", "read"):
        with pytest.raises(StoreError, match="permission denied"):
            READERS[name](store)


def test_files_of_a_store_are_for_their_user_whatever_the_umask(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        with hostile_teacher() as teacher:
            harvest(tmp_path, teacher.base_url, ["a"])
        write_report(tmp_path / "store", tmp_path / "store" / "report.html")
        output_path.folder(tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "store").iterdir() if path.is_file()]
    assert len(files) >= 4
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        path.name: "0o600" for path in files
    }
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("how", ["removed", "replaced", "folder"])
def test_a_journal_that_is_removed_under_a_run_stops_it(how: str, store: Path, tmp_path: Path) -> None:
    with Journal.open(store) as journal:
        journal.require_free_space(0)
        if how == "folder":
            store.rename(tmp_path / "moved")
            store.mkdir()
        else:
            (store / "journal.db").unlink()
            if how == "replaced":
                (store / "journal.db").touch()
        with pytest.raises(StoreError, match="removed or replaced"):
            journal.require_free_space(0)
        if how == "folder":
            store.rmdir()
            (tmp_path / "moved").rename(store)


@pytest.mark.slow
def test_a_write_waits_for_another_program_that_holds_the_lock(store: Path) -> None:
    other = sqlite3.connect(store / "journal.db", isolation_level=None, check_same_thread=False)
    with Journal.open(store) as journal:
        other.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=lambda: fill(journal, [7]))
        waiting.start()
        waiting.join(5.5)  # the wait of earlier versions
        assert waiting.is_alive()
        other.execute("ROLLBACK")
        waiting.join()
        assert len(journal.look_up([key_of(7)])) == 1
    other.close()


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", [DEEP, '{"pid": 1e400, "host": "x"}', "5", "\x00", '{"pid": {}}'])
def test_an_odd_lock_or_status_stops_no_command(content: str, store: Path) -> None:
    with StoreLock(store, started_at=0):
        (store / "LOCK").write_text(content.replace('"x"', json.dumps(os.uname().nodename)))
        (store / "status.json").write_text(content)
        assert isinstance(read_holder(store / "LOCK"), dict)
        assert current_status(store)["alive"]


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"at": 1e300}',
        '{"at": 5, "stored": [], "waiting": 5, "microusd": "x", "run_id": {}}',
        '{"at": NaN}',
        '{"at": true, "stored": true}',
        '{"at": 5, "stored": 1e999, "rss_bytes": -1e308}',
    ],
    ids=range(6),
)
def test_odd_points_of_the_timeline_break_no_report(line: str, store: Path) -> None:
    good = json.dumps({"at": 6.0, "run_id": "r", "stored": 1})
    (store / "trace.jsonl").write_text(f"{line}\n{good}\n{line}\n")
    write_report(store, store / "report.html")
    assert any(point.get("stored") == 1 for point in timeline.read_timeline(store))


@pytest.mark.parametrize("text", ["x = " + "9" * 10_000, "x = " + DEEP, "[[record]]\nid = " + DEEP])
def test_odd_terms_records_are_named(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text, "x.toml")


SITES = [(b"cross-site", 403), (b"same-site", 403), (b"none", 200), (b"same-origin", 200), (None, 200)]


@pytest.mark.parametrize(("site", "status"), SITES)
def test_pages_of_other_sites_learn_nothing_from_the_view(
    site: bytes | None, status: int, store: Path
) -> None:
    app = build_app(store, "token")
    headers = [(b"host", b"127.0.0.1:1"), *([(b"sec-fetch-site", site)] if site else [])]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/token/samples",
        "query_string": b"q=1",
        "headers": headers,
    }
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == status


def test_a_websocket_is_refused(store: Path) -> None:
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(build_app(store, "token")({"type": "websocket", "headers": []}, receive, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_temporary_files_of_killed_writers_are_removed_by_the_next_holder(store: Path) -> None:
    left = store / ".status.json.0123456789abcdef.tmp"
    left.touch()
    (store / ".mine.tmp").touch()
    with StoreLock(store, started_at=0):
        assert not left.exists()
    assert (store / ".mine.tmp").exists()
    with pytest.raises(own_files.ForeignFileError):
        own_files.read_bytes(store / "journal.db", 10)


def swap_for_link(folder: Path, target: Path) -> None:
    """Put a link in the place of a folder, as somebody who may write beside it can."""
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(target)


@pytest.mark.parametrize("name", ["LOCK", "status.json", "dead_letters.jsonl", "trace.jsonl"])
def test_a_store_that_is_swapped_while_it_is_held_is_not_written_elsewhere(
    name: str, store: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in ("LOCK", "status.json", "dead_letters.jsonl", "trace.jsonl"):
        (elsewhere / file).write_text("do not touch")
    with StoreLock(store, started_at=0), Journal.open(store) as journal:
        swap_for_link(store, elsewhere)
        if name != "LOCK":
            {**WRITERS, "dead_letters.jsonl": journal.write_dead_letters}[name](store)
        with pytest.raises(StoreError, match="removed or replaced"):
            journal.require_free_space(0)
        store.unlink()
        (tmp_path / "moved").rename(store)
    assert {path.read_text() for path in elsewhere.iterdir()} == {"do not touch"}
    assert len(list(elsewhere.iterdir())) == 4


def test_a_link_in_the_place_of_a_folder_of_the_store_is_refused(store: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (store / "canary").symlink_to(elsewhere)
    with StoreLock(store, started_at=0), pytest.raises(own_files.ForeignFileError, match="not a folder of"):
        own_files.append(store / "canary" / "rounds.jsonl", b"{}")
    assert list(elsewhere.iterdir()) == []


def test_a_folder_that_is_swapped_between_writing_and_naming_gets_nothing(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    with own_files.replacing(folder / "status.json") as file:
        file.write(b"new")
        swap_for_link(folder, elsewhere)
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in (tmp_path / "moved").iterdir()] == ["status.json"]
