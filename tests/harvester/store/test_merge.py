"""Merge stores: each key once, ledgers added, refusals by name, kills at every step, nothing done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harvester.cli import main
from harvester.config.shard import Shard
from harvester.errors import ConfigError, StoreLocked
from harvester.store import paths
from harvester.store.journal.checksums import updating_checksum
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.maintain.adopt import adopt
from harvester.store.maintain.merge import merge
from harvester.store.maintain.purge import purge_store
from harvester.store.reader import Corpus
from harvester.store.shards.seal import seal
from tests.harvester.store_rows import ENDPOINT, answer, intent, key_of, open_store, prompt_of, verified
from tests.journey.run_process import harvester


def filled(folder: Path, numbers: range, run_id: str, *, shards: int = 1, **changes: Any) -> Path:
    with open_store(folder, run_id=run_id, **changes) as journal:
        size = -(-len(numbers) // shards)
        for start in range(0, len(numbers), size):
            add(journal, folder, numbers[start : start + size], run_id)
    return folder


def add(journal: Journal, folder: Path, numbers: range, run_id: str, **changes: Any) -> None:
    first = journal.next_attempt_id()
    pairs = list(enumerate(numbers, start=first))
    journal.apply([intent(number, run_id, attempt) for attempt, number in pairs])
    journal.apply([answer(number, attempt_id=attempt, **changes) for attempt, number in pairs])
    seal(journal, folder, target_bytes=1 << 30, everything=True)


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    """Three stores of two sealed files each, and no answer in two of them."""
    return [
        filled(tmp_path / f"store-{n}", range(20 * n, 20 * n + 20), f"run-{n}", shards=2) for n in range(3)
    ]


def keys_in(store: Path) -> list[str]:
    return sorted(row.key for row in Corpus.open(store).samples(["key"]))


def totals(store: Path) -> tuple[int, int, int, int]:
    with Journal.open(store, read_only=True) as journal:
        counts = journal.totals()
        return counts.answers, counts.copied, counts.paid_twice, counts.cost_microusd


def test_all_comes_along_and_a_second_call_does_nothing(stores: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged = merge(stores, out)
    assert (merged.answers, merged.shards, merged.repeated, merged.was_there) == (60, 6, 0, False)
    assert keys_in(out) == sorted(key_of(number).hex() for number in range(60))
    assert [lineage.run_id for lineage in Corpus.open(out).lineages()] == ["run-0", "run-1", "run-2"]
    assert totals(out) == (60, 0, 0, 420)
    with Journal.open(out, read_only=True) as journal:
        assert journal.totals().held_outcomes == {"ok": 60}
    facts, findings = verified(out, repair=False)
    assert findings == 0, facts
    names = sorted(path.name for path in (out / paths.SHARDS).iterdir())
    again = merge(stores, out)
    assert (again.answers, again.was_there) == (60, True)
    assert sorted(path.name for path in (out / paths.SHARDS).iterdir()) == names
    # A store that is purged later takes nothing from the other.
    purge_store(stores[0], key_of(1).hex(), None)
    assert verified(out, repair=False)[1] == 0
    with pytest.raises(ConfigError, match="is not the merge of these stores as they are now"):
        merge(stores, out)


def test_a_key_of_two_stores_is_there_once_and_its_prompts_both(stores: list[Path], tmp_path: Path) -> None:
    with open_store(stores[1], run_id="run-9") as journal:
        add(journal, stores[1], range(3, 5), "run-9", prompt=prompt_of(500), cost_microusd=100)
    out = tmp_path / "out"
    merged = merge(stores, out)
    assert (merged.answers, merged.repeated) == (60, 2)
    rows = [(row.key, row.prompt_id, row.run_id) for row in Corpus.open(out).samples()]
    of_three = sorted(row[1:] for row in rows if row[0] == key_of(3).hex())
    assert of_three == [("p3", "run-0"), ("p500", "run-0")]
    with Journal.open(out, read_only=True) as journal:
        counts = journal.totals()
    assert (counts.answers, counts.paid_twice, counts.cost_microusd) == (60, 2, 620)
    assert sum(counts.held_outcomes.values()) == 60
    facts, findings = verified(out, repair=False)
    assert findings == 0, facts


def test_what_was_purged_or_is_doubtful_is_no_finding(stores: list[Path], tmp_path: Path) -> None:
    purge_store(stores[0], key_of(1).hex(), None)
    with open_store(stores[2], run_id="run-8") as journal:
        journal.apply([intent(77, "run-8", journal.next_attempt_id())])
    out = tmp_path / "out"
    assert merge(stores, out).answers == 59
    facts, findings = verified(out, repair=False)
    assert (findings, len(facts["possibly_billed"])) == (0, 1)
    with Journal.open(out) as journal:
        assert journal.next_attempt_id() > 61
        assert (journal.totals().held, journal.totals().held_outcomes) == (59, {"ok": 59})
    assert verified(merge_into_third(stores, out, tmp_path), repair=False)[1] == 0


def merge_into_third(stores: list[Path], out: Path, root: Path) -> Path:
    """Merge a merged store with one that is part of it, and with a new one."""
    new = filled(root / "late", range(100, 110), "run-late")
    third = root / "third"
    merged = merge([out, stores[1], new], third)
    assert (merged.answers, merged.repeated) == (69, 20)
    assert totals(third)[:3] == (70, 0, 0)  # one of them was purged
    return third


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_id": "http://b/v1|mock"}, "teacher http://b/v1, not http://127.0.0.1:8000/v1"),
        ({"purpose": "eval"}, "purpose eval, not train"),
        pytest.param({"terms_id": "other"}, "terms other, not mock-teacher", marks=pytest.mark.slow),
        pytest.param(
            {"mock": True, "duties": ("notice",)},
            "mock yes, not no; duties notice, not none",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_must_not_mix_is_refused_by_name(
    stores: list[Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    other = filled(tmp_path / "other", range(90, 95), "run-x", **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        merge([*stores, other], tmp_path / "out")
    assert caught.value.place == str(other)
    assert not (tmp_path / "out").exists()
    if "teacher_id" in changes:  # the same teacher under two addresses, once that is said
        adopt(other, "name")
        for store in stores:
            adopt(store, "name", ENDPOINT)
        assert merge([*stores, other], tmp_path / "out").answers == 65


def test_stores_in_use_and_wrong_paths_are_refused(stores: list[Path], tmp_path: Path) -> None:
    with StoreLock(stores[1], started_at=0.0), pytest.raises(StoreLocked):
        merge(stores, tmp_path / "out")
    with pytest.raises(ConfigError, match="name at least two"):
        merge([stores[0]], tmp_path / "out")
    (tmp_path / "full").mkdir()
    with pytest.raises(ConfigError, match="is not the merge of these stores"):
        merge(stores, tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_refused_by_name(
    stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no store")
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("alias").symlink_to("store-0")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for stores_, out, place, words in (
        (["store-0", "store-0"], "out", "STORE store-0", "name each store once"),
        (["store-0", "alias"], "out", "STORE store-0", "name each store once"),
        (["store-0", "nothing"], "out", "STORE nothing", "no store is here"),
        (["store-0", "loop"], "out", "STORE loop", "no store is here"),
        (["store-0", "store-1/shards"], "out", "STORE store-1/shards", "no store is here"),
        (["store-0", "file"], "out", "STORE file", "is a file, and a store is a folder"),
        (["store-0", "store-1"], "store-1", "OUT store-1", "is one of the stores"),
        (["store-0", "store-1"], "store-1/new", "OUT store-1/new", "lies inside the store store-1"),
        (["store-0", "store-1"], "alias/a/b", "OUT alias/a/b", "outside of every store"),
        (["store-0", "store-1"], "file", "OUT file", "is a file"),
        (["store-0", "store-1"], "file/out", "OUT file/out", "is no folder"),
        (["store-0", "store-1"], "link", "OUT link", "is a link to nothing"),
        (["store-0", "store-1"], "loop", "OUT loop", "is a link to nothing"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            merge([Path(name) for name in stores_], Path(out))
        assert (caught.value.exit_code, caught.value.place) == (2, place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


KILL_POINTS = (
    "merge.after_link:3",
    "merge.before_commit:2",
    "merge.after_shard:5",
    "merge.before_ledger",
    "merge.after_ledger",
    "merge.after_rename",
    "merge.before_rename",
)


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=pytest.mark.slow) for point in KILL_POINTS[1:]] + [KILL_POINTS[0]],
)
def test_a_kill_at_any_step_leaves_no_half_store_and_the_next_call_goes_on(
    stores: list[Path], tmp_path: Path, point: str
) -> None:
    with open_store(stores[1], run_id="run-9") as journal:
        add(journal, stores[1], range(3, 5), "run-9", prompt=prompt_of(500))
    out = tmp_path / "out"
    code = "import sys; from pathlib import Path; from harvester.store.maintain.merge import merge\n"
    code += "*stores, out = map(Path, sys.argv[1:]); merge(stores, out)"
    environment = {**os.environ, "HARVESTER_FAILPOINT": point}
    arguments = [sys.executable, "-c", code, *map(str, [*stores, out])]
    killed = subprocess.run(arguments, check=False, env=environment, timeout=240)
    assert killed.returncode == -9, "the kill point was not reached"
    assert out.exists() == (point == "merge.after_rename")
    for store in stores:
        assert verified(store, repair=False)[1] == 0
    merged = merge(stores, out)
    assert (merged.answers, merged.repeated, merged.shards) == (60, 2, 6)
    assert keys_in(out).count(key_of(3).hex()) == 2  # under both prompts
    assert len(set(keys_in(out))) == 60
    with Journal.open(out, read_only=True) as journal:
        counts = journal.totals()
    assert (counts.answers, counts.paid_twice) == (60, 2)
    facts, findings = verified(out, repair=False)
    assert findings == 0, facts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store-0", "store-1", "store-2"]


def test_the_command_says_what_it_did(stores: list[Path], tmp_path: Path) -> None:
    arguments = ["merge", *map(str, stores), str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main.app, arguments)
    assert (done.exit_code, json.loads(done.stdout)["answers"]) == (0, 60)
    done = CliRunner().invoke(main.app, ["adopt", str(tmp_path / "out"), "--identity", "name", "--json"])
    facts = json.loads(done.stdout)
    assert (done.exit_code, facts["rows"], facts["findings"]) == (0, 60, [])


def test_a_shard_is_named_from_one() -> None:
    assert (Shard.parse("2/8").rank, Shard.parse(" 8/8 ").store("a/store/")) == (1, "a/store-8-of-8")


def shown(store: Path) -> tuple[int, str, dict[str, Any]]:
    """Return the exit code of `harvester status`, its text, and what it says with --json."""
    text = CliRunner().invoke(main.app, ["status", str(store)])
    as_json = CliRunner().invoke(main.app, ["status", str(store), "--json"])
    return text.exit_code, text.output, json.loads(as_json.stdout)


def test_status_says_what_a_merged_store_is(stores: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(stores, out)
    code, text, facts = shown(out)
    assert code == 0
    assert "a merged store with 60 answers, of 3 stores" in text
    assert "gone" not in text
    assert [str(store.resolve()) for store in stores] == facts["merged"]["stores"]
    assert all(str(store) in text.replace("\n", "") for store in stores)
    probe = harvester("status", str(out), "--check")
    assert (probe.returncode, "no run has been in this merged store" in probe.stderr) == (1, True)
    with open_store(out, run_id="run-later"):  # a run that then lost its status.json
        pass
    code, text, facts = shown(out)
    assert (code, "a run was here since" in text, "status.json is gone" in text) == (0, True, True)
    assert "merged" not in shown(stores[0])[2]


def test_status_of_a_store_that_an_earlier_release_merged(stores: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(stores, out)
    with Journal.open(out) as journal, journal.writing() as connection, updating_checksum(connection, "meta"):
        connection.execute("DELETE FROM meta WHERE name = 'merged_from'")
    code, text, _ = shown(out)
    assert (code, "a merged store with 60 answers" in text, "gone" in text) == (0, True, False)
