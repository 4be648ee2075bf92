"""Push to a Hub on loopback: what is listed, what is sent, and what is refused before anything is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fake_hub
from tests.commands import run
from tests.fake_hub import TOKEN, FakeHub
from tests.harvester.publish.published_store import grow, make_store


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub.running() as served:
        yield served


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "run" / "store", range(12), shards=2)


def push(
    hub: FakeHub, store: Path, *words: str, token: str = TOKEN
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(store.parent / "hf"),
    }
    done = run("harvester", ["push", store, "me/corpus", "--json", *words], environment=environment)
    return json.loads(done.stdout) if done.stdout.strip() else {}, done


def test_nothing_is_sent_without_yes(hub: FakeHub, store: Path) -> None:
    facts, done = push(hub, store)
    assert done.returncode == 0, done.stderr
    assert (facts["uploaded"], facts["private"], hub.requests) == (False, True, [])
    assert "data/train-00000-of-00001.parquet" in facts["files"]
    assert {"README.md", "NOTICE"} <= set(facts["files"])
    assert all(facts["files"].values())


@pytest.mark.slow
def test_a_corpus_is_pushed_once_into_a_private_repository(hub: FakeHub, store: Path) -> None:
    facts, done = push(hub, store, "--upload", "--to", "shards")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["datasets/me/corpus"]
    assert repository.visibility == "private"
    assert {path: len(content) for path, content in repository.files.items()} == facts["files"]
    shards = sorted((store / "shards").iterdir())
    assert [repository.files[f"data/{path.name}"] for path in shards] == [
        path.read_bytes() for path in shards
    ]
    assert b"mock-teacher" in repository.files["terms.json"]
    sent = len(hub.objects)
    _, done = push(hub, store, "--upload", "--to", "shards")
    assert done.returncode == 0, done.stderr
    assert (repository.commits, len(hub.objects)) == (1, sent)  # nothing has changed
    grow(store, range(12, 15))
    _, done = push(hub, store, "--upload", "--to", "shards")
    assert done.returncode == 0, done.stderr
    assert (repository.commits, len(hub.objects)) == (2, sent + 1)


@pytest.mark.slow
def test_what_the_hub_holds_is_compared(hub: FakeHub, store: Path) -> None:
    hub.spoil = True
    _, done = push(hub, store, "--upload")
    assert done.returncode == 1
    assert "train-00000-of-00001.parquet" in done.stderr
    assert hub.repositories["datasets/me/corpus"].commits == 1


def test_terms_that_forbid_it_end_it_before_anything_is_sent(hub: FakeHub, tmp_path: Path) -> None:
    for name, facts in (("a", {"terms_id": "no-such-record"}), ("b", {"purpose": "eval"})):
        store = make_store(tmp_path / name / "store", range(2), **facts)
        for words in ((), ("--upload",), ("--upload", "--to", "shards")):
            _, done = push(hub, store, *words)
            assert done.returncode == 77, done.stderr
    assert hub.requests == []


def test_refusals_name_the_remedy_and_never_the_token(hub: FakeHub, store: Path) -> None:
    _, done = push(hub, store, "--upload", token="")
    assert done.returncode == 2
    assert "HF_TOKEN" in done.stderr
    assert hub.requests == []
    hub.refuse = 403
    _, done = push(hub, store, "--upload")
    assert done.returncode == 5
    assert hub.requests
    assert "error[remote_store]" in done.stderr
    assert TOKEN not in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repositories == {}
    done = run("harvester", ["push", store, "no-owner", "--upload"])
    assert done.returncode == 2
