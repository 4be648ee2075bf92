"""Adopt answers by an identity: keys change, lineage stays, nothing is paid again, a kill loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harvester.api.request_key import request_key
from harvester.config import config as settings
from harvester.errors import ConfigError, StoreError
from harvester.mock_teacher.running import RunningMock
from harvester.run import prepare
from harvester.store import paths
from harvester.store.journal.adoptions import Adoption, note_adoption
from harvester.store.journal.journal import Journal
from harvester.store.maintain.adopt import adopt
from harvester.store.reader import Corpus
from harvester.store.shards.manifest import read_manifest
from harvester.store.shards.recover_rows import RowVerifier
from harvester.store.shards.seal import seal
from tests.faults.bench import POISON, PROMPTS, run_harvest
from tests.harvester.store_rows import ENDPOINT, answer, body_of, fill, intent, key_of, open_store, verified

Mock = Callable[..., RunningMock]
NAME = "team-llama"


def new_key_of(number: int) -> bytes:
    return request_key(NAME, body_of(number), 0)


def rows_of(store: Path) -> dict[str, tuple[str, str, str, str]]:
    samples = Corpus.open(store).samples()
    return {row.key: (row.prompt_id, row.former_key, row.teacher_id, row.endpoint) for row in samples}


def as_adopted(numbers: range) -> dict[str, tuple[str, str, str, str]]:
    return {new_key_of(n).hex(): (f"p{n}", key_of(n).hex(), f"{ENDPOINT}|mock", ENDPOINT) for n in numbers}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three shards of 20 answers."""
    folder = tmp_path / "store"
    with open_store(folder) as journal:
        for start in (0, 20, 40):
            fill(journal, range(start, start + 20))
            seal(journal, folder, target_bytes=1 << 30, everything=True)
    return folder


def test_keys_change_and_what_was_paid_stays(store: Path) -> None:
    adopted = adopt(store, NAME)
    assert (adopted.rows, adopted.already, adopted.held, adopted.unproved) == (60, 0, 0, ())
    assert rows_of(store) == as_adopted(range(60))
    facts, findings = verified(store, repair=False)
    assert findings == 0, facts
    with Journal.open(store, read_only=True) as journal:  # a repair can prove each row
        for entry in read_manifest(journal):
            table = pq.read_table(store / paths.SHARDS / entry.name)
            assert RowVerifier(journal, entry).verified_rows(table).num_rows == entry.rows == 20
    names = sorted(path.name for path in (store / paths.SHARDS).iterdir())
    again = adopt(store, NAME, ENDPOINT)
    assert (again.rows, again.already) == (0, 60)
    assert sorted(path.name for path in (store / paths.SHARDS).iterdir()) == names
    with pytest.raises(ConfigError, match="was adopted by 'team-llama'"):
        adopt(store, "another")


def test_an_answer_under_the_new_key_is_not_replaced(store: Path) -> None:
    with open_store(store, run_id="run-2", teacher_id=f"{NAME}|mock") as journal:
        number = 7
        (row,) = (answer for answer in Corpus.open(store).samples() if answer.key == key_of(number).hex())
        assert row.former_key == ""
        journal.apply([intent(number, "run-2", 999)])
        journal.apply([answer(number, attempt_id=999, key=new_key_of(number))])
        seal(journal, store, target_bytes=1 << 30, everything=True)
    adopted = adopt(store, NAME)
    assert (adopted.rows, adopted.held) == (59, 1)
    assert {key_of(7).hex(), new_key_of(7).hex()} <= rows_of(store).keys()
    assert verified(store, repair=False)[1] == 0


def test_what_cannot_be_adopted_is_refused(store: Path, tmp_path: Path) -> None:
    for identity, address, words in (
        ("http://a", None, "is no identity"),
        (NAME, "http://other/v1", "no run asked http://other/v1"),
    ):
        with pytest.raises(ConfigError, match=words):
            adopt(store, identity, address)
    with open_store(store, run_id="run-2", teacher_id="http://b/v1|mock"):
        pass
    with pytest.raises(ConfigError, match="have these addresses"):
        adopt(store, NAME)
    with pytest.raises(StoreError):
        adopt(tmp_path / "nothing", NAME)
    assert rows_of(store).keys() == {key_of(n).hex() for n in range(60)}


KILL_POINTS = (
    "adopt.after_note",
    "compaction.before_exchange",
    "compaction.before_commit",
    "compaction.after_commit",
    "adopt.after_shard",
    "compaction.after_exchange",
)


@pytest.mark.slow
@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_at_any_instant_loses_nothing_and_the_next_call_completes(store: Path, point: str) -> None:
    code = "import sys; from pathlib import Path; from harvester.store.maintain.adopt import adopt\n"
    code += f"adopt(Path(sys.argv[1]), {NAME!r})"
    environment = {**os.environ, "HARVESTER_FAILPOINT": f"{point}:2" if "note" not in point else point}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(store)], check=False, env=environment, timeout=240
    )
    assert killed.returncode == -9, "the kill point was not reached"
    assert {row[0] for row in rows_of(store).values()} == {f"p{n}" for n in range(60)}
    facts, findings = verified(store, repair=False)
    assert findings == 0, facts
    adopt(store, NAME)
    assert rows_of(store) == as_adopted(range(60))
    facts, findings = verified(store, repair=False)
    assert findings == 0, facts


def test_a_moved_teacher_is_the_same_teacher(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> int:
        return 0

    first = mock_teacher(accuracy=1.0)
    with monkeypatch.context() as patched:  # as a run that was killed leaves a store
        patched.setattr("harvester.store.maintain.seal_task.seal_all", nothing)
        assert run_harvest(first, tmp_path).exit_code == 0
    second, named = mock_teacher(accuracy=1.0), {"identity": NAME}
    write_identity(tmp_path, second)
    notes = [note for note in prepare.look_ahead(tmp_path / "harvest.toml").warnings if "adopt" in note]
    assert [first.base_url in note for note in notes] == [True]
    adopted = adopt(tmp_path / "store", NAME)
    assert adopted.rows == len(PROMPTS)
    plan = prepare.look_ahead(tmp_path / "harvest.toml")
    assert (plan.cached, [note for note in plan.warnings if "adopt" in note]) == (len(PROMPTS), [])
    ended = run_harvest(second, tmp_path, teacher=named)
    assert (ended.exit_code, ended.billed["answers"]) == (0, 0)
    # A new prompt is asked at the new address, under the same name.
    ended = run_harvest(second, tmp_path, teacher=named, prompts=[*PROMPTS, "What is 8 + 8?"])
    assert (ended.exit_code, ended.billed["answers"]) == (0, 1)
    samples = list(Corpus.open(tmp_path / "store").samples())
    assert {(row.teacher_id, row.endpoint) for row in samples} == {
        (f"{first.base_url}|mock-teacher", first.base_url),
        (f"{NAME}|mock-teacher", second.base_url),
    }
    assert verified(tmp_path / "store", repair=False)[1] == 0
    # Without the identity everything would be paid again, and that is said.
    notes = run_harvest(first, tmp_path).output, prepare.look_ahead(tmp_path / "harvest.toml").warnings
    assert any("were adopted by an identity" in note for note in notes[1])


def write_identity(root: Path, mock: RunningMock) -> None:
    path = root / "harvest.toml"
    lines = path.read_text().splitlines()
    lines = [f'base_url = "{mock.base_url}"' if line.startswith("base_url") else line for line in lines]
    path.write_text("\n".join(lines).replace("[teacher]", f'[teacher]\nidentity = "{NAME}"') + "\n")


def test_an_interrupted_adoption_stops_runs(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    run_harvest(mock, tmp_path)
    begun = Adoption(mock.base_url, NAME, 0.0, is_complete=False)  # as a kill leaves it
    with Journal.open(tmp_path / "store") as journal, journal.writing() as connection:
        note_adoption(connection, begun)
    ended = run_harvest(mock, tmp_path, teacher={"identity": NAME})
    assert (ended.exit_code, ended.billed["answers"]) == (5, 0)
    assert "was interrupted" in ended.output
    adopt(tmp_path / "store", NAME)
    ended = run_harvest(mock, tmp_path, teacher={"identity": NAME})
    assert (ended.exit_code, ended.billed["answers"]) == (0, 0)


def test_failed_rows_and_attempts_that_may_be_billed_follow(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    never = {"retry_possibly_billed": False, "max_failed": 1}
    faults = [{"action": "cut_body", "prompt": POISON}]
    ended = run_harvest(mock, tmp_path, faults, run=never)
    assert (ended.exit_code, ended.fired, len(ended.letters)) == (0, 1, 1)
    assert adopt(tmp_path / "store", NAME).dead == 1
    ended = run_harvest(mock, tmp_path, teacher={"identity": NAME}, run=never)
    assert (ended.billed["requests"], len(ended.letters)) == (0, 1)


def test_an_identity_is_a_name_and_leads_around_no_terms(tmp_path: Path) -> None:
    teacher = {
        "base_url": "https://api.example.com/v1",
        "model": "m",
        "identity": NAME,
        "terms": "mock-teacher",
    }
    config = settings.parse({"teacher": teacher, "prompts": {"files": ["*"]}}, place="test")
    assert (config.teacher.key_name, config.teacher.teacher_id) == (NAME, f"{NAME}|m")
    assert not prepare.gate(config, tmp_path).permitted
    for name in ("http://a/v1", "a|b", "", "a b", "x" * 101):
        with pytest.raises(ConfigError):
            settings.parse({"teacher": {**teacher, "identity": name}, "prompts": {"files": ["*"]}}, place="t")


def test_keys_by_identity_differ_from_all_keys_by_address() -> None:
    assert new_key_of(1) != key_of(1)
    canonical = json.dumps(
        {"body": body_of(1), "endpoint": NAME, "epoch": 0, "sample": 0, "v": 1},
        sort_keys=True,
        separators=(",", ":"),
    )
    assert hashlib.sha256(canonical.encode()).digest() == new_key_of(1)
