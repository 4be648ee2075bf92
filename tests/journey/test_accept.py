"""Ask until enough answers pass (`[accept]`): real sockets, a teacher that errs, a real kill and a resume."""

from __future__ import annotations

import json
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.mock_teacher.running import RunningMock
from harvester.run.accept import expected_asked
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, running

Mock = Callable[..., RunningMock]

# Each sample has a seed, and so a body, of its own: the ledger shows an answer that is asked twice.
CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
price = {{input = 1.0, output = 2.0}}
limits = {{max_concurrency = 4}}
[prompts]
files = ["prompts.jsonl"]
[sampling]
temperature = 1.0
seed = 1
max_tokens = 64
[verify."*"]
kind = "numeric"
[accept]
per_prompt = 2
of = 6
{more}
"""


def write_folder(root: Path, base_url: str, prompts: int, more: str = "") -> Path:
    rows = [
        {"id": f"p{n}", "prompt": f"What is {n} + 30?", "reference": str(n + 30)}
        for n in range(10, 10 + prompts)
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = root / "harvest.toml"
    config.write_text(CONFIG.format(base_url=base_url, more=more))
    return config


def run(config: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    done = harvester("run", config, "--json", *flags)
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def asked_and_passed(store: Path) -> dict[str, tuple[int, int]]:
    """How many samples of each prompt are stored, and how many of them are right."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for sample in Corpus.open(store).samples(("prompt_id", "completion", "reference")):
        counts[sample.prompt_id][0] += 1
        counts[sample.prompt_id][1] += sample.completion == sample.reference
    return {prompt_id: (asked, passed) for prompt_id, (asked, passed) in counts.items()}


def require_complete(store: Path, prompts: int) -> None:
    counts = asked_and_passed(store)
    assert len(counts) == prompts
    for asked, passed in counts.values():
        assert passed == 2 or (asked == 6 and passed < 2), "enough passed, or all were asked; never more"
    assert len({asked for asked, _ in counts.values()}) > 2, "the teacher errs often enough to show it"


def test_samples_are_asked_until_enough_pass(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=0.5)
    config = write_folder(tmp_path, mock.base_url, 40)
    before = json.loads(harvester("plan", config, "--json").stdout)
    assert before["rows"] == 240
    assert before["accept"] == {"pass_rate": None, "rows_expected": None, "usd_expected": None}

    result = run(config)
    store = tmp_path / "store"
    require_complete(store, 40)
    counts = asked_and_passed(store)
    asked, passed = (sum(pair[place] for pair in counts.values()) for place in (0, 1))
    assert (result["ending"], result["rows_total"], result["answers_stored"]) == ("complete", asked, asked)
    assert (result["accepted"], result["rejected"], result["unverifiable"]) == (passed, asked - passed, 0)
    totals = mock.totals()
    assert totals["requests"] == totals["bodies"] == asked
    status = json.loads(harvester("status", store, "--json", "--check").stdout)
    assert (status["accepted"], status["rows_left"]) == (passed, 0)

    again = run(config)
    assert (again["requests_sent"], again["accepted"], again["rejected"]) == (0, passed, asked - passed)
    assert mock.totals()["requests"] == asked

    after = json.loads(harvester("plan", config, "--json").stdout)
    assert 0.2 < after["accept"]["pass_rate"] < 0.8
    assert abs(after["accept"]["rows_expected"] - asked) < 0.3 * asked


def test_stored_answers_are_scored_and_curated(mock_teacher: Mock, tmp_path: Path) -> None:
    config = write_folder(tmp_path, mock_teacher(accuracy=0.5).base_url, 20)
    result = run(config)
    store = tmp_path / "store"
    score = harvester("score", store, "--verify", config, "--first", "2", "--json")
    facts = json.loads(score.stdout)["tasks"]["(none)"]
    assert (facts["prompts"], facts["answers"]) == (20, 40)
    assert facts["pass_at"]["1"]["value"] == facts["passed"] / 40
    assert facts["pass_at"]["2"]["value"] > facts["pass_at"]["1"]["value"]
    assert harvester("score", store, "--verify", config, "--k", "0").returncode == 2
    missing = harvester("score", store, "--verify", tmp_path / "prompts.jsonl")
    assert missing.returncode == 2

    curate = tmp_path / "curate.toml"
    curate.write_text('corpus = "store"\nout = "kept"\nfilters = ["finished", "verified"]\n')
    assert "needs a table [verify]" in harvester("curate", curate).stderr
    curate.write_text(curate.read_text() + '[verify."*"]\nkind = "numeric"\n')
    kept = json.loads(harvester("curate", curate, "--json").stdout)
    assert (kept["kept"], kept["dropped"]) == (result["accepted"], {"verify_failed": result["rejected"]})


def test_a_run_ends_when_enough_rows_are_accepted(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=0.5)
    config = write_folder(tmp_path, mock.base_url, 100, more="until = 20")
    result = run(config)
    assert result["ending"] == "accepted"
    # Those in flight at that moment are paid for, and kept.
    assert 20 <= result["accepted"] <= 20 + 4
    sent = mock.totals()["requests"]
    assert sent < 100
    assert harvester("status", tmp_path / "store", "--check").returncode == 0
    again = run(config)
    assert (again["ending"], again["accepted"], again["requests_sent"]) == ("accepted", result["accepted"], 0)
    assert mock.totals()["requests"] == sent

    config.write_text(config.read_text().replace("until = 20", "until = 40"))
    assert run(config)["accepted"] >= 40


def test_a_killed_run_goes_on_and_asks_nothing_twice(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=0.5, latency_s=0.05)
    config = write_folder(tmp_path, mock.base_url, 40)
    with running(config) as process:
        process.until(lambda status: status["rows_total"] > 80 and status["answers_stored"] > 30)
        process.signal(signal.SIGKILL)
        assert process.process.wait(240) == -signal.SIGKILL
    store = tmp_path / "store"
    stored = Corpus.open(store).count()
    result = run(config)
    require_complete(store, 40)
    asked = sum(asked for asked, _ in asked_and_passed(store).values())
    assert result["answers_stored"] == asked - stored
    totals = mock.totals()
    assert totals["bodies"] == asked
    # Only what was on the wire at the kill is asked again.
    assert totals["requests"] - asked <= 4


def test_a_run_that_stops_at_its_budget_is_resumed(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=0.5)
    config = write_folder(tmp_path, mock.base_url, 20, more="[budget]\ntokens = 700")
    first = run(config, code=10)
    assert first["ending"] == "budget"
    assert first["answers_stored"] > 0
    config.write_text(config.read_text().replace("tokens = 700", "tokens = 1000000"))
    second = run(config)
    assert second["ending"] == "complete"
    assert second["answers_stored"] > 0
    require_complete(tmp_path / "store", 20)
    assert mock.totals()["requests"] == mock.totals()["bodies"]


def test_a_failed_row_counts_as_asked(mock_teacher: Mock, tmp_path: Path) -> None:
    refusal = {"action": "status", "status": 400, "nth": 3, "name": "refusal"}
    mock = mock_teacher(accuracy=1.0, faults=[refusal])
    config = write_folder(tmp_path, mock.base_url, 5)
    result = run(config, code=3)
    assert mock.fired() == {"refusal": 1}
    assert (result["dead"], result["accepted"]) == (1, 10), "a further sample takes its place"


def test_a_shared_answer_is_judged_for_each_prompt(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    config = write_folder(tmp_path, mock.base_url, 1)
    rows = [
        {"id": "right", "prompt": "What is 10 + 30?", "reference": "40"},
        {"id": "wrong", "prompt": "What is 10 + 30?", "reference": "41"},
        {"id": "none", "prompt": "What is 10 + 30?"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {"accepted": 2, "rejected": 6, "unverifiable": 6}
    for _ in range(2):
        result = run(config)
        assert {name: result[name] for name in expected} == expected
    assert mock.totals()["requests"] == 6, "the samples of the first prompt are those of the others"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("of = 1", "of = 1 is less than per_prompt = 2"),
        ("of = 6\n[sampling.extra]\nn = 3", "set samples"),
    ],
)
def test_an_impossible_table_is_refused(tmp_path: Path, change: str, problem: str) -> None:
    config = write_folder(tmp_path, "http://127.0.0.1:9/v1", 1)
    config.write_text(config.read_text().replace("of = 6", change))
    done = harvester("plan", config)
    assert done.returncode == 2
    assert problem in done.stderr


def test_accepting_needs_a_verifier_and_no_watch(tmp_path: Path) -> None:
    config = write_folder(tmp_path, "http://127.0.0.1:9/v1", 1)
    assert "--watch" in harvester("run", config, "--watch").stderr
    config.write_text(config.read_text().replace('[verify."*"]\nkind = "numeric"\n', ""))
    assert "needs a verifier" in harvester("plan", config).stderr


@given(st.integers(1, 5), st.integers(0, 8), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_the_expected_number_asked_is_that_of_all_outcomes(need: int, spare: int, rate: float) -> None:
    of = need + spare

    def walk(asked: int, passed: int) -> float:
        if asked == of or passed == need:
            return asked
        return rate * walk(asked + 1, passed + 1) + (1 - rate) * walk(asked + 1, passed)

    assert expected_asked(need, of, rate) == pytest.approx(walk(0, 0))
