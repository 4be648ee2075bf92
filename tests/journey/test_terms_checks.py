"""Test the terms by the command line: before the first request, at sealing, at export; no flag skips them."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from harvester.errors import TermsRefused
from harvester.export.export import export
from harvester.run import job
from harvester.run.background import terms_watch
from harvester.run.prepare import prepare
from harvester.store.maintain.seal_task import seal_now
from harvester.store.reader import Corpus
from tests.journey.test_wrong_input import folder, harvester

RESTRICTED = """\
[[record]]
id = "mock-teacher"
layer = "weights"
match = { host = ["127.0.0.1", "localhost", "::1"], model = "mock-teacher*" }
verdict = "restrict"
gist = "outputs may not train anything"
url = "https://example.org/terms"
licence = "LicenseRef-Test"
seen = 2026-11-01
review_after = 2036-11-01
established = "primary"
source = "a test"
"""


@pytest.fixture
def harvested(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    lines = tuple(json.dumps({"prompt": f"What is {a} + 21?"}) for a in range(10, 20))
    path = folder(tmp_path, teacher.base_url, lines=lines)
    done = harvester("run", str(path))
    assert done.returncode == 0, done.stderr
    return path, teacher


def restrict(root: Path) -> None:
    (root / "terms").mkdir()
    (root / "terms" / "mine.toml").write_text(RESTRICTED, encoding="utf-8")


def test_a_restriction_stops_the_next_run_before_the_first_byte(harvested):
    path, teacher = harvested
    received = teacher.state()["received"]
    restrict(path.parent)
    with (path.parent / "a.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"prompt": "What is 77 + 21?"}\n')
    done = harvester("run", str(path))
    assert done.returncode == 77
    for text in ("outputs may not train anything", "https://example.org/terms", "2026-11-01", "remedy"):
        assert text in done.stderr
    assert teacher.state()["received"] == received


def test_export_asks_again_and_writes_nothing_when_refused(harvested, tmp_path: Path):
    path, _ = harvested
    store = str(path.parent / "store")
    allowed = harvester("export", store, str(tmp_path / "allowed"), "--json")
    assert json.loads(allowed.stdout)["rows"] == 10
    restrict(path.parent)
    refused = harvester("export", store, str(tmp_path / "refused"))
    assert refused.returncode == 77
    assert not (tmp_path / "refused").exists()


def test_sealing_asks_again_and_leaves_the_answers_where_they_are(tmp_path: Path, mock_teacher):
    """Answers that a killed run left journalled are neither sealed by hand nor along with the next run."""
    teacher = mock_teacher()
    path = folder(tmp_path, teacher.base_url, lines=tuple(f'{{"prompt": "{n} + 1?"}}' for n in range(10)))
    killed = harvester("run", str(path), HARVESTER_FAILPOINT="shards.after_write")
    assert killed.returncode == -signal.SIGKILL
    restrict(tmp_path)
    store = str(tmp_path / "store")
    assert harvester("seal", store).returncode == 77
    assert json.loads(harvester("verify", store, "--json").stdout)["answers"] == 10
    (tmp_path / "other").mkdir()
    other = folder(tmp_path / "other", teacher.base_url)
    other.write_text(other.read_text() + f'[store]\npath = "{store}"\n')
    received = teacher.state()["received"]
    refused = harvester(
        "run", str(other)
    )  # its own terms are good; the answers waiting in the store's are not
    assert refused.returncode == 77
    assert "outputs may not train anything" in refused.stderr
    assert teacher.state()["received"] == received
    assert not list((tmp_path / "store" / "shards").glob("*.parquet"))


def test_rows_collected_for_evaluation_are_never_exported(tmp_path: Path, mock_teacher):
    path = folder(tmp_path, mock_teacher().base_url)
    path.write_text(path.read_text() + 'purpose = "eval"\n')
    assert harvester("run", str(path)).returncode == 0
    refused = harvester("export", str(tmp_path / "store"), str(tmp_path / "out"))
    assert refused.returncode == 77
    assert "evaluation" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_replica_on_a_host_with_other_terms_is_asked_too(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    path = folder(tmp_path, teacher.base_url)
    path.write_text(
        path.read_text().replace("[prompts]", 'replicas = ["https://api.openai.com/v1"]\n[prompts]')
    )
    done = harvester("run", str(path))
    assert done.returncode == 77
    assert teacher.totals()["answers"] == 0


def test_a_replica_under_other_terms_is_a_teacher_of_its_own(tmp_path: Path, mock_teacher):
    """Its duties would be lost: rows carry the lineage of base_url."""
    teacher = mock_teacher()
    path = folder(tmp_path, teacher.base_url)
    replica = teacher.base_url.replace("127.0.0.1", "localhost")
    path.write_text(path.read_text().replace("[prompts]", f'replicas = ["{replica}"]\n[prompts]'))
    assert harvester("plan", str(path)).returncode == 0
    (tmp_path / "terms").mkdir()
    mine = RESTRICTED.replace('id = "mock-teacher"', 'id = "mine"').replace('"restrict"', '"duties"')
    mine = mine.replace('["127.0.0.1", "localhost", "::1"]', '"localhost"').replace('"weights"', '"service"')
    (tmp_path / "terms" / "mine.toml").write_text(mine + 'duties = ["display:Thanks"]\n')
    done = harvester("run", str(path))
    assert done.returncode == 77
    assert "a teacher of its own" in done.stderr
    assert teacher.totals()["answers"] == 0


def test_an_answer_of_another_model_is_kept_and_goes_no_further(tmp_path: Path, mock_teacher):
    teacher = mock_teacher(faults=[{"action": "model", "value": "gpt-5"}])
    path = folder(tmp_path, teacher.base_url)
    done = harvester("run", str(path))
    assert done.returncode == 77
    assert "answered" in done.stderr
    assert "gpt-5" in done.stderr
    store = tmp_path / "store"
    assert not list((store / "shards").glob("*.parquet"))
    assert json.loads(harvester("verify", str(store), "--json").stdout)["answers"] == 1
    received = teacher.state()["received"]
    for verb in (("run", str(path)), ("seal", str(store)), ("export", str(store), str(tmp_path / "out"))):
        assert harvester(*verb).returncode == 77
    assert teacher.state()["received"] == received


def commands_in(text: str) -> list[list[str]]:
    """Return the words of each command between backquotes, as a shell reads them."""
    return [shlex.split(command) for command in re.findall(r"`harvester ([^`]*)`", text)]


def follow(stderr: str, store: Path) -> int:
    """Run each `purge` that a message names; return how many there were."""
    purges = [words for words in commands_in(stderr) if words[0] == "purge"]
    for words in purges:
        done = harvester(*(str(store) if word == "STORE" else word for word in words))
        assert done.returncode == 0, done.stderr
    return len(purges)


def test_the_remedy_names_all_answers_of_another_model_and_ends_the_trouble(tmp_path: Path, mock_teacher):
    """Twenty rows, and names that a shell, TOML or a terminal would read in another way."""
    odd = ("gpt'5 $(id)", 'a "b" \\\\', "left\u202eright")
    faults = [{"action": "model", "value": name, "prompt": f"What is {n}"} for n, name in enumerate(odd)]
    teacher = mock_teacher(faults=faults)
    lines = tuple(f'{{"prompt": "What is {n % 4} + {n}?"}}' for n in range(20))
    path, store = folder(tmp_path, teacher.base_url, lines=lines), tmp_path / "store"
    assert harvester("run", str(path)).returncode == 77
    refused = harvester("export", str(store), str(tmp_path / "out"))
    assert refused.returncode == 77
    assert follow(refused.stderr, store) == 1
    exported = harvester("export", str(store), str(tmp_path / "out"), "--json")
    assert (exported.returncode, json.loads(exported.stdout)["rows"]) == (0, 5)
    assert json.loads(harvester("verify", str(store), "--json").stdout)["answers"] == 5
    status = json.loads(harvester("status", str(store), "--json").stdout)
    assert (status["held"], status["held_outcomes"]) == (5, {"ok": 5})


def test_no_removal_is_named_where_it_would_not_help(tmp_path: Path, mock_teacher):
    """The terms of the teacher itself have changed: other models' rows are not the trouble."""
    faults = [{"action": "model", "value": "gpt-5", "nth": 1}]
    path = folder(tmp_path, mock_teacher(faults=faults).base_url)
    assert harvester("run", str(path)).returncode == 77
    restrict(tmp_path)
    refused = harvester("export", str(tmp_path / "store"), str(tmp_path / "out"))
    assert refused.returncode == 77
    assert "purge" not in refused.stderr


ROUTED = """\
[[record]]
id = "my-router"
layer = "router"
match = { host = "127.0.0.1", model = "*" }
verdict = "permit"
gist = "what the hosts say flows down"
url = "https://example.org/router"
licence = "LicenseRef-Test"
seen = 2026-11-01
review_after = 2036-11-01
established = "primary"
source = "a test"

[[record]]
id = "my-host"
layer = "service"
match = { host = "host.example", model = "*" }
provider = "deepinfra"
verdict = "permit"
gist = "no limit on outputs"
url = "https://example.org/host"
licence = "LicenseRef-Test"
seen = 2026-11-01
review_after = 2036-11-01
established = "primary"
source = "a test"
"""


@pytest.mark.parametrize("named", ["DeepInfra", "Novita"])
def test_a_provider_that_a_router_was_not_held_to_stops_the_run(tmp_path: Path, mock_teacher, named: str):
    teacher = mock_teacher(faults=[{"action": "patch", "value": {"provider": named}}])
    path = folder(tmp_path, teacher.base_url, lines=tuple(f'{{"prompt": "{n} + 1?"}}' for n in range(60)))
    limits = "[teacher.limits]\nmax_concurrency = 2\n[prompts]"
    path.write_text(
        path.read_text().replace('"mock-teacher"\n[prompts]', f'"mock-teacher, my-host"\n{limits}')
    )
    (tmp_path / "terms").mkdir()
    (tmp_path / "terms" / "mine.toml").write_text(ROUTED, encoding="utf-8")
    store = tmp_path / "store"
    if named == "DeepInfra":
        assert asyncio.run(job.run(prepare(path), lambda status: None)).exit_code == 0
        (shard,) = (store / "shards").glob("*.parquet")
        table = pq.read_table(shard)
        assert table["provider"].to_pylist() == ["DeepInfra"] * 60
        assert json.loads(table.schema.metadata[b"distil.lineage"])[0]["providers"] == ["deepinfra"]
        return
    done = harvester("run", str(path))
    assert done.returncode == 77
    assert "'Novita'" in done.stderr
    assert "deepinfra" in done.stderr
    kept = Corpus.open(store).count()
    assert 0 < kept < 60
    assert kept == teacher.totals()["answers"]  # paid for, and kept
    assert not list((store / "shards").glob("*.parquet"))
    for again in (lambda: prepare(path), lambda: export(store, tmp_path / "out"), lambda: seal_now(store)):
        with pytest.raises(TermsRefused, match="deepinfra") as refused:
            again()
    assert teacher.totals()["answers"] == kept
    assert follow(str(refused.value), store) == 1  # the only way out that keeps the store
    seal_now(store)
    assert Corpus.open(store).count() == 0


def test_terms_that_change_during_a_run_end_it(tmp_path: Path, mock_teacher, monkeypatch):
    monkeypatch.setattr(terms_watch, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(terms_watch, "LISTEN_EVERY_S", 0.05)
    teacher = mock_teacher(latency_s=0.05)
    lines = tuple(f'{{"prompt": "What is {n} + 21?"}}' for n in range(2000))
    path = folder(tmp_path, teacher.base_url, lines=lines)
    path.write_text(path.read_text().replace("[prompts]", "[teacher.limits]\nmax_concurrency = 2\n[prompts]"))

    def watch(status: Mapping[str, Any]) -> None:
        if teacher.totals()["answers"] and not (tmp_path / "terms").exists():
            restrict(tmp_path)

    with pytest.raises(TermsRefused, match="outputs may not train anything"):
        asyncio.run(job.run(prepare(path), watch))
    assert 0 < teacher.totals()["answers"] < 2000


def test_a_permission_needs_a_person_at_a_terminal(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "harvester", "terms", "record", "--beside", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 77
    assert "at a terminal" in done.stderr
    assert not (tmp_path / "permissions").exists()


@pytest.mark.parametrize("verb", ["run", "seal", "export", "plan", "curate"])
def test_no_verb_has_a_flag_that_opens_the_gate(verb: str):
    stdout = harvester(verb, "--help").stdout.lower()
    for word in ("--force", "--ignore", "--accept", "--skip", "--yes", "--override", "--unsafe", "--i-"):
        assert word not in stdout
