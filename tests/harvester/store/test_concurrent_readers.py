"""Read `shards/` with other programs during a run: no exception, no torn file, no row twice or missing."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from harvester.errors import StoreError, StoreLocked
from harvester.mock_teacher.running import RunningMock
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.maintain import seal_task
from harvester.store.maintain.purge import purge_store
from harvester.store.reader import Corpus
from harvester.store.shards import compact, rewrite, swap
from harvester.store.shards.manifest import read_manifest
from harvester.store.shards.schema import SCHEMA
from harvester.store.shards.seal import finish_interrupted, seal
from harvester.store.shards.swap import ReaderWatch
from tests.harvester.killed_runs import KilledRuns, quick_folder, write_config
from tests.harvester.store_rows import fill, key_of, open_store

MIB = 1024 * 1024
# For how long nobody must read before a merge beside the readers of this module.
QUIET_S = 0.25


def by_arrow(folder: Path) -> list[str]:
    return pq.read_table(folder, columns=["key"])["key"].to_pylist()


def by_duckdb(folder: Path) -> list[str]:
    duckdb = pytest.importorskip("duckdb", reason="a reader that is not installed here")
    with duckdb.connect() as connection:
        rows = connection.sql(f"SELECT key FROM read_parquet('{folder}/*.parquet')").fetchall()
    return [key for (key,) in rows]


def by_polars(folder: Path) -> list[str]:
    polars = pytest.importorskip("polars", reason="a reader that is not installed here")
    return polars.scan_parquet(f"{folder}/*.parquet").select("key").collect()["key"].to_list()


def by_pandas(folder: Path) -> list[str]:
    pandas = pytest.importorskip("pandas", reason="a reader that is not installed here")
    return pandas.read_parquet(folder, columns=["key"])["key"].tolist()


def file_by_file(folder: Path) -> list[str]:
    """As `datasets` reads: the names first, then one file after the other."""
    keys: list[str] = []
    for path in sorted(folder.glob("*.parquet")):
        with path.open("rb") as handle:
            for batch in pq.ParquetFile(handle).iter_batches():
                keys += batch.column("key").to_pylist()
    return keys


READERS = [by_arrow, by_duckdb, by_polars, by_pandas, file_by_file]


class Looker(threading.Thread):
    """Reads the folder with one reader after the other, pausing now and then, until told to end.

    A file that was listed must exist for a reader that is done within `quiet_s` seconds. One that took
    longer, on a busy machine, reads again.
    """

    def __init__(self, folder: Path, quiet_s: float) -> None:
        super().__init__()
        self._folder = folder
        self._quiet_s = quiet_s
        self._rng = random.Random(4)
        self.ended = threading.Event()
        self.enough = threading.Event()  # it has read 20 times, or something is wrong
        self.seen: set[str] = set()
        self.rounds = 0
        self.trouble: list[str] = []
        self.readers = [reader for reader in READERS if is_there(reader)]

    def run(self) -> None:
        for reader in itertools.cycle(self.readers):
            if self.ended.wait(self._rng.choice((0, 0, 0.01, 2 * self._quiet_s))) or self.trouble:
                return
            if any(self._folder.glob("*.parquet")):
                self._look(reader)
            if self.rounds > 20 or self.trouble:
                self.enough.set()

    def _look(self, reader: Callable[[Path], list[str]]) -> None:
        began = time.monotonic()
        try:
            keys = reader(self._folder)
        except Exception as error:
            if time.monotonic() - began < self._quiet_s or "No such file" not in str(error):
                self.trouble.append(f"{reader.__name__}: {error!r}")
            return
        if len(keys) != len(set(keys)):
            self.trouble.append(f"{reader.__name__}: rows twice")
        if not self.seen <= set(keys):
            self.trouble.append(f"{reader.__name__}: {len(self.seen - set(keys))} rows gone")
        self.seen |= set(keys)
        self.rounds += 1


def is_there(reader: Callable[[Path], list[str]]) -> bool:
    name = reader.__name__.removeprefix("by_")
    return reader in {by_arrow, file_by_file} or importlib.util.find_spec(name) is not None


@pytest.mark.slow
def test_readers_beside_kills_sealing_and_merging_see_a_growing_set(
    mock_teacher: Callable[..., RunningMock],
) -> None:
    mock = mock_teacher(latency_s=0.02)
    with quick_folder() as folder:
        config = write_config(folder, mock.base_url, 2000)
        config.write_text(config.read_text().replace("shard_mib = 0.2", "shard_mib = 4"))  # all are small
        store = folder / "store"
        looker = Looker(store / "shards", QUIET_S)
        rng = random.Random(7)
        killed = 0
        with KilledRuns(config, QUIET_S) as runs:
            looker.start()
            points = itertools.cycle(
                ("-", "shards.after_rename:2", "compaction.before_commit:1", "compaction.after_exchange:1")
            )
            while killed < 4:
                status, _ = runs.run(rng.uniform(0.5, 1.2), next(points))
                if status == 0:
                    break
                killed += 1
            assert runs.run(600)[0] == 0
            assert looker.enough.wait(600)
            looker.ended.set()
            looker.join()
            # On a busy machine the folder may never have been quiet: what is left is merged now.
            assert runs.run(600)[0] == 0
        assert looker.trouble == []
        assert killed >= 2
        with Journal.open(store, read_only=True) as journal:
            sealed, files = journal.next_shard() - 1, len(read_manifest(journal))
        assert files < sealed
        assert Corpus.open(store).verify() == []
        for reader in looker.readers:
            assert len(reader(store / "shards")) == 2000


def make(store: Path, parts: int = 4, rows: int = 20) -> None:
    with open_store(store) as journal:
        for part in range(parts):
            fill(journal, range(part * rows, (part + 1) * rows))
            seal(journal, store, target_bytes=MIB, everything=True)


def files(store: Path) -> list[str]:
    return sorted(path.name for path in (store / "shards").glob("*.parquet"))


@contextmanager
def merge_until_ready(
    journal: Journal, store: Path
) -> Iterator[tuple[Generator[str | None, None, int], ReaderWatch]]:
    """A merge that is about to exchange the folders, and its watch for readers."""
    with closing(ReaderWatch(store / "shards", seal_task.QUIET_S)) as readers:
        steps = compact.compact_steps(journal, store, target_bytes=MIB, readers=readers)
        while next(steps) is not rewrite.READY:
            pass
        readers.renew()
        yield steps, readers


def listed(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def die_after_exchange(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge, and stop as a kill would between the exchange and the commit."""

    def die(name: str) -> None:
        if name == "compaction.after_exchange":
            raise OSError(5, "cut")

    with Journal.open(store) as journal, monkeypatch.context() as patch:
        patch.setattr(rewrite, "reach", die)
        with pytest.raises(OSError, match="cut"):
            list(compact.compact_steps(journal, store, target_bytes=MIB))


def leftovers(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if path.name.startswith(".shards"))


def test_a_merge_waits_for_readers_of_ours_and_leaves_nothing_behind(tmp_path):
    make(tmp_path)
    before = files(tmp_path)
    with Journal.open(tmp_path) as journal:
        reader = Corpus.open(tmp_path).samples(["key"])  # one of ours stays
        first = next(reader).key
        assert list(compact.compact_steps(journal, tmp_path, target_bytes=MIB)) != []
        assert files(tmp_path) == before
        assert len({first, *(sample.key for sample in reader)}) == 80
        list(compact.compact_steps(journal, tmp_path, target_bytes=MIB))
    assert len(files(tmp_path)) == 1
    assert leftovers(tmp_path) == []
    assert sorted(by_arrow(tmp_path / "shards")) == sorted(key_of(n).hex() for n in range(80))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds on the clock of the watch for readers; a test moves it."""
    seconds = [100.0]
    monkeypatch.setattr(swap, "time", SimpleNamespace(monotonic=lambda: seconds[0], sleep=time.sleep))
    return seconds


@pytest.mark.parametrize(
    ("before_s", "after_s", "merges"),
    [(60, 2.9, False), (2.9, 0, False), (0, 3, True)],
    ids=["read 2.9 s ago", "read just now", "read 3 s ago"],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_merge_waits_until_no_program_has_read_for_3_s(tmp_path, clock, reader, before_s, after_s, merges):
    make(tmp_path)
    names = listed(tmp_path / "shards")
    with Journal.open(tmp_path) as journal, merge_until_ready(journal, tmp_path) as (steps, readers):
        clock[0] += before_s
        reader(tmp_path / "shards")
        readers.is_quiet()  # as the task does now and then
        clock[0] += after_s
        assert next(steps, "end") == "end"
    assert (listed(tmp_path / "shards") != names) == merges
    assert all(path.exists() for path in names) != merges
    assert leftovers(tmp_path) == []
    assert len(set(by_arrow(tmp_path / "shards"))) == 80


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanged at once", "three renames"])
def test_a_reader_that_lists_the_folder_just_before_an_exchange_finds_its_files(
    tmp_path, clock, monkeypatch, at_once
):
    make(tmp_path)
    names: list[Path] = []
    rename = swap._renamed_at_once

    def listed_before(folder: Path, staged: Path) -> bool:
        if not names:
            names.extend(listed(folder))
        return at_once and rename(folder, staged)

    monkeypatch.setattr(swap, "_renamed_at_once", listed_before)
    with Journal.open(tmp_path) as journal:
        with merge_until_ready(journal, tmp_path) as (steps, _):
            clock[0] += 60
            assert next(steps, "end") == "end"
        assert len(names) == 4
        assert listed(tmp_path / "shards") == names
        assert leftovers(tmp_path) == []
        assert len({key for path in names for key in pq.read_table(path)["key"].to_pylist()}) == 80
        with merge_until_ready(journal, tmp_path) as (steps, _):
            clock[0] += 60
            list(steps)
    assert len(files(tmp_path)) == 1
    assert Corpus.open(tmp_path).verify() == []


@pytest.mark.parametrize(
    ("reads", "merges"), [(99, False), (11, True)], ids=["never pauses", "pauses at last"]
)
def test_a_merge_is_given_up_beside_a_reader_that_never_pauses(tmp_path, clock, monkeypatch, reads, merges):
    make(tmp_path)
    names = listed(tmp_path / "shards")
    left = iter(range(reads))

    async def sleep(seconds: float) -> None:
        clock[0] += seconds
        if next(left, None) is not None:
            by_arrow(tmp_path / "shards")

    monkeypatch.setattr(seal_task, "asyncio", SimpleNamespace(sleep=sleep))
    with closing(GroupCommit(Journal.open(tmp_path))) as writer:
        asyncio.run(seal_task.merge(tmp_path, writer, MIB, tries=3))
    assert (listed(tmp_path / "shards") != names) == merges
    assert all(path.exists() for path in names) != merges


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_that_lists_the_folder_after_a_kill_finds_its_files_after_the_next_start(
    tmp_path, monkeypatch, reader
):
    make(tmp_path)
    die_after_exchange(tmp_path, monkeypatch)
    names = listed(tmp_path / "shards")
    assert len(names) == 1
    with Journal.open(tmp_path) as journal:
        finish_interrupted(journal, tmp_path)
    assert listed(tmp_path / "shards") == names
    assert leftovers(tmp_path) == []
    assert len(set(reader(tmp_path / "shards"))) == 80


@pytest.mark.parametrize("cut", range(4))
def test_an_exchange_without_the_kernels_help_survives_being_cut_anywhere(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(swap, "_renamed_at_once", lambda entry, other: False)
    make(tmp_path)
    rename, renames = Path.rename, 0

    def cutting(self: Path, target: Path) -> Path:
        nonlocal renames
        if self.name in {"shards", swap.STAGED, swap.ASIDE}:
            if renames == cut:
                raise OSError(5, "cut")
            renames += 1
        return rename(self, target)

    with Journal.open(tmp_path) as journal, monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cutting)
        with pytest.raises(StoreError, match="can't read or write the disk") if cut < 3 else nullcontext():
            list(compact.compact_steps(journal, tmp_path, target_bytes=MIB))
    assert renames == cut
    with Journal.open(tmp_path) as journal:
        list(compact.compact_steps(journal, tmp_path, target_bytes=MIB))
    assert len(files(tmp_path)) == 1
    assert sorted(by_arrow(tmp_path / "shards")) == sorted(key_of(n).hex() for n in range(80))
    assert Corpus.open(tmp_path).verify() == []


# --- without our code -------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
def test_a_corpus_loads_without_our_code(tmp_path, reader):
    make(tmp_path)
    assert sorted(reader(tmp_path / "shards")) == sorted(key_of(n).hex() for n in range(80))


def test_datasets_loads_every_column_of_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets", reason="a reader that is not installed here")
    make(tmp_path / "store")
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "store/shards/*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows.column_names == SCHEMA.names
    assert rows.num_rows == 80
    assert {row["completion"] for row in rows} == {str(n + 1) for n in range(80)}
    assert rows[0]["messages"][-1]["content"].startswith("What is")


def test_reading_is_never_refused_for_long(tmp_path):
    """A reader that comes while an exchange is under way waits for its end and sees what came of it."""
    make(tmp_path)
    result: list[int] = []
    reader = threading.Thread(target=lambda: result.append(len(list(Corpus.open(tmp_path).samples(["key"])))))
    with swap.if_no_reader(tmp_path / "shards") as free:
        assert free
        reader.start()
        time.sleep(0.05)
        assert result == []
    reader.join(240)
    assert result == [80]


def is_held(folder: Path) -> bool:
    """Whether a reader that comes now has to wait."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_no_reader_of_ours_comes_between_the_question_and_the_commit(tmp_path, monkeypatch):
    make(tmp_path)
    seen: dict[str, bool] = {}
    monkeypatch.setattr(rewrite, "reach", lambda name: seen.update({name: is_held(tmp_path / "shards")}))
    with Journal.open(tmp_path) as journal:
        list(compact.compact_steps(journal, tmp_path, target_bytes=MIB))
    assert seen == {
        "compaction.before_exchange": False,
        "compaction.after_exchange": True,
        "compaction.before_commit": True,
        "compaction.after_commit": True,
    }
    assert not is_held(tmp_path / "shards")


def test_a_purge_waits_for_a_reader_and_gives_up_with_a_word(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(rewrite, "PATIENCE_S", 0.0)
    reader = Corpus.open(tmp_path).samples(["key"])
    next(reader)
    with pytest.raises(StoreLocked, match="reading these shards") as caught:
        purge_store(tmp_path, key_of(3).hex(), None)
    assert caught.value.exit_code == 75
    assert sum(1 for _ in reader) == 79  # and it read on to its end
    reader = Corpus.open(tmp_path).samples(["key"])
    next(reader)
    monkeypatch.setattr(rewrite, "PATIENCE_S", 20.0)
    monkeypatch.setattr(swap.time, "sleep", lambda _: reader.close())
    assert purge_store(tmp_path, key_of(3).hex(), None) == 1
    assert reader.gi_frame is None  # it was there when the purge came
    assert len(by_arrow(tmp_path / "shards")) == 79


def test_what_a_kill_left_of_a_merge_stays_for_the_reader_that_looks_there(tmp_path, monkeypatch):
    make(tmp_path)
    die_after_exchange(tmp_path, monkeypatch)
    with Journal.open(tmp_path) as journal:
        reader = Corpus.open(tmp_path).samples(["key"])
        first = next(reader).key
        rewrite.finish_interrupted_rewrite(journal, tmp_path)
        assert len(read_manifest(journal)) == 1
        assert len({first, *(sample.key for sample in reader)}) == 80
        rewrite.finish_interrupted_rewrite(journal, tmp_path)
    assert not (tmp_path / swap.STAGED).exists()
    assert len({sample.key for sample in Corpus.open(tmp_path).samples(["key"])}) == 80


def test_a_merge_keeps_the_folders_mode_and_whatever_else_lies_in_it(tmp_path):
    make(tmp_path)
    folder = tmp_path / "shards"
    folder.chmod(0o750)
    (folder / ".notes").write_text("mine")
    (folder / "README").symlink_to("nowhere")
    (folder / ".git" / "x").mkdir(parents=True)
    (folder / ".part-00000009.tmp").write_text("half a shard")
    with Journal.open(tmp_path) as journal:
        list(compact.compact_steps(journal, tmp_path, target_bytes=MIB))
    names = {path.name for path in folder.iterdir()}
    assert len(files(tmp_path)) == 1
    assert names == {".notes", "README", ".git", *files(tmp_path)}
    assert (folder / ".notes").read_text() == "mine"
    assert (folder / ".git" / "x").is_dir()
    assert folder.stat().st_mode & 0o777 == 0o750
