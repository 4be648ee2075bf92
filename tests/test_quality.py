"""Test the parts of `make quality`: intervals, calibration, gates, corrupted answers; and a small run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import answer_server, calibration, held_out, report
from benchmarks.quality.bootstrap import Bootstrap, Interval
from benchmarks.quality.experiments import FULL, arms
from benchmarks.quality.gates import gates
from benchmarks.quality.harvests import (
    GOLD,
    STRONG,
    UNSURE,
    WEAK,
    Harvest,
    Harvests,
    corruptions,
    free_port,
    scored_rows,
    train_rows,
)
from benchmarks.quality.results import Results, compute
from benchmarks.quality.trainings import answers_of
from harvester.store.reader import Corpus

TASKS = ["a"] * 40 + ["b"] * 10


def arm_of(shares, seed=0):
    """Return right answers [seeds, prompts, 1], weighed by task, for shares of right answers by seed."""
    drawn = np.random.default_rng(seed)
    bootstrap = Bootstrap(TASKS, resamples=400)
    right = np.array([drawn.random(len(TASKS)) < share for share in shares], dtype=float)
    return bootstrap, right, (right * bootstrap.macro_weights())[..., None]


def test_the_accuracy_is_the_mean_over_tasks_and_seeds():
    bootstrap, right, arm = arm_of((0.5, 0.7, 0.9))
    by_task = [right[:, :40].mean(), right[:, 40:].mean()]
    interval = bootstrap.interval(bootstrap.totals(arm)[:, 0])
    assert interval.value == pytest.approx(sum(by_task) / 2)
    assert interval.low < interval.value < interval.high


def test_resamples_keep_the_number_of_prompts_of_each_task():
    bootstrap, _, _ = arm_of((0.5,))
    ones = np.ones((1, len(TASKS), 1)) * bootstrap.macro_weights()[:, None]
    assert bootstrap.totals(ones) == pytest.approx(1.0)


def test_differences_are_paired():
    bootstrap, right, arm = arm_of((0.5, 0.6, 0.7))
    better = right.copy()
    better[:, np.flatnonzero(right[0] == 0)[:2]] = 1  # the same two prompts for all seeds
    weighed = (better * bootstrap.macro_weights())[..., None]
    difference = bootstrap.interval((bootstrap.totals(weighed) - bootstrap.totals(arm))[:, 0])
    alone = bootstrap.interval(bootstrap.totals(arm)[:, 0])
    assert 0 <= difference.low <= difference.value
    assert difference.high - difference.low < alone.high - alone.low
    same = bootstrap.interval((bootstrap.totals(arm) - bootstrap.totals(arm))[:, 0])
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_interval_holds_the_noise_between_seeds():
    bootstrap = Bootstrap(TASKS, resamples=400)
    flat = np.stack([np.full(len(TASKS), value) for value in (0.2, 0.5, 0.8)])
    interval = bootstrap.interval(bootstrap.totals((flat * bootstrap.macro_weights())[..., None])[:, 0])
    assert interval.value == pytest.approx(0.5)
    assert interval.low < 0.35 < 0.65 < interval.high


def test_loss_and_calibration_error_of_known_tokens():
    # Two tokens of confidence 0.9, one of them right; one of confidence 0.5 that is right.
    figures = np.array([[0.1, 0.9, 1.0], [2.3, 0.9, 0.0], [0.7, 0.5, 1.0]])
    totals = np.array(calibration._summed(figures))
    assert len(totals) == calibration.FEATURES
    assert calibration.loss(totals) == pytest.approx(3.1 / 3)
    assert calibration.error(totals) == pytest.approx((abs(1.8 - 1.0) + abs(0.5 - 1.0)) / 3)


def test_a_confidence_of_one_lies_in_the_last_bin():
    totals = np.array(calibration._summed(np.array([[0.0, 1.0, 1.0]])))
    assert calibration.error(totals) == 0


FEATURES_OF_RIGHT_TOKEN = [0.1, 1.0, *[0.9 if at == 13 else 0.0 for at in range(15)], *[0.0] * 13, 1.0, 0.0]


def write_student(folder, right, *, with_base=False):
    """Write the scores of a student that answers these prompts of 8 rightly."""
    folder.mkdir(parents=True)
    rows = [
        {
            "prompt_id": f"p{number}",
            "task": "ab"[number % 2],
            "split": "held_out",
            "reference": "yes",
            "student": "yes" if number in right else "no",
            "teacher": "yes",
        }
        | ({"base": "no"} if with_base else {})
        for number in range(8)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = {row["prompt_id"]: FEATURES_OF_RIGHT_TOKEN for row in rows}
    (folder / "calibration.json").write_text(json.dumps(features))
    return folder


def test_an_arm_with_one_seed_is_compared_with_that_seed_of_the_other(tmp_path):
    alone = write_student(tmp_path / "alone", {0, 1, 2, 3})
    same = write_student(tmp_path / "same", {0, 1, 2, 3}, with_base=True)
    better = [write_student(tmp_path / f"better{seed}", set(range(8))) for seed in (1, 2)]
    results, _ = compute({"E1": [alone], "E2": [same, *better]})
    assert results.by_seed == {"E1": [0.5], "E2": [0.5, 1.0, 1.0]}
    difference = results.differences["accuracy"]["E2 - E1"]
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert results.loss["E1"].value == pytest.approx(0.1)
    assert results.base.value == 0


def test_the_base_is_not_reported_without_its_answers(tmp_path):
    results, _ = compute({"E5": [write_student(tmp_path / "student", {0, 1})]})
    assert results.base is None
    assert results.accuracy["E5"].value == pytest.approx(0.25)


def held(low, value, high):
    return Interval(value, low, high)


def results_with(recovery, *, untaught=0.0, loss=-0.1, loop=0.02, curve=0.01):
    return Results(
        recovery={"E2": recovery},
        splits={
            "held_out_phrasing": {"E2": {"recovery": held(0.86, 0.9, 0.95)}},
            "held_out_task": {"E2": {"accuracy": held(0, untaught, untaught)}},
        },
        differences={
            measure: {pair: held(loss - 0.01, loss, loss + 0.01)}
            for measure in ("loss", "error")
            for pair in ("E5 - E2 small", "E5 unsure - E6 unsure")
        },
        loop={"difference": {"round 3": held(loop - 0.01, loop, loop + 0.01)}},
        curve={"prediction": {"error": curve}},
    )


def test_gates_are_held_or_missed():
    good = results_with(held(0.89, 0.92, 0.94))
    assert all(gate.is_held for gate in gates(good))
    for recovery in (held(0.86, 0.92, 0.94), held(0.88, 0.89, 0.94)):
        assert not gates(results_with(recovery))[0].is_held
    missed = results_with(held(0.89, 0.92, 0.94), untaught=0.2, loss=-0.005, loop=0.005, curve=-0.03)
    names = [gate.name for gate in gates(missed) if not gate.is_held]
    assert len(names) == len(gates(missed)) - 2  # the recoveries are held
    assert gates(Results()) == []


def test_every_arm_of_an_experiment_has_a_harvest_and_a_training_of_its_own():
    listed = arms(FULL)
    trainings = {repr(arm.training) for arm in listed.values()}
    assert len(trainings) == len(listed)
    assert {arm.training.harvest.teacher for arm in listed.values()} == {STRONG, WEAK, UNSURE, GOLD}
    kinds = {name.split()[0] for name in listed}
    assert kinds | {"E0", "E8", "E11"} == {f"E{number}" for number in range(12)}


def test_a_smaller_harvest_is_part_of_a_larger_one():
    small, large = train_rows(Harvest(STRONG, 100)), train_rows(Harvest(STRONG, 300))
    assert large[:100] == small
    assert {row["split"] for row in scored_rows(Harvest(STRONG, 1, splits=("held_out",)))} == {"held_out"}


def test_corruptions_are_wrong_but_plausible():
    rows = train_rows(Harvest(STRONG, 60))
    rules = corruptions(rows, 0.1)
    assert [rule["prompt"] for rule in rules] == [row["prompt"] for row in rows]
    assert all(rule["value"] != row["reference"] for rule, row in zip(rules, rows, strict=True))
    numbers = [rule["value"] for rule, row in zip(rules, rows, strict=True) if row["task"] == "sum"]
    assert numbers
    assert all(number.isdigit() for number in numbers)


@pytest.mark.slow
def test_right_answers_are_harvested_over_http(tmp_path):
    harvest = Harvest(GOLD, 12, splits=("held_out",), test_each=64)
    folder = Harvests(tmp_path).make(harvest)
    texts = {s.prompt_id: s.completion for s in Corpus.open(folder / "store").samples()}
    expected = {row["id"]: row["reference"] for row in (*train_rows(harvest), *scored_rows(harvest))}
    assert texts == expected
    assert Harvests(tmp_path).make(harvest) == folder  # found, not made again


def test_a_prompt_without_an_answer_is_refused():
    import urllib.error
    import urllib.request

    port = free_port()
    body = json.dumps({"messages": [{"role": "user", "content": "?"}]}).encode()
    with answer_server.serve("m", {"!": "x"}, port):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
    assert refused.value.code == 404
    refused.value.close()


def test_the_page_shows_what_was_missed(tmp_path):
    listed = arms(replace(FULL, seeds=(0,)))
    results = results_with(held(0.86, 0.92, 0.94))
    for name in ("E1", "E2", "E5"):
        for table in (results.accuracy, results.teacher, results.recovery, results.loss, results.error):
            table[name] = held(0.4, 0.5, 0.6)
        results.by_seed[name] = [0.5]
    results.loop.update(hard=results.loop["difference"], random=results.loop["difference"])
    results.curve = None
    reached = gates(results)
    page = report.write(tmp_path, results, reached, listed, {"all": 1.0}).read_text()
    assert "gates are missed" in page
    assert "One seed: E1." in page
    assert page.count("<svg") == 5
    facts = json.loads((tmp_path / "quality.json").read_text())
    assert facts["gates"][0]["is_held"] is False
    assert facts["accuracy"]["E5"]["low"] == 0.4


@pytest.mark.slow
def test_a_harvest_from_the_committed_teacher_with_corrupted_answers(tmp_path):
    harvest = Harvest(
        STRONG, 40, samples=4, temperature=0.7, corrupted=0.3, splits=("held_out",), test_each=64
    )
    folder = Harvests(tmp_path).make(harvest)
    wrong = {rule["prompt"]: rule["value"] for rule in corruptions(train_rows(harvest), 0.3)}
    samples = [s for s in Corpus.open(folder / "store").samples() if s.messages[-1]["content"] in wrong]
    assert len(samples) == 160
    corrupted = sum(s.completion == wrong[s.messages[-1]["content"]] for s in samples)
    assert 0.15 < corrupted / 160 < 0.45


def check_that_short_scores_equal_the_scorecard(trainings):
    """Score the student of the one training that has a scorecard without `trainer evaluate`, too."""
    (scored,) = (file.parent for file in trainings.glob("*/scorecard.json"))
    again = trainings / "again"
    shutil.copytree(scored, again)
    (again / "answers.jsonl").unlink()
    (again / "calibration.json").unlink()
    held_out.score(again / "train.toml")
    rows, others = answers_of(scored), answers_of(again)
    assert others == [{key: row[key] for key in others[0]} for row in rows]
    assert (again / "calibration.json").read_text() == (scored / "calibration.json").read_text()


@pytest.mark.long  # many processes; the parts are tested above, and a harvest with its training by `distil`
def test_a_smoke_of_all_parts(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quality", "--smoke", "--out", str(tmp_path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    facts = json.loads((tmp_path / "quality.json").read_text())
    assert set(facts["accuracy"]) == {"E2", "E2 small", "E5"}
    check_that_short_scores_equal_the_scorecard(tmp_path / "trainings")
    assert facts["teacher"]["E2"]["value"] > facts["accuracy"]["E2"]["value"] > facts["base"]["value"]
    before = (tmp_path / "quality.json").stat().st_mtime_ns
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0
    assert (tmp_path / "quality.json").stat().st_mtime_ns > before
    assert "harvest:" not in again.stderr  # nothing was asked again
    assert json.loads((tmp_path / "quality.json").read_text())["accuracy"] == facts["accuracy"]
