"""Go from prompt files to a scored student with the committed prompt sets and the commands a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock, start_process
from harvester.store.reader import Corpus
from tests import commands
from tests.trainer.command_line import RunTrainer, run_trainer  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
HARVEST = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[teacher.limits]
max_concurrency = 64
[prompts]
files = [{files}]
[sampling]
temperature = 0.0
max_tokens = 64
"""
TRAIN = """\
[student]
base = "{base}"
[data]
corpus = "store"
[train]
epochs = 8
batch_tokens = 1024
max_length = 256
lr = 3e-3
threads = 1
[evaluate]
max_new_tokens = 24
[out]
path = "out"
"""


def harvester(*arguments: object) -> dict[str, object]:
    done = commands.run("harvester", [*arguments, "--json"], timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def harvest_toml(folder: Path, mock: RunningMock, *files: Path) -> Path:
    path = folder / "harvest.toml"
    quoted = ", ".join(json.dumps(str(file)) for file in files)
    path.write_text(HARVEST.format(base_url=mock.base_url, files=quoted), encoding="utf-8")
    return path


@pytest.mark.slow
def test_four_thousand_prompts_arrive_complete_and_each_is_billed_once(tmp_path: Path):
    prompts = ROOT / "prompts" / "skills-train.jsonl"
    sent = {row["id"]: row for row in map(json.loads, prompts.read_text(encoding="utf-8").splitlines())}
    with start_process("--latency", "0.005") as mock:
        summary = harvester("run", harvest_toml(tmp_path, mock, prompts))
        ledger = mock.ledger()
    assert (summary["requests_sent"], summary["answers_stored"]) == (4000, 4000)
    assert len(sent) == len(ledger["entries"]) == 4000
    assert max(Counter(entry["body_sha256"] for entry in ledger["entries"]).values()) == 1
    corpus = Corpus.open(tmp_path / "store")
    samples = list(corpus.samples(["prompt_id", "completion", "outcome", "reference"]))
    assert {sample.prompt_id for sample in samples} == sent.keys()
    assert len(samples) == 4000
    assert {sample.outcome for sample in samples} == {"ok"}
    # The teacher's errors are real and known: what the ledger calls right is what equals the reference.
    right = sum(sample.completion == sent[sample.prompt_id]["reference"] for sample in samples)
    assert right == sum(entry["right"] for entry in ledger["entries"])
    assert 0.9 < right / 4000 < 0.99
    assert corpus.verify() == []


@pytest.mark.slow
def test_from_a_prompt_file_to_a_scored_student(
    run_trainer: RunTrainer,  # noqa: F811
    mock_teacher: Callable[..., RunningMock],
    tmp_path: Path,
):
    rows = []
    for name, most in (("skills-train", 400), ("skills-held-out", 60)):
        lines = (ROOT / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [line for line in lines if '"task": "upper"' in line][:most]
    (tmp_path / "upper.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    mock = mock_teacher(latency_s=0.001)
    harvester("run", harvest_toml(tmp_path, mock, tmp_path / "upper.jsonl"))
    train_toml = tmp_path / "train.toml"
    train_toml.write_text(TRAIN.format(base=ROOT / "data" / "base"), encoding="utf-8")
    trained = subprocess.run(
        [sys.executable, "-m", "trainer", "train", train_toml], capture_output=True, text=True, timeout=300
    )
    assert trained.returncode == 0, trained.stderr
    code, _, err = run_trainer("evaluate", train_toml)
    assert code == 0, err
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text(encoding="utf-8"))
    task = card["tasks"]["upper"]
    for who in ("base", "student", "teacher"):
        assert 0 <= task[who]["low"] <= task[who]["accuracy"] <= task[who]["high"] <= 1
    assert task["base"]["accuracy"] <= 0.05
    assert task["student"]["low"] > task["base"]["high"]  # it learned, and chance can't explain it
    assert card["recovery"] == card["macro"]["student"]["accuracy"] / card["macro"]["teacher"]["accuracy"]
    page, scorecard = tmp_path / "report.html", tmp_path / "out" / "scorecard.json"
    harvester("report", tmp_path / "store", "--out", page, "--scorecard", scorecard)
    assert "recovery" in (tmp_path / "report.html").read_text(encoding="utf-8").lower()
    assert mock.totals()["requests"] == len(rows)
