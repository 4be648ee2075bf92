"""Test the scorecard on the page: what `trainer` writes is drawn, anything else is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import ConfigError
from harvester.observe.report import scorecard

POINT = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
CARD: dict[str, Any] = {
    "tasks": {"sum": {"base": POINT, "student": POINT, "teacher": POINT}},
    "macro": {"base": POINT, "student": POINT, "teacher": POINT},
    "recovery": 1.0,
    "splits": {"held_out_task": {"macro": {"base": POINT, "student": POINT, "teacher": POINT}}},
}


def test_a_scorecard_is_drawn(tmp_path: Path):
    path = tmp_path / "scorecard.json"
    path.write_text(json.dumps(CARD), encoding="utf-8")
    parts = scorecard.scorecard_parts(scorecard.read_scorecard(path) or {})
    assert parts["drawing"].count("<circle") == 6
    assert [row["name"] for row in parts["rows"]] == ["sum", "macro"]
    assert parts["rows"][0]["student"] == "50.0% (40%–60%)"
    assert parts["notes"][0] == "Macro recovery 1.000"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "nonsense",
        json.dumps({**CARD, "tasks": {"sum": {"base": POINT}}}),
        json.dumps({**CARD, "macro": 3}),
        json.dumps({**CARD, "recovery": "much"}),
    ],
)
def test_what_is_no_scorecard_is_named(tmp_path: Path, text: str):
    path = tmp_path / "scorecard.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="scorecard") as caught:
        scorecard.read_scorecard(path)
    assert caught.value.place == str(path)


def test_a_training_log_is_drawn_the_newer_line_of_a_step_counts(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    lines = [
        {"step": 10, "loss": 2.0},
        {"step": 20, "loss": float("nan")},
        {"step": 10, "loss": 1.5},
        {"step": 30, "loss": 0.5, "accuracy": 0.9},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    read = scorecard.read_training(path)
    assert [(line["step"], line["loss"]) for line in read] == [(10, 1.5), (30, 0.5)]
    loss, right = scorecard.training_charts(read)
    assert "polyline" in loss["drawing"]
    assert "0.5 at the end" in loss["note"]
    assert "90.0 %" in right["note"]


@pytest.mark.parametrize("text", ["nonsense", "[1]", '{"step": 1}', '{"step": "x", "loss": 1}', "3"])
def test_what_is_no_training_log_is_named(tmp_path: Path, text: str):
    path = tmp_path / "train.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="training log"):
        scorecard.read_training(path)
