"""Test the store between runs: asking again on purpose, one process at a time, a folder that disappears."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, running, write_folder

Mock = Callable[..., RunningMock]


@pytest.mark.slow
def test_an_epoch_asks_everything_again_on_purpose_and_keeps_both(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 12, more="top_logprobs = 2")
    for flags, sent in (((), 12), (("--epoch", "1"), 24), (("--epoch", "1"), 24)):
        assert harvester("run", config, *flags).returncode == 0
        assert mock.totals()["answers"] == sent
    samples = list(Corpus.open(tmp_path / "store").samples())
    assert set(Counter(sample.prompt_id for sample in samples).values()) == {2}
    assert len({sample.key for sample in samples}) == len(samples) == 24
    assert all(sample.logprobs for sample in samples)
    for path in (tmp_path / "store" / "shards").iterdir():  # the rows of real runs prove themselves
        content = path.read_bytes()
        path.write_bytes(content.replace(b"parquet-cpp-arrow", b"parquet-cpp-other"))
    done = harvester("verify", config.parent / "store", "--repair", "--json")
    assert (done.returncode, json.loads(done.stdout)["repaired"]["saved"]) == (0, 24)
    assert list(Corpus.open(tmp_path / "store").samples()) == samples


def test_a_second_run_is_told_who_holds_the_store_and_sends_nothing(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock, other = mock_teacher(latency_s=0.05), mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 2000, teacher="limits = { max_concurrency = 4 }")
    (tmp_path / "other").mkdir()
    second = write_folder(tmp_path / "other", other.base_url, 5, more=f'[store]\npath = "{tmp_path}/store"')
    with running(config) as run:
        status = run.until(lambda s: s["answers_stored"] >= 1)
        refused = harvester("run", second)
        assert refused.returncode == 75
        assert f"pid {run.process.pid} on {status['host']}" in refused.stderr
    assert (other.totals()["requests"], other.totals()["answers"]) == (0, 0)


def test_a_store_that_goes_away_midway_is_a_named_stop(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.05)
    config = write_folder(tmp_path, mock.base_url, 2000, teacher="limits = { max_concurrency = 4 }")
    store, aside = tmp_path / "store", tmp_path / "aside"
    with running(config) as run:
        run.until(lambda s: s["answers_stored"] >= 8)
        store.rename(aside)
        code, _, stderr = run.end()
    assert code == 5
    assert str(store) in stderr
    assert mock.totals()["answers"] < 2000
    assert not store.exists()
    corpus = Corpus.open(aside)
    assert corpus.verify() == []
    assert corpus.count() >= mock.totals()["answers"] - 4  # what was on the wire


def test_a_run_whose_answers_are_gone_is_not_complete(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 20)
    assert harvester("run", config).returncode == 0
    (shard,) = (tmp_path / "store" / "shards").glob("*.parquet")
    aside = shard.rename(tmp_path / "aside")
    gone = harvester("run", config)
    assert (gone.returncode, shard.name in gone.stderr, "--repair" in gone.stderr) == (5, True, True)
    shard.write_bytes(aside.read_bytes()[:-1])
    assert harvester("run", config).returncode == 5
    aside.rename(shard)
    assert harvester("run", config).returncode == 0
    assert mock.totals()["requests"] == 20
