"""Test the judge of the scorecard: its preference is known, so win rates and bias to a position are too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.mock_teacher.tasks.judging import Preference
from tests.trainer.command_line import lines, run_trainer  # noqa: F401 - a fixture
from trainer.evaluation.preferences import JudgedPair, facts, win_rate

Mocks = Callable[..., RunningMock]
JUDGE = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "{terms}"
[sampling]
temperature = 0.0
[store]
path = "{store}"
{more}
"""


@pytest.fixture
def trained(learned, tmp_path) -> Path:
    """train.toml of a copy of the finished training, with a judge."""
    config, _ = learned
    shutil.copytree(config.root, tmp_path / "copy")
    toml = tmp_path / "copy" / "train.toml"
    toml.write_text(f'{toml.read_text()}[evaluate]\nspeed_prompts = 0\njudge = "judge.toml"\n')
    return toml


def write_judge(
    toml: Path, mock: RunningMock, store: str = "judged", more: str = "", terms: str = "mock-teacher"
) -> None:
    text = JUDGE.format(base_url=mock.base_url, store=store, more=more, terms=terms)
    toml.with_name("judge.toml").write_text(text)


def judged(run_trainer, toml: Path, *words: object) -> dict[str, Any]:  # noqa: F811
    code, out, err = run_trainer("evaluate", toml, "--json", *words)
    assert code == 0, err
    card = json.loads(out.splitlines()[-1])
    assert (
        json.loads((toml.parent / "out" / "scorecard.json").read_text())["preferences"]
        == (card["preferences"])
    )
    result: dict[str, Any] = card["preferences"]
    return result


def longer(ours: str, theirs: str) -> float:
    """What a judge that prefers the longer answer gives; a blank one loses without being asked."""
    if not ours.strip():
        return 0.0
    return 0.5 if len(ours) == len(theirs) else float(len(ours) > len(theirs))


def test_win_rates_are_those_of_a_judge_whose_preference_is_known(
    run_trainer,  # noqa: F811
    trained,
    mock_teacher: Mocks,
):
    mock = mock_teacher(judge_prefers=Preference.LONGER)
    write_judge(trained, mock)
    found = judged(run_trainer, trained)
    answers = lines(trained.parent / "out" / "answers.jsonl")
    asked = {
        (row["prompt_id"], row[model])
        for row in answers
        for model in ("student", "base")
        if row[model].strip() not in {"", row["teacher"]}
    }
    assert mock.state()["received"] == 2 * len(asked) > 0
    for model in ("student", "base"):
        points = [longer(row[model], row["teacher"]) for row in answers]
        of_model = found["pairs"][f"{model}_vs_teacher"]
        assert (of_model["prompts"], of_model["not_judged"]) == (10, 0)
        assert of_model["win_rate"]["value"] == pytest.approx(sum(points) / 10)
        assert of_model["tasks"]["reverse"]["win_rate"] == of_model["win_rate"]
    # A judge that looks at the answers has no bias to a position.
    assert found["position"]["first_wins"]["value"] == 0.5
    assert found["position"]["order_decided"] == 0
    assert found["judge"] == f"{mock.base_url}|mock-teacher"
    assert found["is_teacher"] is False
    assert found["ending"] == "complete"


@pytest.mark.slow
def test_a_judge_that_always_prefers_the_first_gives_half_and_its_bias_is_reported(
    run_trainer,  # noqa: F811
    trained,
    mock_teacher: Mocks,
):
    first = mock_teacher(judge_prefers=Preference.FIRST)
    write_judge(trained, first)
    code, out, err = run_trainer("evaluate", trained)
    assert code == 0
    assert "the answer shown first won 100.0%" in err
    card = json.loads((trained.parent / "out" / "scorecard.json").read_text())
    found = card["preferences"]
    asked = {pair["key"] for pair in lines(trained.parent / "out" / "judge" / "verdicts.jsonl")}
    for counts in found["pairs"].values():
        # Answers equal to the teacher's tie as well; a blank one loses.
        assert counts["tie"] == 10 - counts["blank"]
    assert found["position"]["first_wins"]["value"] == 1.0
    assert found["position"]["order_decided"] == found["position"]["pairs"] == len(asked)
    # Another try asks nothing again, and needs no model.
    shutil.rmtree(trained.parent / "out" / "adapter")
    assert judged(run_trainer, trained, "--judge-only") == found
    assert first.state()["received"] == 2 * len(asked)
    # Another judge has a store of its own, and a budget that ends it early can be raised.
    fair = mock_teacher(judge_prefers=Preference.LONGER)
    write_judge(trained, fair, "judged2", "[budget]\ntokens = 2000\n[teacher.limits]\nmax_concurrency = 1")
    code, out, err = run_trainer("evaluate", trained, "--judge-only", "--json")
    part = json.loads(out.splitlines()[-1])["preferences"]
    assert code == part["exit_code"] == 10
    assert sum(counts["not_judged"] for counts in part["pairs"].values()) > 0
    assert "--judge-only" in err
    write_judge(trained, fair, "judged2")
    assert judged(run_trainer, trained, "--judge-only")["position"]["pairs"] == len(asked)
    assert fair.state()["received"] == 2 * len(asked)


def test_a_judge_that_cannot_be_used_is_refused(run_trainer, trained, mock_teacher: Mocks):  # noqa: F811
    code, _, err = run_trainer("evaluate", trained)
    assert (code, "judge.toml" in err) == (2, True)
    mock = mock_teacher()
    write_judge(trained, mock, "store")
    code, _, err = run_trainer("evaluate", trained)
    assert (code, "would write into the corpus" in err) == (2, True)
    write_judge(trained, mock, more='[judge]\ncorpus = "store"\nrubric = "mine.j2"')
    code, _, err = run_trainer("evaluate", trained)
    assert (code, "scores single answers" in err) == (2, True)
    write_judge(trained, mock)
    code, _, err = run_trainer("evaluate", trained, "--judge-only")
    assert (code, "run `trainer evaluate` first" in err) == (2, True)
    assert mock.state()["received"] == 0


@pytest.mark.slow
def test_the_terms_of_a_judge_are_asked(run_trainer, trained, mock_teacher: Mocks):  # noqa: F811
    mock = mock_teacher()
    write_judge(trained, mock, terms="no-such-record")
    code, _, err = run_trainer("evaluate", trained)
    assert code == 77
    assert "--judge-only" in err
    assert mock.state()["received"] == 0
    # The figures that need no judge are kept.
    assert "preferences" not in json.loads((trained.parent / "out" / "scorecard.json").read_text())


def pair(model: str, prompt: int, ab: str, ba: str, winner: str) -> JudgedPair:
    orders = (("ab", ab), ("ba", ba))
    return JudgedPair(model, prompt, f"t{prompt % 2}", (), winner, key=f"{model}{prompt}", orders=orders)


def test_facts_of_pairs_by_hand():
    pairs = [
        pair("student", 0, "win", "win", "win"),
        pair("student", 1, "win", "loss", "tie"),
        pair("student", 2, "tie", "loss", "loss"),
        JudgedPair("student", 3, "t1", (), None),
        JudgedPair("base", 0, "t0", (), "loss", "blank"),
        pair("base", 1, "loss", "loss", "loss"),
        JudgedPair("base", 2, "t0", (), "tie", "equal"),
        pair("base", 3, "loss", "loss", "loss"),
    ]
    found = facts(pairs)
    student = found["pairs"]["student_vs_teacher"]
    assert {k: student[k] for k in ("prompts", "win", "tie", "loss", "not_judged")} == {
        **{"prompts": 4, "win": 1, "tie": 1, "loss": 1, "not_judged": 1}
    }
    assert student["win_rate"]["value"] == 0.5
    assert student["tasks"]["t0"]["win_rate"]["value"] == 0.5
    base = found["pairs"]["base_vs_teacher"]
    assert (base["equal"], base["blank"], base["win_rate"]["value"]) == (1, 1, 0.125)
    # Prompts 0 to 2 have both: 1 - 0, 0.5 - 0 and 0 - 0.5.
    assert found["student_minus_base"]["value"] == pytest.approx(1 / 3)
    position = found["position"]
    assert (position["pairs"], position["comparisons"], position["decided"]) == (5, 10, 9)
    # The first place won for student 0 (ab), student 1 (ab, ba), student 2 (ba), base 1 (ba) and base 3 (ba).
    assert position["first_wins"]["value"] == pytest.approx(6 / 9)
    assert position["order_decided"] == 1


def test_the_interval_of_a_win_rate_is_no_point_where_all_tie():
    assert win_rate([]) is None
    even = win_rate([0.5] * 20)
    assert even is not None
    assert even["value"] == 0.5
    assert even["low"] < 0.35 < 0.65 < even["high"]
    assert win_rate([1.0, 0.0]) == win_rate([0.5, 0.5])
