"""Mirror a store while it is harvested: what is sealed goes there; a storage that fails holds nothing up."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.config import config as configs
from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock
from harvester.store.published import local_store
from harvester.store.reader import Corpus
from tests import s3_server
from tests.commands import Command, run

Mock = Callable[..., RunningMock]


def write_config(folder: Path, mock: RunningMock, mirror: str, prompts: int = 12) -> Path:
    lines = [
        json.dumps({"id": f"p{number}", "prompt": f"What is {number} + 1?"}) for number in range(prompts)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    config = folder / "harvest.toml"
    config.write_text(
        f'[teacher]\nbase_url = "{mock.base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        f'[prompts]\nfiles = ["prompts.jsonl"]\n[store]\nmirror = "{mirror}"\n'
    )
    return config


def keys(store: Path) -> set[str]:
    return {sample.key for sample in Corpus.open(store).samples(["key"])}


def status(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "store" / "status.json").read_text())["mirror"])


@pytest.mark.slow
def test_a_mirror_that_is_another_stores_says_what_to_do(tmp_path: Path, mock_teacher: Mock) -> None:
    mock = mock_teacher()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, mock, f"file://{tmp_path}/there")
        done = run("harvester", ["run", config])
        assert done.returncode == 0, done.stderr
    shown = run("harvester", ["status", tmp_path / "second" / "store"])
    command = f"harvester publish {tmp_path / 'second' / 'store'} URL --replace"
    for text in (done.stdout, shown.stdout):
        assert "holds another store" in text
        assert "name another URL in [store] mirror" in text
        assert command in text
        assert "the next run goes on" not in text  # it would fail as this one


@pytest.mark.slow
def test_what_a_run_seals_is_mirrored_and_a_failure_only_said(tmp_path: Path, mock_teacher: Mock) -> None:
    there = tmp_path / "remote"
    there.write_text("a file where the folder is to be")
    config = write_config(tmp_path, mock_teacher(), f"file://{there}/x")
    done = run("harvester", ["run", config])
    assert done.returncode == 0, done.stderr
    assert "1 of 1 shards are not mirrored" in done.stdout
    assert f"harvester publish {tmp_path / 'store'}" in done.stdout
    said = status(tmp_path)
    assert (said["shards"], said["mirrored"]) == (1, 0)
    assert said["failures"]
    shown = run("harvester", ["status", tmp_path / "store"])
    assert "0 of 1 shards" in shown.stdout
    there.unlink()
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "prompt": "What is 1000 + 1?"}) + "\n")
    done = run("harvester", ["run", config])
    assert done.returncode == 0, done.stderr
    assert "not mirrored" not in done.stdout
    assert status(tmp_path)["mirrored"] == 2
    copy = local_store(f"file://{there}/x")
    assert keys(copy) == keys(tmp_path / "store")
    assert len(keys(copy)) == 13
    assert not (copy / "report.html").exists()
    done = run("harvester", ["publish", tmp_path / "store", f"file://{there}/x", "--json"])
    assert json.loads(done.stdout)["uploaded"] == 1  # the report
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "newer", "prompt": "What is 2000 + 1?"}) + "\n")
    assert run("harvester", ["run", config]).returncode == 0
    assert (local_store(f"file://{there}/x") / "report.html").exists()  # that of the last publication


@pytest.mark.slow
def test_shards_are_mirrored_while_the_run_goes_on(tmp_path: Path, mock_teacher: Mock) -> None:
    there = tmp_path / "remote"
    config = write_config(tmp_path, mock_teacher(), f"file://{there}")
    config.write_text(config.read_text() + "shard_mib = 0.001\n")
    running = Command("harvester", ["run", config, "--watch"])
    wait_for(lambda: (there / "publication.json").exists(), running)
    assert running.poll() is None
    assert keys(local_store(f"file://{there}")) <= keys(tmp_path / "store")
    running.terminate()
    out, err = running.communicate(120)
    assert running.returncode == 143, err
    assert "not mirrored" not in out
    assert keys(local_store(f"file://{there}")) == keys(tmp_path / "store")


@pytest.mark.slow
def test_a_storage_that_never_answers_holds_nothing_up(tmp_path: Path, mock_teacher: Mock) -> None:
    config = write_config(tmp_path, mock_teacher(), "s3://corpora/x")
    config.write_text(config.read_text() + "shard_mib = 0.001\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**s3_server.ENVIRONMENT, "AWS_ENDPOINT_URL": address}
        running = Command("harvester", ["run", config, "--watch"], environment=environment)
        silent.settimeout(120)
        with silent.accept()[0]:  # the mirror has asked, and waits
            wait_for(lambda: len(keys(tmp_path / "store")) == 12, running)
            running.terminate()
            out, err = running.communicate(120)
    assert running.returncode == 143, err
    assert "not mirrored" in out
    assert len(keys(tmp_path / "store")) == 12


def wait_for(happened: Callable[[], bool], running: Command) -> None:
    """Wait until something has happened, while a command runs."""
    deadline = time.monotonic() + 120
    while not happened():
        assert running.poll() is None, running.communicate(5)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_mirror_with_a_secret_is_refused_and_not_repeated(tmp_path: Path, mock_teacher: Mock) -> None:
    config = write_config(tmp_path, mock_teacher(), "s3://KEYID:verysecret@bucket/x")
    with pytest.raises(ConfigError) as raised:
        configs.load(config)
    text = f"{raised.value.message} {raised.value.place} {raised.value.remedy}"
    assert "credentials" in text
    assert "verysecret" not in text


@pytest.mark.parametrize("place", ["store", "store/shards", ""])
def test_a_mirror_in_the_store_or_around_it_is_refused(
    tmp_path: Path, mock_teacher: Mock, place: str
) -> None:
    mock = mock_teacher()
    config = write_config(tmp_path, mock, f"file://{tmp_path / place}")
    for verb in ("plan", "run"):
        done = run("harvester", [verb, config])
        assert (done.returncode, "lies in the store, or around it" in done.stderr) == (2, True), done.stderr
    assert mock.totals()["requests"] == 0
    assert not (tmp_path / "store").exists()


def test_a_run_in_a_fetched_store_pays_for_nothing_again(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_config(tmp_path, mock, "")
    url, copy = f"file://{tmp_path}/there", tmp_path / "copy"
    assert run("harvester", ["run", config]).returncode == 0
    assert run("harvester", ["publish", tmp_path / "store", url]).returncode == 0
    for number in (1, 2):
        assert run("harvester", ["fetch", url, f"{copy}{number}"]).returncode == 0
        assert run("harvester", ["verify", f"{copy}{number}"]).returncode == 0
    paid = mock.totals()["requests"]
    text = config.read_text()
    # As the store of the run, beside a new one, and merged with the first.
    for more in (f'path = "{copy}1"', f'path = "{tmp_path}/new"\nread_also = ["{copy}2"]'):
        config.write_text(text.replace('[store]\nmirror = ""', f"[store]\n{more}"))
        done = run("harvester", ["run", config, "--json"])
        assert (done.returncode, mock.totals()["requests"]) == (0, paid), done.stderr
    merged = run("harvester", ["merge", f"{copy}2", tmp_path / "store", tmp_path / "merged"])
    assert merged.returncode == 0, merged.stderr
    for store in (tmp_path / "new", Path(f"{copy}1"), tmp_path / "merged"):
        assert keys(store) == keys(tmp_path / "store")
        assert Corpus.open(store).count() == 12
