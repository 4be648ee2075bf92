"""Answers that were read wrong, bills that were talked down, and waits that never ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harvester.api import batches
from harvester.api.replies import completion
from harvester.api.types import Outcome
from harvester.errors import TeacherError
from harvester.store.maintain.purge import purge_store
from harvester.store.where import Where
from tests.hostile.runs import Harvest, harvest
from tests.hostile.server import completion as good_body
from tests.hostile.server import hostile_teacher, http
from tests.tiers import rest_is_slow


def stream(*deltas: Any) -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": delta}}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return (
        b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    )


@pytest.mark.parametrize(
    "deltas",
    [
        ([{"type": "text", "text": "The "}], "answer ", "is ", "4"),
        ("The ", [{"type": "text", "text": "answer "}], [{"type": "text", "text": "is 4"}]),
        ("The answer ", None, "is 4"),
        ("The answer ", "", [], "is 4"),
    ],
    ids=range(4),
)
def test_a_streamed_answer_in_parts_is_read_whole(deltas: tuple[Any, ...]) -> None:
    parsed = completion.parse(stream(*deltas))
    assert (parsed.text, parsed.outcome) == ("The answer is 4", Outcome.OK)


@pytest.mark.parametrize("odd", [0, False, {}, 5, {"x": 1}, [0], [[]], [{"type": "text"}]], ids=repr)
def test_a_streamed_piece_that_is_not_understood_is_never_ok_without_its_text(odd: Any) -> None:
    parsed = completion.parse(stream("The answer ", odd, "is 4"))
    assert parsed.outcome is Outcome.UNKNOWN or parsed.text == "The answer is 4"


def harvest_priced(root: Path, body: dict[str, Any], *, rows: int, usd: float) -> Harvest:
    """Harvest from a teacher that gives each row this answer, a micro-dollar a token, with a budget."""
    prompts = [f"row {number}" for number in range(rows)]
    with hostile_teacher({prompt: http(json.dumps(body).encode()) for prompt in prompts}) as teacher:
        return harvest(
            root,
            teacher.base_url,
            prompts,
            teacher={"price": {"input": 1.0, "output": 1.0, "as_of": "2026-11-01"}},
            budget={"usd": usd},
        )


def test_reasoning_beyond_max_tokens_exceeds_a_ceiling_only_until_it_was_seen(tmp_path: Path) -> None:
    body = json.loads(good_body("four")) | {"usage": {"prompt_tokens": 5, "completion_tokens": 5000}}
    prompts = [f"row {number}" for number in range(6)]
    teacher = {
        "price": {"input": 1.0, "output": 1.0, "as_of": "2026-11-01"},
        "limits": {"max_concurrency": 1},
    }
    with hostile_teacher({prompt: http(json.dumps(body).encode()) for prompt in prompts}) as server:

        def asked(root: Path, usd: float) -> int:
            server.asked.clear()
            root.mkdir(exist_ok=True)
            ended = harvest(root, server.base_url, prompts, teacher=teacher, budget={"usd": usd})
            assert ended.exit_code == 10, ended.output
            return len(server.asked)

        # An answer costs 5,005 micro-dollars, and 200 of them were reserved before the first one came.
        assert asked(tmp_path / "a", 0.012) == 2
        assert asked(tmp_path / "b", 0.004) == 1
        assert asked(tmp_path / "b", 0.004) == 0  # the next run knows it
        assert asked(tmp_path / "b", 0.0052) == 1


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": 50, "completion_tokens": 0},
        {"prompt_tokens": 50, "completion_tokens": 1},
        {"prompt_tokens": -1, "completion_tokens": -1},
        {"prompt_tokens": True, "completion_tokens": False},
        {"prompt_tokens": 0.0, "completion_tokens": 1e-9},
        {"prompt_tokens": "0", "completion_tokens": "0"},
    ],
    ids=range(7),
)
def test_a_bill_can_not_be_talked_down(usage: dict[str, Any], tmp_path: Path) -> None:
    body = json.loads(good_body("word " * 100))
    body["usage"] = usage
    ended = harvest_priced(tmp_path, body, rows=60, usd=0.001)
    assert ended.exit_code == 10  # 100 words are at least 25 tokens: 40 answers use the budget up
    assert len(ended.answered) < 45


def test_reasoning_that_only_the_total_shows_uses_the_budget_up(tmp_path: Path) -> None:
    body = json.loads(good_body("word " * 100))
    body["usage"] = {"prompt_tokens": 12, "completion_tokens": 60, "total_tokens": 572}
    ended = harvest_priced(tmp_path, body, rows=30, usd=0.002)
    assert ended.exit_code == 10
    assert 0 < len(ended.answered) < 15  # 572 of 2,000 micro-dollars each; 27 answers at 72


@pytest.mark.parametrize("top", [1, True, "x", {"a": "b"}, [1], [[]], [{"token": 5}]], ids=repr)
def test_odd_log_probabilities_lose_no_answer(top: Any) -> None:
    body = json.loads(good_body("4"))
    body["choices"][0]["logprobs"] = {"content": [{"token": "4", "logprob": -1, "top_logprobs": top}]}
    raw = json.dumps(body).encode()
    for logprobs in (True, False):
        assert completion.parse(raw, logprobs=logprobs).outcome is Outcome.OK


@pytest.mark.parametrize("code", ["²", "9" * 5_000, 10**30, 1e400, [], {}, None, "٤٢٩"], ids=range(8))
def test_an_error_with_an_odd_code_is_an_error(code: Any) -> None:
    raw = json.dumps({"error": {"message": "no", "code": code}}).encode()
    with pytest.raises(TeacherError):
        completion.parse(raw)


@pytest.mark.parametrize("after", rest_is_slow(["0", "1", None], first=1))
@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_one_row_that_is_always_refused_is_given_up(after: str | None, status: str, tmp_path: Path) -> None:
    headers = {} if after is None else {"retry-after": after}
    prompts = [f"row {number}" for number in range(40)]
    with hostile_teacher({"evil": http(b"{}", headers, status)}) as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["evil", *prompts], run={"patience_s": 60})
    assert set(ended.answered) >= set(prompts)
    assert ended.exit_code in {3, 10}
    assert teacher.asked.count("evil") < 40


@pytest.mark.parametrize("after", ["0", "1", None])
def test_a_teacher_that_refuses_everything_ends_the_run_after_its_patience(
    after: str | None, tmp_path: Path
) -> None:
    headers = {} if after is None else {"retry-after": after}
    prompts = [f"row {number}" for number in range(8)]
    refused = http(b"{}", headers, "429 Too Many Requests")
    with hostile_teacher(dict.fromkeys(prompts, refused)) as teacher:
        ended = harvest(tmp_path, teacher.base_url, prompts, run={"patience_s": 30})
    assert ended.exit_code == 10, ended.output
    assert not ended.answered


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "[]",
        '"x"',
        "{}",
        '{"custom_id": 5}',
        '{"custom_id": "a", "response": []}',
        "[" * 5000,
        "{",
        "\x00",
    ],
    ids=range(9),
)
def test_odd_lines_of_batch_results_are_read_or_named(line: str) -> None:
    try:
        batches.read_line(line.encode())
    except (TeacherError, ValueError):
        return


def test_an_answer_of_a_strange_model_names_the_way_out(tmp_path: Path) -> None:
    body = json.loads(good_body("4"))
    body["model"] = "gpt-4o"
    with hostile_teacher({"strange": http(json.dumps(body).encode())}) as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["good", "strange"])
        assert ended.exit_code == 77
        again = harvest(tmp_path, teacher.base_url, ["good", "strange"])
        assert again.exit_code == 77
        condition = 'response_model = ["gpt-4o"]'
        assert f"`harvester purge STORE --where '{condition}'`" in again.output
        assert purge_store(ended.store, None, None, Where.parse(condition, "--where")) == 1
        teacher.replies.clear()
        assert harvest(tmp_path, teacher.base_url, ["good", "strange"]).exit_code == 0
