"""Harvest in batches over real sockets: the states of a batch, both transports, everything paid once."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest

from harvester.errors import ConfigError
from harvester.mock_teacher.settings import BatchSettings
from harvester.run.prepare import look_ahead, prepare
from harvester.store.reader import Corpus
from tests.harvester.run.batch_bench import (
    HOUR,
    batches,
    harvest,
    require_whole,
    stop_when_waiting,
    sums,
    waiting,
)

ROWS = 12


def test_a_batch_harvest_ends_like_an_online_one_with_the_same_rows_at_the_batch_price(
    mock_teacher, tmp_path: Path
):
    rows = {}
    for transport in ("online", "batch"):
        mock = mock_teacher(
            accuracy=1.0, batches=BatchSettings(latency_s=5 * HOUR, tick_s=HOUR, shuffle=True)
        )
        root = tmp_path / transport
        root.mkdir()
        ended = harvest(mock, root, sums(ROWS), transport=transport)
        assert ended.exit_code == 0
        require_whole(ended.store, mock, ROWS)
        tokens = ended.totals.input_tokens, ended.totals.output_tokens
        assert tokens == (ended.billed["prompt_tokens"], ended.billed["completion_tokens"])
        price = 2 if transport == "online" else 1
        samples = list(Corpus.open(ended.store).samples())
        for sample in samples:
            assert sample.cost_microusd == price * (sample.input_tokens + 2 * sample.output_tokens)
            assert orjson.loads(sample.raw)["choices"][0]["message"]["content"] == sample.completion
        rows[transport] = {(s.prompt_id, s.completion, s.outcome, s.purpose, s.terms_id) for s in samples}
    assert rows["online"] == rows["batch"]
    again = harvest(mock, root, sums(ROWS), transport="online")
    assert (again.billed["requests"], again.exit_code) == (0, 0)


def test_keys_are_those_of_single_requests_also_with_streams_and_samples(mock_teacher, tmp_path: Path):
    mock = mock_teacher()
    sampling = {"samples": 3, "temperature": 1.0, "stream": True}
    ended = harvest(mock, tmp_path, sums(4), sampling=sampling)
    assert (ended.exit_code, ended.billed["answers"]) == (0, 12)
    again = harvest(mock, tmp_path, sums(4), transport="online", sampling=sampling)
    assert (again.exit_code, again.billed["answers"]) == (0, 0)


@pytest.mark.parametrize(
    ("api", "files"), [({"max_requests": 5}, 3), ({"max_requests": 12}, 1), ({"max_bytes": 1000}, None)]
)
def test_files_are_filled_up_to_the_bounds(mock_teacher, tmp_path: Path, api, files):
    mock = mock_teacher(batches=BatchSettings(**api))
    ended = harvest(mock, tmp_path, sums(ROWS), api=api)
    assert ended.exit_code == 0
    require_whole(ended.store, mock, ROWS)
    served = mock.batches()["served"]["create"]
    assert served == files if files is not None else 1 < served < ROWS


def test_a_row_too_large_for_any_batch_fails_or_is_asked_online(mock_teacher, tmp_path: Path):
    mock = mock_teacher()
    prompts = [*sums(3), "x" * 2000]
    ended = harvest(mock, tmp_path, prompts, api={"max_bytes": 1000})
    assert [letter["code"] for letter in ended.letters] == ["prompt_rejected"]
    again = harvest(mock, tmp_path, prompts, transport="hybrid", api={"max_bytes": 1000})
    assert again.billed["requests"] == 0  # a rejected row is not asked again by itself
    (tmp_path / "other").mkdir()
    other = harvest(mock, tmp_path / "other", prompts, transport="hybrid", api={"max_bytes": 1000})
    assert (other.exit_code, other.billed["requests"]) == (0, 4)


def test_equal_prompts_share_one_line(mock_teacher, tmp_path: Path):
    mock = mock_teacher()
    ended = harvest(mock, tmp_path, ["What is 1 + 1?"] * 3)
    assert (ended.exit_code, ended.billed["requests"]) == (0, 1)


def test_a_run_that_ends_meanwhile_leaves_its_batch_to_the_next_one(mock_teacher, tmp_path: Path):
    """The first run ends at its time limit; the batch goes on; the second run collects it."""
    mock = mock_teacher(batches=BatchSettings(latency_s=20 * HOUR))
    first = harvest(mock, tmp_path, sums(ROWS), watch=stop_when_waiting(tmp_path))
    assert first.exit_code == 10
    held = waiting(first.store)
    assert (held.batches, held.rows, batches(first.store)) == (1, ROWS, [("created", "in_progress")])
    assert held.reserved_microusd > 0
    mock.advance(20 * HOUR)
    second = harvest(mock, tmp_path, sums(ROWS))
    assert (second.exit_code, second.totals.paid_twice) == (0, 0)
    require_whole(first.store, mock, ROWS)
    assert mock.batches()["served"]["create"] == 1


def test_an_online_run_asks_nothing_that_a_batch_may_still_answer(mock_teacher, tmp_path: Path):
    mock = mock_teacher(batches=BatchSettings(latency_s=20 * HOUR))
    harvest(mock, tmp_path, sums(ROWS), watch=stop_when_waiting(tmp_path))
    online = harvest(mock, tmp_path, sums(ROWS + 3), transport="online")
    assert (online.exit_code, online.billed["requests"]) == (10, 3)
    assert "with 12 rows" in online.output
    mock.advance(20 * HOUR)
    last = harvest(mock, tmp_path, sums(ROWS + 3), transport="online")
    assert last.exit_code == 0
    require_whole(last.store, mock, ROWS + 3)


def test_answers_belong_to_the_run_that_sent_the_batch(mock_teacher, tmp_path: Path):
    """A batch sent for evaluation stays so, whatever the run that collects it is for."""
    mock = mock_teacher(batches=BatchSettings(latency_s=HOUR))
    harvest(mock, tmp_path, sums(3), run={"purpose": "eval"}, watch=stop_when_waiting(tmp_path))
    mock.advance(HOUR)
    ended = harvest(mock, tmp_path, sums(3), run={"purpose": "train"})
    assert ended.exit_code == 0
    assert {sample.purpose for sample in Corpus.open(ended.store).samples()} == {"eval"}


def test_hybrid_asks_online_what_is_late_once_the_batch_is_dead(mock_teacher, tmp_path: Path):
    mock = mock_teacher(batches=BatchSettings(latency_s=10 * HOUR, cancelling_s=HOUR))
    mock.advance(0)
    ended = harvest(
        mock,
        tmp_path,
        sums(ROWS),
        transport="hybrid",
        batch={"patience": 0.05},
        watch=lambda status: mock.advance(HOUR) if "batch" in status["waiting"] else None,
    )
    assert ended.exit_code == 0
    require_whole(ended.store, mock, ROWS)
    served = mock.batches()["served"]
    assert served["cancel"] >= 1
    [batch] = mock.batches()["batches"]
    assert batch["status"] == "cancelled"
    assert mock.state()["admitted"] > 0
    assert batch["request_counts"]["completed"] < ROWS
    assert batches(ended.store) == [("ended", "cancelled")]


def test_hybrid_asks_online_before_the_deadline(mock_teacher, tmp_path: Path):
    """The run ends in half an hour, and needs an hour for what is left: its batch is late from the start."""
    mock = mock_teacher(batches=BatchSettings(latency_s=10 * HOUR))
    finish_by = f"{datetime.now(UTC) + timedelta(minutes=30):%Y-%m-%dT%H:%M:%SZ}"
    schedule = {"finish_by": finish_by}
    ended = harvest(mock, tmp_path, sums(ROWS), transport="hybrid", schedule=schedule, batch={"lead": "1h"})
    assert ended.exit_code == 0
    require_whole(ended.store, mock, ROWS)
    assert batches(ended.store) == [("ended", "cancelled")]


def test_accepting_asks_further_samples_in_further_batches(mock_teacher, tmp_path: Path):
    mock = mock_teacher(accuracy=0.3)
    prompts = [{"prompt": text, "reference": str(8 * n), "tags": ["sum"]} for n, text in enumerate(sums(6))]
    ended = harvest(
        mock,
        tmp_path,
        prompts,
        sampling={"temperature": 1.0},
        accept={"per_prompt": 1, "of": 6},
        **{"verify.sum": {"kind": "exact"}},
    )
    assert ended.exit_code == 0
    assert mock.batches()["served"]["create"] > 1
    assert 6 < ended.billed["answers"] <= 36
    assert mock.state()["admitted"] == ended.billed["requests"]


def test_plan_counts_the_price_of_batches(mock_teacher, tmp_path: Path):
    mock = mock_teacher()
    usd = {}
    for transport in ("online", "batch"):
        harvest(mock, tmp_path, sums(2), transport=transport)
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "What is 1 + 2?"}) + "\n")
        usd[transport] = look_ahead(tmp_path / "harvest.toml").high_usd
    assert usd["batch"] == pytest.approx(usd["online"] / 2, rel=0.05)


def test_budgets_reserve_a_batch_whole_and_count_it_for_the_store(mock_teacher, tmp_path: Path):
    """A ceiling that the most expensive answers would break sends smaller batches, one after the other."""
    mock = mock_teacher(batches=BatchSettings(latency_s=HOUR, tick_s=HOUR / 4))
    reasons: list[str] = []
    # A row reserves some 200 tokens and costs 12.
    ended = harvest(
        mock,
        tmp_path,
        sums(ROWS),
        budget={"store": {"tokens": 800}},
        watch=lambda status: reasons.append(status["waiting"]),
    )
    assert ended.exit_code == 0
    short = "the budget of this store takes no further row until they are billed"
    assert any(reason.endswith(short) for reason in reasons)  # why the batches are small
    require_whole(ended.store, mock, ROWS)
    assert mock.batches()["served"]["create"] > 2
    (tmp_path / "small").mkdir()
    small = harvest(mock, tmp_path / "small", sums(ROWS), budget={"tokens": 260})
    assert small.exit_code == 10
    assert 0 < small.billed["requests"] < ROWS


def test_a_batch_of_an_earlier_run_counts_for_the_budget_of_the_store(mock_teacher, tmp_path: Path):
    mock = mock_teacher(batches=BatchSettings(latency_s=20 * HOUR))
    harvest(mock, tmp_path, sums(4), watch=stop_when_waiting(tmp_path))
    held = waiting(tmp_path / "store").reserved_tokens
    ceiling = {"store": {"tokens": held + 10}}
    other = harvest(mock, tmp_path, [*sums(4), "What is 5 + 5?"], transport="online", budget=ceiling)
    assert (other.exit_code, other.billed["requests"]) == (10, 0)
    mock.advance(20 * HOUR)
    # The new row may ask for its budget before the batch is collected: the run then ends as at any ceiling,
    # and the next one goes on.
    last = harvest(mock, tmp_path, [*sums(4), "What is 5 + 5?"], transport="online", budget=ceiling)
    if last.exit_code == 10:
        last = harvest(mock, tmp_path, [*sums(4), "What is 5 + 5?"], transport="online", budget=ceiling)
    assert last.exit_code == 0
    require_whole(last.store, mock, 5)


@pytest.mark.parametrize(
    ("teacher", "named"),
    [
        ('preset = "deepseek"', "deepseek has no Batch API"),
        (
            'base_url = "https://api.mistral.ai/v1"\nmodel = "mistral-small-latest"',
            "mistral has no Batch API",
        ),
    ],
)
def test_a_provider_without_batches_is_refused_by_name(tmp_path: Path, monkeypatch, teacher, named):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
    path = tmp_path / "harvest.toml"
    tables = '[prompts]\nfiles = ["p.jsonl"]\n[run]\ntransport = "batch"\npurpose = "eval"\n'
    extra = "" if "preset" in teacher else 'terms = "mistral-api-2026-08-05"\n'
    path.write_text(f"[teacher]\n{teacher}\n{extra}{tables}")
    monkeypatch.setenv("DEEPSEEK_API_KEY", "k" * 20)
    with pytest.raises(ConfigError, match=named) as caught:
        prepare(path)
    assert "openai" in caught.value.remedy
