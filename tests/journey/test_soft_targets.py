"""Test log-probabilities from a model's server to a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.journey.run_process import harvester, write_folder
from trainer import config as settings
from trainer.evaluation import distributions, doctor
from trainer.training.train import train

BASE = Path(__file__).resolve().parents[2] / "data" / "base"


@pytest.fixture
def harvested(tmp_path, mock_teacher):
    """A store of answers of the base itself, with log-probabilities, and a train.toml for the same base."""
    path = write_folder(tmp_path, mock_teacher(model_folder=BASE).base_url, 0, more="top_logprobs = 5")
    words = ["yes", "no", "日本", "x9", "a b"]
    rows = [{"id": word, "prompt": f"say {word} again"} for word in words]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = harvester("run", path)
    assert ended.returncode == 0, ended.stderr
    toml = tmp_path / "train.toml"
    lines = [
        *("[student]", f'base = "{BASE}"'),
        *("[data]", 'corpus = "store"', "eval_share = 0.0", 'truncated = "unterminated"'),
        *("[train]", 'soft_targets = "auto"', "soft_weight = 1.0", "epochs = 1", 'device = "cpu"'),
        *("max_length = 256", "batch_tokens = 512"),
    ]
    toml.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return settings.load(toml)


@pytest.mark.slow
def test_a_student_equal_to_the_teacher_has_no_divergence(harvested):
    diagnosis = doctor.diagnose(harvested)
    assert "100.0% of the listed probability, mapped by ids" in diagnosis.notices[0]
    assert not diagnosis.findings
    assert len(diagnosis.compared) == distributions.MOST_POSITIONS
    for token in diagnosis.compared:
        assert token.divergence == pytest.approx(0, abs=1e-5)  # float16
        for share in (*token.shares, token.tail):
            assert share.student == pytest.approx(share.teacher, abs=2e-3)
    assert train(harvested).loss < 1e-3
