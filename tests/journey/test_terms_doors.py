"""The gate's doors, by the command line: before the first byte, at sealing, at export; no flag opens them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.journey.test_doors import folder, harvester

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
    for said in ("outputs may not train anything", "https://example.org/terms", "2026-11-01", "remedy"):
        assert said in done.stderr
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


def test_a_permission_needs_a_person_at_a_terminal(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "harvester", "terms", "record", "--beside", str(tmp_path)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 77
    assert "at a terminal" in done.stderr
    assert not (tmp_path / "permissions").exists()


@pytest.mark.parametrize("verb", ["run", "seal", "export", "plan", "curate"])
def test_no_verb_has_a_flag_that_opens_the_gate(verb: str):
    said = harvester(verb, "--help").stdout.lower()
    for word in ("--force", "--ignore", "--accept", "--skip", "--yes", "--override", "--unsafe", "--i-"):
        assert word not in said
