"""Split a harvest with `--shard`, and merge its stores: together they are what one run stores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.api.request_key import owner
from harvester.config.overrides import Overrides
from harvester.config.shard import Shard
from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock
from harvester.run import job, prepare
from harvester.run.endings import Summary
from harvester.store.journal.journal import Journal
from harvester.store.maintain.merge import merge
from harvester.store.reader import Corpus
from tests.harvester.store_rows import verified

Mock = Callable[..., RunningMock]
# Columns of a row that its run does not decide.
OF_THE_ROW = (
    *("key", "prompt_id", "sample_index", "messages", "completion", "outcome", "finish_reason", "reference"),
    *("tags", "metadata_json", "source_file", "source_line", "request_json", "teacher_id", "endpoint"),
    *("request_model", "response_model", "terms_id", "purpose", "mock", "input_tokens", "output_tokens"),
    *("cost_microusd", "attempts", "former_key"),
)


def write(root: Path, mock: RunningMock, prompts: int, more: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"p{n}", "prompt": f"What is {n} + {n % 7}?", "n": n} for n in range(prompts)]
    rows.append({"id": "twin", "prompt": rows[-2]["prompt"], "n": -1})
    (root / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / "harvest.toml"
    path.write_text(
        f'[teacher]\nbase_url = "{mock.base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        'max_n = 3\n[prompts]\nfiles = ["p.jsonl"]\n' + (more or "[sampling]\nmax_tokens = 64\nsamples = 2\n")
    )
    return path


def run(path: Path, shard: str | None = None, **flags: Any) -> Summary:
    prepared = prepare.prepare(path, Overrides(shard=shard, **flags))
    return asyncio.run(job.run(prepared, lambda _: None))


def rows_of(store: Path) -> list[tuple[str, ...]]:
    samples = Corpus.open(store).samples()
    return sorted(tuple(str(getattr(row, name)) for name in OF_THE_ROW) for row in samples)


def test_the_stores_of_four_shards_are_together_what_one_run_stores(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher(accuracy=1.0, max_n=3)
    whole = write(tmp_path / "whole", mock, 60)
    run(whole)
    once = mock.totals()
    split = write(tmp_path / "split", mock, 60)
    stores = []
    for number in range(1, 5):
        summary = run(split, f"{number}/4")
        assert (summary.exit_code, "--shard" in summary.resume) == (0, True)
        stores.append(Path(summary.store))
        for row in Corpus.open(stores[-1]).samples(["key", "sample_index"]):
            assert row.sample_index or owner(bytes.fromhex(row.key), 4) == number - 1
    assert [store.name for store in stores] == [f"store-{number}-of-4" for number in range(1, 5)]
    twice = mock.totals()
    # Each prompt was asked once, and its samples in one request, as by one run.
    assert {name: twice[name] - once[name] for name in ("answers", "requests")} == {
        name: once[name] for name in ("answers", "requests")
    }
    merged = merge(stores, tmp_path / "split" / "store")
    assert (merged.answers, merged.failed, merged.repeated) == (120, 0, 0)
    assert rows_of(tmp_path / "split" / "store") == rows_of(tmp_path / "whole" / "store")
    facts, findings = verified(tmp_path / "split" / "store", repair=False)
    assert (findings, facts["billed"]) == (0, 120)
    # The whole harvest goes on from there, and asks nothing.
    summary = run(split)
    assert (summary.exit_code, summary.counts.requests_sent, summary.counts.from_cache) == (0, 0, 122)


def test_a_shard_has_its_part_of_limits_and_budget(mock_teacher: Mock, tmp_path: Path) -> None:
    more = (
        "[teacher.limits]\nrequests_per_minute = 600\ntokens_per_day = 8000\nmax_concurrency = 10\n"
        "[teacher.price]\ninput = 1.0\noutput = 1.0\n[budget]\nusd = 8.0\nday = {tokens = 9}\n"
        '[accept]\nper_prompt = 1\nof = 2\nuntil = 7\n[verify.sum]\nkind = "exact"\n'
    )
    path = write(tmp_path, mock_teacher(), 20, more)
    parts = [prepare.prepare(path, Overrides(shard=f"{n}/4", usd=4.0, tokens=5)) for n in range(1, 5)]
    limits = [part.config.teacher.limits for part in parts]
    assert {limit.requests_per_minute for limit in limits} == {150.0}
    assert {limit.tokens_per_day for limit in limits} == {2000.0}
    assert [limit.max_concurrency for limit in limits] == [3, 3, 2, 2]
    assert {part.config.budget.usd for part in parts} == {2.0}
    assert [part.config.budget.day.tokens for part in parts] == [3, 2, 2, 2]
    assert [part.config.accept.until for part in parts if part.config.accept] == [2, 2, 2, 1]
    assert [(part.flags.usd, part.flags.tokens) for part in parts] == [(1.0, 2), *[(1.0, 1)] * 3]
    assert sum(part.rows_total for part in parts) == prepare.prepare(path).rows_total == 21
    plans = [prepare.look_ahead(path, Overrides(shard=f"{n}/4")).rows for n in range(1, 5)]
    assert sum(plans) == prepare.look_ahead(path).rows
    assert any(line.startswith("shard   2/4: 1/4 of") for line in parts[1].lines())
    assert prepare.look_ahead(path, Overrides(shard="2/4")).lines()[0].startswith("shard     2/4: 1/4 of")
    assert not any(line.startswith("shard") for line in prepare.look_ahead(path).lines())


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "1/10001", "-1/4"])
def test_what_is_no_shard_is_refused(mock_teacher: Mock, tmp_path: Path, text: str) -> None:
    path = write(tmp_path, mock_teacher(), 3)
    with pytest.raises(ConfigError, match="is no shard"):
        prepare.prepare(path, Overrides(shard=text))
    path.write_text(path.read_text() + f'[run]\nshard = "{text}"\n')
    with pytest.raises(ConfigError, match="is no shard"):
        prepare.prepare(path)


def test_a_shard_of_the_file_counts_and_scoring_needs_a_way(mock_teacher: Mock, tmp_path: Path) -> None:
    path = write(tmp_path, mock_teacher(), 3)
    path.write_text(path.read_text() + '[run]\nshard = "2/3"\n')
    assert prepare.prepare(path).store.name == "store-2-of-3"
    assert prepare.prepare(path, Overrides(shard="3/3")).store.name == "store-3-of-3"
    score = write(tmp_path, mock_teacher(), 3, "[score]\n")
    with pytest.raises(ConfigError, match="the way in which texts are scored"):
        prepare.prepare(score, Overrides(shard="1/2"))


def test_parts_add_up() -> None:
    for whole in (8, 9, 100, 10**9 + 7):
        assert sum(Shard(number, 8).count(whole) for number in range(1, 9)) == whole
    assert [Shard(number, 3).count(2) for number in (1, 2, 3)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("more", "shards", "place", "words"),
    [
        ("[teacher.limits]\nmax_concurrency = 2\n", 20, "teacher.limits.max_concurrency", "by 20 shards"),
        ("[budget]\ntokens = 2\n", 3, "budget.tokens", "0 of 2 tokens"),
        ("[budget]\nday = {tokens = 2}\n", 3, "budget.day.tokens", "0 of 2 tokens"),
        ("[budget]\ntokens = 299\n[sampling]\nmax_tokens = 100\n", 3, "budget.tokens", "99 of 299 tokens"),
        (
            '[accept]\nper_prompt = 1\nof = 2\nuntil = 2\n[verify.sum]\nkind = "exact"\n',
            3,
            "accept.until",
            "until = 2",
        ),
    ],
)
def test_what_the_shards_cannot_share_is_refused_by_run_and_plan(
    mock_teacher: Mock, tmp_path: Path, more: str, shards: int, place: str, words: str
) -> None:
    path = write(tmp_path, mock_teacher(), 3, more)
    for number in (1, shards):
        for ask in (prepare.prepare, prepare.look_ahead):
            with pytest.raises(ConfigError, match=words) as caught:
                ask(path, Overrides(shard=f"{number}/{shards}"))
            assert (caught.value.place, "fewer" in caught.value.remedy) == (place, True)
    assert prepare.prepare(path, Overrides(shard="2/2")).store.name == "store-2-of-2"


def test_a_ceiling_of_the_command_line_is_shared_too(mock_teacher: Mock, tmp_path: Path) -> None:
    path = write(tmp_path, mock_teacher(), 3)
    with pytest.raises(ConfigError, match="one answer may take 64") as caught:
        prepare.prepare(path, Overrides(shard="2/3", tokens=191))
    assert caught.value.place == "--max-tokens"
    assert prepare.prepare(path, Overrides(shard="2/3", tokens=192)).flags.tokens == 64


def test_failed_rows_and_pauses_come_along(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    path = write(tmp_path, mock, 20, "[sampling]\nmax_tokens = 64\n[run]\nmax_failed = 9\n")
    mock.set_faults([{"action": "status", "status": 400, "prompt": "What is 4 + 4?"}])
    stores = [Path(run(path, f"{number}/2").store) for number in (1, 2)]
    merged = merge(stores, tmp_path / "store")
    assert (merged.answers, merged.failed) == (19, 1)
    letters = (tmp_path / "store" / "dead_letters.jsonl").read_text().splitlines()
    assert [json.loads(letter)["prompt_id"] for letter in letters] == ["p4"]
    with Journal.open(tmp_path / "store", read_only=True) as journal:
        totals = journal.totals()
    assert (totals.answers, totals.dead, totals.attempts) == (19, 1, 20)
    assert verified(tmp_path / "store", repair=False)[1] == 0
