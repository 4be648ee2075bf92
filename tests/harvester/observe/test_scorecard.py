"""Test the scorecard on the page: what `trainer` writes is drawn, anything else is one clear error."""

from __future__ import annotations

import json
import math
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


def test_several_answers_of_the_teacher_become_a_table() -> None:
    def rates(**values: float | None) -> dict[str, Any]:
        return {k.strip("_"): {"value": value, "prompts": 3} for k, value in values.items()}

    passes = {
        "sum": {"prompts": 3, "answers": 12, "pass_at": rates(_1=0.5, _4=0.875)},
        "alone": {"prompts": 3, "answers": 3, "pass_at": rates(_1=1.0)},
        "unjudged": {"prompts": 3, "answers": 3, "pass_at": rates(_1=None)},
    }
    (table,) = scorecard.scorecard_parts({**CARD, "teacher_pass": passes})["tables"]
    assert table["rows"] == [["sum", "3", "12", "50.0%", "87.5% (pass@4)"]]
    assert len(table["columns"]) == 5


VALUE = {"value": 0.25, "low": 0.125, "high": 0.5}
PAIR = {"only_first": 3, "only_second": 1, "both": 5, "neither": 1, "p": 0.625, "difference": VALUE}
BINS = [{"tokens": 40, "confidence": 0.9, "correct": 0.5}, {"tokens": 4, "confidence": 0.1, "correct": 0.0}]
OF_TEXTS: dict[str, Any] = {
    "judged_by": {"sum": "contains"},
    "references": {"prompts": 9, "metrics": {"chrf": {"base": VALUE, "student_minus_base": VALUE}}},
    "agreement": {"prompts": 9, "metrics": {"token_f1": {"student": VALUE, "repeat": VALUE}}},
    "behaviour": {"student": {"refusals": VALUE, "length_ratio": None}, "repeat": {"refusals": VALUE}},
    "likelihood": {"base": {"bits_per_byte": VALUE}, "answers": 9},
    "calibration": {"student": {"ece": VALUE, "bins": BINS}},
    "paired": {"student_vs_base": {**PAIR, "tasks": {"sum": PAIR}}},
    "forgetting": {
        "answers": 9,
        "base": {"bits_per_byte": VALUE},
        "student": {"bits_per_byte": VALUE},
        "increase": VALUE,
    },
    "speed": {"student": {"answers_timed": 8, "answer_s": VALUE, "disk_bytes": 1 << 21}, "teacher": {}},
    "tags": {"<b>": {"base": POINT, "student": POINT, "teacher": POINT, "prompts": 9}},
}


def counts(**more: Any) -> dict[str, Any]:
    return {"prompts": 9, "win": 2, "tie": 1, "loss": 5, "not_judged": 1, "win_rate": VALUE, **more}


PREFERENCES = {
    "judge": "http://127.0.0.1/v1|<judge>",
    "is_teacher": True,
    "pairs": {
        "student_vs_teacher": counts(tasks={"sum": counts(), "date": counts(win_rate=None)}, tags={}),
        "base_vs_teacher": counts(tasks={"sum": counts(), "date": counts()}, tags={}),
    },
    "student_minus_base": VALUE,
    "position": {"pairs": 8, "comparisons": 16, "decided": 9, "first_wins": VALUE, "order_decided": 3},
    "ending": "budget",
    "exit_code": 10,
}


def test_what_a_judge_prefers_is_shown_with_its_bias() -> None:
    parts = scorecard.scorecard_parts({**CARD, "preferences": PREFERENCES})
    (table,) = parts["tables"]
    assert table["rows"][:3] == [
        ["student", "all", "2", "1", "5", "1", "25.0% (12%–50%)"],
        ["student", "sum", "2", "1", "5", "1", "25.0% (12%–50%)"],
        ["student", "date", "2", "1", "5", "1", "–"],
    ]
    assert [row[0] for row in table["rows"][3:]] == ["base"] * 3
    for words in (
        "<judge> compared each answer",
        "the answer shown first won 25.0% (12%–50%)",
        "3 of 8 pairs were decided by the order alone",
        "The judge is the teacher itself",
        "ended early (budget)",
    ):
        assert words in table["note"]
    (figure,) = parts["figures"]
    assert figure["drawing"].count("<circle") == 5


def test_likelihoods_are_shown_by_task_and_tag() -> None:
    of_model = dict.fromkeys(("nats_per_token", "perplexity", "bits_per_byte", "ece"), VALUE)
    group = {
        "answers": 4,
        "base": of_model,
        "student": of_model,
        "student_minus_base": {"bits_per_byte": VALUE},
    }
    facts = {"tasks": {"sum": group, "date": group}, "tags": {"sum": group, "short": group}}
    (table,) = scorecard.scorecard_parts({**CARD, "likelihood": facts})["tables"]
    assert [row[0] for row in table["rows"] if row[0]] == [
        "sum, 4 answers",
        "date, 4 answers",
        "short, 4 answers",
    ]
    assert table["rows"][2][1:] == ["bits a byte", *["0.250 (0.125–0.500)"] * 3]
    assert table["rows"][3][1:] == ["calibration error", "25.0% (12%–50%)", "25.0% (12%–50%)", ""]


def test_the_gguf_files_of_a_student_become_a_table() -> None:
    file = {"kind": "q8_0", "bytes": 3 << 20, "bits_per_weight": 8.5, "cut": 2, "equal": POINT}
    files = [
        {**file, "tokens_per_s": 91.5, "accuracy": POINT},
        {**file, "kind": "q4_k_m", "tokens_per_s": None, "accuracy": None},
    ]
    facts = {"prompts": 60, "threads": 2, "files": files}
    (table,) = scorecard.scorecard_parts({**CARD, "limited_devices": facts})["tables"]
    assert table["rows"] == [
        ["q8_0", "3.0", "8.50", "91.5", "50.0% (40%–60%)", "50.0% (40%–60%)", "2"],
        ["q4_k_m", "3.0", "8.50", "–", "–", "50.0% (40%–60%)", "2"],
    ]
    assert "2 CPU threads" in table["note"]


def test_scores_of_texts_become_tables_and_figures_with_intervals(tmp_path: Path):
    path = tmp_path / "scorecard.json"
    path.write_text(json.dumps({**CARD, **OF_TEXTS}), encoding="utf-8")
    parts = scorecard.scorecard_parts(scorecard.read_scorecard(path) or {})
    assert "contains the reference" in parts["judged_by"]
    rows = {table["title"]: table["rows"] for table in parts["tables"]}
    assert rows["Answers against the reference"] == [["chrF", "25.0% (12%–50%)", "25.0% (12%–50%)"]]
    assert ["token F1", "25.0% (12%–50%)", "25.0% (12%–50%)", "–"] in rows["Answers against the teacher's"]
    assert ["student – base", "all", "3", "1", "0.62", "25.0% (12%–50%)"] in rows[
        "Who is right where the other is wrong"
    ]
    forgotten = [["base", "0.250 (0.125–0.500)", "–"], ["student", "0.250 (0.125–0.500)", "25.0% (12%–50%)"]]
    assert rows["What the student has forgotten"] == forgotten
    assert ["one answer, ms", "250 (125–500)", "–"] in rows["What an answer takes"]
    assert ["weights on disk, MiB", "2", "–"] in rows["What an answer takes"]
    assert rows["By tag"][0][:2] == ["<b>", "9"]
    dots, calibration = parts["figures"]
    assert dots["drawing"].count("<circle") == 2
    assert calibration["drawing"].count("<circle") == 2
    assert "25.0% (12%–50%)" in calibration["note"]


def test_a_card_without_references_has_no_accuracies_but_its_other_figures(tmp_path: Path):
    card = {**CARD, **OF_TEXTS, "tasks": {}, "macro": {}, "recovery": None}
    parts = scorecard.scorecard_parts(card)
    assert (parts["drawing"], parts["rows"], parts["notes"]) == (None, [], [])
    assert parts["tables"]


def calibration_with(tokens: float) -> dict[str, Any]:
    return {"base": {"ece": VALUE, "bins": [{**BINS[0], "tokens": tokens}]}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        json.dumps({**CARD, "calibration": {"base": {"ece": VALUE, "bins": [{}]}}}),
        json.dumps({**CARD, "agreement": {"metrics": {"chrf": {"base": {"value": "x"}}}}}),
        json.dumps(
            {**CARD, "calibration": {"base": {"ece": VALUE, "bins": [{**BINS[0], "tokens": math.inf}]}}}
        ),
        json.dumps({**CARD, "calibration": {"base": {"ece": VALUE, "bins": [{**BINS[0], "tokens": 0}]}}}),
        json.dumps({**CARD, "tags": {"a": 1}}),
        json.dumps({**CARD, "preferences": {"pairs": {}}}),
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
