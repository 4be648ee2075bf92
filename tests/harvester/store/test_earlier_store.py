"""Open, read, verify and resume a store that version 0.1.0 wrote and that was killed under way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester

EARLIER = Path(__file__).with_name("earlier_store")
EXPECTED = [
    json.loads(line) for line in (EARLIER / "expected.jsonl").read_text(encoding="utf-8").splitlines()
]
ROWS = 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the harvest's folder; a store is private to its owner, which git does not record."""
    copied = tmp_path / "harvest"
    shutil.copytree(EARLIER, copied)
    for path in [copied / "store", copied / "store" / "shards"]:
        path.chmod(0o700)
    return copied


def contents(store: Path) -> list[dict[str, str]]:
    """Read what `expected.jsonl` lists of every answer, ordered by key."""
    return [
        {
            "key": sample.key,
            "prompt_id": sample.prompt_id,
            "completion": sample.completion,
            "raw_sha256": hashlib.sha256(sample.raw).hexdigest(),
        }
        for sample in sorted(Corpus.open(store).samples(), key=lambda sample: sample.key)
    ]


def test_every_answer_is_read_back_sealed_or_not(folder: Path) -> None:
    assert contents(folder / "store") == EXPECTED


def test_verify_counts_the_answers_and_the_attempts_that_the_kill_left(folder: Path) -> None:
    done = harvester("verify", folder / "store", "--json")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["findings"]) == (0, [])
    assert (verdict["answers"], verdict["billed"], len(verdict["possibly_billed"])) == (44, 44, 2)


def test_a_run_resumes_it_and_pays_for_what_is_missing_only(
    folder: Path, mock_teacher: Callable[..., RunningMock]
) -> None:
    mock = mock_teacher(faults=[{"action": "status", "status": 400, "prompt": "REFUSE"}])
    config = folder / "harvest.toml"
    text = config.read_text(encoding="utf-8")
    # The address is part of every key, so it stays first. Nothing listens there: the replica answers.
    address = 'base_url = "http://127.0.0.1:8765/v1"\n'
    assert address in text
    text = text.replace(address, f'{address}replicas = ["{mock.base_url}"]\n')
    unchecked = "\n[canary]\nreplicas_every_s = 0\n"  # rows are counted, so nothing else is asked
    config.write_text(text + unchecked, encoding="utf-8")
    done = harvester("run", config, "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    # 48 sums and a greeting are answered; the last prompt is refused and becomes a dead letter.
    assert (summary["from_cache"], summary["dead"]) == (len(EXPECTED), 1)
    assert mock.totals()["answers"] == ROWS - 1 - len(EXPECTED)
    read = contents(folder / "store")
    assert len(read) == ROWS - 1
    assert [row for row in read if row in EXPECTED] == EXPECTED
    assert harvester("verify", folder / "store").returncode == 0
