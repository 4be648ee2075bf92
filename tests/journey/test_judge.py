"""Judge the answers of a harvest with another teacher over HTTP, and curate by its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.mock_teacher.tasks.judging import Preference
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, write_folder

ROWS = 24
JUDGE = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[sampling]
temperature = 0.0
[store]
path = "judged"
[judge]
corpus = "store"
{more}
"""
Mocks = Callable[..., RunningMock]


@pytest.fixture
def harvested(tmp_path: Path, mock_teacher: Mocks) -> Path:
    """A folder with 24 answers, of which some are wrong."""
    path = write_folder(tmp_path, mock_teacher(accuracy=0.6).base_url, ROWS)
    assert harvester("run", path).returncode == 0
    return tmp_path


def write_judge(folder: Path, mock: RunningMock, more: str = "") -> Path:
    path = folder / "judge.toml"
    path.write_text(JUDGE.format(base_url=mock.base_url, more=more))
    return path


def judged(path: Path) -> dict[str, Any]:
    done = harvester("judge", path, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def is_right(sample: Any) -> bool:
    left = int(sample.messages[0]["content"].split()[2])
    return bool(sample.completion == str(left + 30))


def curate(folder: Path, entry: str, name: str) -> tuple[dict[str, Any], list[Any]]:
    (folder / "curate.toml").write_text(f'corpus = "store"\nout = "{name}"\nfilters = [{entry}]\n')
    done = harvester("curate", folder / "curate.toml", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), list(Corpus.open(folder / name).samples())


def test_scores_choose_the_right_answers_and_nothing_is_asked_twice(
    harvested: Path, mock_teacher: Mocks
) -> None:
    mock = mock_teacher(accuracy=1.0)
    path = write_judge(harvested, mock)
    written = harvester("judge", path, "--prompts-only")
    assert (written.returncode, mock.state()["received"]) == (0, 0)
    plan = json.loads(harvester("plan", path, "--json").stdout)
    assert plan["rows"] == ROWS
    facts = judged(path)
    right = sum(map(is_right, Corpus.open(harvested / "store").samples()))
    assert 0 < right < ROWS
    assert (facts["judged"], facts["unreadable"], facts["repaired"]) == (ROWS, 0, 0)
    assert facts["scores"] == {"1": ROWS - right, "10": right}
    assert judged(path) == facts
    assert mock.state()["received"] == ROWS
    counts, kept = curate(harvested, '"finished", {judge = {config = "judge.toml", at_least = 6}}', "good")
    assert counts["dropped"] == {"judged_too_low": ROWS - right}
    assert all(map(is_right, kept))
    record = json.loads((harvested / "good" / "curation.json").read_text())
    assert record["judges"][0]["judged"] == ROWS


def test_a_reply_without_a_verdict_is_asked_for_once_more_and_no_further(
    harvested: Path, mock_teacher: Mocks
) -> None:
    """Two replies are prose. One is repaired; the other is prose again, and stays without a verdict."""
    mock = mock_teacher(
        accuracy=1.0,
        faults=[
            {"action": "content", "value": "Looks good to me!", "nth": [2, 5, ROWS + 1]},
            {"action": "content", "value": '{"score": 4}', "nth": ROWS + 2},
        ],
    )
    path = write_judge(harvested, mock)
    facts = judged(path)
    assert (facts["judged"], facts["repaired"], facts["unreadable"]) == (ROWS - 1, 1, 1)
    assert mock.state()["received"] == ROWS + 2
    assert judged(path) == facts
    assert mock.state()["received"] == ROWS + 2
    counts, kept = curate(harvested, '{judge = {config = "judge.toml", at_least = 1}}', "judged_rows")
    assert (len(kept), counts["dropped"]) == (ROWS - 1, {"not_judged": 1})


def test_pairs_are_asked_in_both_orders_and_a_biased_judge_is_shown(
    harvested: Path, mock_teacher: Mocks
) -> None:
    other = harvested / "other"
    other.mkdir()
    assert harvester("run", write_folder(other, mock_teacher(accuracy=1.0).base_url, ROWS)).returncode == 0
    right = sum(map(is_right, Corpus.open(harvested / "store").samples()))
    fair = mock_teacher(accuracy=1.0)
    path = write_judge(harvested, fair, 'against = "other/store"')
    facts = judged(path)
    assert (facts["loss"], facts["win"], facts["order_decided"]) == (ROWS - right, 0, 0)
    assert facts["left_out"] == {"equal_answers": right}
    assert fair.state()["received"] == 2 * (ROWS - right)
    biased = mock_teacher(faults=[{"action": "content", "value": '{"winner": "A"}', "every": 1}])
    path.write_text(path.read_text().replace(fair.base_url, biased.base_url).replace("judged", "judged2"))
    facts = judged(path)
    assert (facts["tie"], facts["order_decided"]) == (ROWS - right, ROWS - right)
    assert facts["first_wins"]["share"] == 1.0
    shown = harvester("judge", path).stdout
    assert "the answer shown first won 100.0%" in shown


def test_pairs_of_a_file_are_compared_and_equal_ones_asked_once(tmp_path: Path, mock_teacher: Mocks) -> None:
    mock = mock_teacher(judge_prefers=Preference.LONGER)
    pair = {"prompt": "Say something.", "answer": "a longer answer", "other": "short"}
    pairs = [
        {"id": "one", **pair},
        {"id": "two", **pair},
        {"id": "even", **pair, "answer": "SHORT", "reference": "short"},
        {"id": "same", **pair, "answer": "short"},
        {"id": "empty", **pair, "answer": " "},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    path = write_judge(tmp_path, mock)
    path.write_text(path.read_text().replace('corpus = "store"', 'pairs = "pairs.jsonl"'))
    done = harvester("judge", path, "--verdicts", tmp_path / "verdicts.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["rows"], facts["win"], facts["tie"]) == (3, 1, 1)
    assert facts["left_out"] == {"blank": 1, "equal_answers": 1}
    assert mock.state()["received"] == 4
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(each["id"], each["winner"], each["left_out"]) for each in verdicts] == [
        *(("one", "win", None), ("two", "win", None), ("even", "tie", None)),
        *(("same", None, "equal_answers"), ("empty", None, "blank")),
    ]
    assert verdicts[0]["orders"] == {"ab": "win", "ba": "win"}
    assert verdicts[0]["key"] == verdicts[1]["key"]
    for line, words in (('{"prompt": "x"}', "pairs.jsonl:1"), ("[", "is no JSON")):
        (tmp_path / "pairs.jsonl").write_text(line)
        refused = harvester("judge", path)
        assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
    path.write_text(path.read_text() + 'corpus = "store"\n')
    both = harvester("judge", path)
    assert (both.returncode, "either corpus" in both.stderr) == (2, True)


@pytest.mark.parametrize(
    "target", ["judge.toml", "pairs.jsonl", "notes.txt", "no/v.jsonl", "judged/v.jsonl", "."]
)
def test_verdicts_never_replace_another_file_and_that_is_said_before_anything_is_paid(
    tmp_path: Path, mock_teacher: Mocks, target: str
) -> None:
    mock = mock_teacher()
    path = write_judge(tmp_path, mock)
    path.write_text(path.read_text().replace('corpus = "store"', 'pairs = "pairs.jsonl"'))
    pair = {"id": "a", "prompt": "What is 1 + 2?", "answer": "3", "other": "4"}
    (tmp_path / "pairs.jsonl").write_bytes(json.dumps(pair, separators=(",", ":")).encode() + b"\n")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "judged").mkdir()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    done = harvester("judge", path, "--verdicts", tmp_path / target)
    assert (done.returncode, "error[config]" in done.stderr) == (2, True), done.stderr
    assert mock.totals()["requests"] == 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_another_rubric_judges_anew_and_the_old_verdicts_do_not_count(
    harvested: Path, mock_teacher: Mocks
) -> None:
    mock = mock_teacher(faults=[{"action": "content", "value": '{"score": 3}', "every": 1}])
    path = write_judge(harvested, mock, 'rubric = "mine.j2"\nhighest = 5')
    missing = harvester("judge", path)
    assert (missing.returncode, "mine.j2" in missing.stderr) == (2, True)
    (harvested / "mine.j2").write_text("{{ question }} / {{ answer }} / {{ reference is none }}")
    assert judged(path)["judged"] == ROWS
    (harvested / "mine.j2").write_text("Grade {{ answer }} to {{ question }}")
    before = harvester("curate", curate_file(harvested))
    assert (before.returncode, "has judged no answer by this rubric" in before.stderr) == (2, True)
    assert judged(path)["mean_score"] == 3
    assert mock.state()["received"] == 2 * ROWS


def curate_file(folder: Path) -> Path:
    path = folder / "curate.toml"
    entry = '{judge = {config = "judge.toml", at_least = 2}}'
    path.write_text(f'corpus = "store"\nout = "out"\nfilters = [{entry}]\n')
    return path


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ('[prompts]\nfiles = ["a.jsonl"]', "leave out [prompts] files"),
        ("lowest = 5\nhighest = 5", "lowest must be less than highest"),
        ('against = "nowhere"', "no answers are stored in"),
        ("rubrik = 1", "did you mean 'rubric'"),
    ],
)
def test_a_wrong_judge_is_refused_in_words(
    harvested: Path, mock_teacher: Mocks, more: str, what: str
) -> None:
    done = harvester("judge", write_judge(harvested, mock_teacher(), more))
    assert done.returncode == 2
    assert what in done.stderr


def test_a_judge_whose_terms_forbid_it_neither_judges_nor_chooses(
    harvested: Path, mock_teacher: Mocks
) -> None:
    mock = mock_teacher(accuracy=1.0)
    path = write_judge(harvested, mock)
    path.write_text(path.read_text().replace('terms = "mock-teacher"\n', "").replace("mock-teacher", "gpt-x"))
    refused = harvester("judge", path)
    assert refused.returncode == 77
    assert mock.state()["received"] == 0
    write_judge(harvested, mock, '[run]\npurpose = "eval"')
    assert judged(path)["judged"] == ROWS
    chosen = harvester("curate", curate_file(harvested))
    assert chosen.returncode == 77, chosen.stderr
