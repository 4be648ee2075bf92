"""Send answers in the shapes of real servers through a whole run, and check what is stored of each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import MockSettings
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from tests.faults.bench import POISON, Ended, run_harvest

ANSWER = "78"
THOUGHT = "Let me add."


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of the second of three answers, and what must be stored of it.

    `number` is the row of the fault catalogue. `streams` says in which modes it is tried.
    """

    number: int
    fault: Mapping[str, Any]
    outcome: str = "ok"
    text: str | None = ANSWER
    reasoning: str | None = None
    streams: tuple[bool, ...] = (False, True)
    usage: str = "reported"
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([str(self.number), *(str(value)[:24] for value in self.fault.values())])


WHOLE, STREAM = (False,), (True,)
SHAPES = [
    Shape(69, {"action": "parts"}),
    Shape(69, {"action": "parts", "reasoning": THOUGHT}, reasoning=THOUGHT),
    Shape(69, {"action": "content", "value": {"type": "text", "text": ANSWER}}, streams=WHOLE),
    Shape(69, {"action": "content", "value": 78}, outcome="unknown", text=None, streams=WHOLE),
    Shape(69, {"action": "content", "value": [{"type": "audio", "id": "a"}]}, outcome="unknown", text=None),
    Shape(70, {"action": "reasoning", "value": THOUGHT}, reasoning=THOUGHT),
    Shape(70, {"action": "message", "value": {"thinking": THOUGHT}}, reasoning=THOUGHT),
    Shape(
        70,
        {
            "action": "message",
            "value": {"reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}], "reasoning": None},
        },
        reasoning=THOUGHT,
    ),
    Shape(71, {"action": "think"}, reasoning=THOUGHT),
    Shape(71, {"action": "content", "value": f"<|channel|>final<|message|>{ANSWER}<|return|>"}),
    Shape(71, {"action": "think", "form": "closing"}, reasoning=THOUGHT),
    Shape(71, {"action": "think", "form": "opening"}, outcome="empty", text="", reasoning=THOUGHT),
    *(
        Shape(72, {"action": "finish_reason", "value": word}, outcome=outcome)
        for word, outcome in (
            ("eos_token", "ok"),
            ("max_tokens", "truncated"),
            ("SAFETY", "filtered"),
            ("COMPLETE", "ok"),
            ("content_filter: PROHIBITED_CONTENT", "filtered"),
            ("because", "unknown"),
        )
    ),
    Shape(73, {"action": "no_message"}, outcome="filtered", text=None, streams=WHOLE),
    Shape(73, {"action": "no_message", "value": "length"}, outcome="truncated", text=None, streams=WHOLE),
    Shape(73, {"action": "no_message", "value": "stop"}, outcome="empty", text=None, streams=WHOLE),
    Shape(74, {"action": "blank_content"}, outcome="empty", text="\n\n"),
    Shape(74, {"action": "blank_content", "value": " "}, outcome="empty", text=" "),
    Shape(74, {"action": "blank_content", "value": "\u3000"}, outcome="empty", text="\u3000"),
    *(Shape(75, {"action": "envelope", "value": name}) for name in ("data", "result", "response")),
    Shape(76, {"action": "null_logprobs"}, sampling={"top_logprobs": 2}),
    Shape(76, {"action": "legacy_logprobs"}, sampling={"top_logprobs": 2}, streams=WHOLE),
    Shape(77, {"action": "no_done"}, streams=STREAM),
    Shape(77, {"action": "stream_split_emoji"}, text="\N{GRINNING FACE}" + ANSWER, streams=STREAM),
    Shape(77, {"action": "stream_no_blank_lines"}, streams=STREAM),
    # Read once, but a text this short may have been meant.
    Shape(77, {"action": "stream_twice"}, outcome="unknown", streams=STREAM),
    Shape(77, {"action": "stream_no_finish"}, outcome="unknown", streams=STREAM),
    Shape(77, {"action": "stream_junk", "events": 1}, outcome="unknown", streams=STREAM),
    *(Shape(78, {"action": action}) for action in ("chunk_no_end", "length_no_end", "open_end")),
    Shape(
        78,
        {"action": "around", "prefix": ": keep-alive\n\n", "suffix": "\n\ndata: [DONE]\n\n"},
        streams=WHOLE,
    ),
    Shape(78, {"action": "around", "suffix": "<!-- -->"}, outcome="unknown", streams=WHOLE),
    Shape(78, {"action": "answer_status", "status": 201}),
    Shape(78, {"action": "headers", "value": {"content-encoding": "gzip"}}),
    Shape(79, {"action": "long_header"}),
    Shape(79, {"action": "long_header", "bytes": 8200}),
    Shape(79, {"action": "long_header", "bytes": 60000}),
    Shape(80, {"action": "usage", "value": {"prompt_tokens": 0, "completion_tokens": 0}}, usage="corrected"),
    Shape(80, {"action": "usage", "value": {"prompt_tokens": 99, "completion_tokens": 0}}, usage="corrected"),
    Shape(80, {"action": "usage", "value": {"prompt_tokens": 0, "completion_tokens": 1}}, usage="corrected"),
]
# Rows whose meaning depends on how the answer travels; the others are tried in a stream by the slow tests.
TRAVEL = frozenset({69, 70, 71, 77, 78})
CASES = [
    pytest.param(
        shape,
        stream,
        id=f"{shape}-{stream}",
        marks=[pytest.mark.slow] if stream and shape.number not in TRAVEL else [],
    )
    for shape in SHAPES
    for stream in shape.streams
]


@pytest.fixture(scope="module")
def mock() -> Iterator[RunningMock]:
    with start_in_thread(MockSettings(accuracy={"*": 1.0})) as running:
        yield running
        assert running.state()["errors"] == []


def row_of(ended: Ended) -> Sample:
    (row,) = [row for row in Corpus.open(ended.store).samples() if POISON in str(row.messages)]
    return row


@pytest.mark.parametrize(("shape", "stream"), CASES)
def test_row(shape: Shape, stream: bool, mock: RunningMock, tmp_path: Path) -> None:
    fault = {**shape.fault, "prompt": POISON}
    ended = run_harvest(mock, tmp_path, [fault], sampling={"stream": stream, **shape.sampling})
    assert ended.fired == 1
    assert (ended.exit_code, ended.totals.answers, ended.billed["requests"]) == (0, 3, 3), ended.output
    assert ended.totals.possibly_billed == 0
    row = row_of(ended)
    assert (row.outcome, row.completion, row.reasoning) == (shape.outcome, shape.text, shape.reasoning)
    assert row.usage_source == shape.usage
    if shape.sampling:
        assert row.logprobs is not None
        assert "".join(token["token"] for token in row.logprobs) == ANSWER
        assert row.logprobs[0]["logprob"] is None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A failure inside a 200 or an odd status, and what must come of it; `words` must be quoted."""

    number: int
    fault: Mapping[str, Any]
    exit_code: int
    words: str
    dead: int = 0
    times: int = 1_000_000

    def __str__(self) -> str:
        return "-".join([str(self.number), *(str(value)[:24] for value in self.fault.values())])


MODERATED = {
    "code": 403,
    "message": "Input was flagged",
    "metadata": {"reasons": ["violence"], "flagged_input": "..."},
}
WORDS = "odd words"
REFUSALS = [
    *(
        Refusal(81, {"action": "error_beside", "place": place, "code": 402, "message": WORDS}, 4, WORDS)
        for place in ("top", "choice", "message")
    ),
    Refusal(81, {"action": "error_beside", "place": "choice", "message": WORDS}, 3, WORDS, dead=1),
    Refusal(81, {"action": "error_beside", "code": 502}, 0, "", times=1),
    Refusal(81, {"action": "error_beside", "code": 429}, 0, "", times=1),
    Refusal(82, {"action": "base_resp", "message": "odd words"}, 4, "odd words"),
    Refusal(82, {"action": "base_resp", "code": 1002}, 0, "", times=1),
    Refusal(82, {"action": "base_resp", "code": 7777, "message": "odd words"}, 3, "odd words", dead=1),
    Refusal(82, {"action": "body", "value": {"message": "Too many requests"}}, 0, "", times=1),
    Refusal(83, {"action": "status", "status": 403, "body": {"error": MODERATED}}, 3, "flagged", dead=1),
    Refusal(
        83,
        {"action": "status", "status": 403, "message": "This prompt violates our content policy"},
        3,
        "content policy",
        dead=1,
    ),
    Refusal(
        83,
        {"action": "status", "status": 404, "message": "No endpoints found that support tool use"},
        3,
        "No endpoints found",
        dead=1,
    ),
    Refusal(83, {"action": "status", "status": 404, "code": "model_not_found", "message": WORDS}, 4, WORDS),
    Refusal(83, {"action": "status", "status": 400, "code": "content_filter"}, 3, "moderated", dead=1),
    *(
        Refusal(84, {"action": "status", "status": status}, 0, "", times=1)
        for status in (498, 499, 420, 460, 444)
    ),
    Refusal(84, {"action": "status", "status": 400, "body": ""}, 0, "", times=1),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refusal_row(refusal: Refusal, mock: RunningMock, tmp_path: Path) -> None:
    ended = run_harvest(mock, tmp_path, [{**refusal.fault, "prompt": POISON, "times": refusal.times}])
    assert ended.fired >= 1
    assert ended.exit_code == refusal.exit_code, ended.output
    assert ended.totals.dead == refusal.dead
    if refusal.dead:
        assert refusal.words in ended.letters[0]["message"]
    elif refusal.words:
        assert refusal.words in ended.output
        assert ended.fired == 1, "the first of them is reason enough"
    else:
        assert ended.outcomes == {"ok": 3}


@pytest.mark.parametrize(
    "fault",
    [
        {"action": "status", "status": 403, "message": "this key may not list models"},
        {"action": "status", "status": 401, "message": "Missing scopes: api.model.read"},
        {"action": "status", "status": 405},
    ],
    ids=lambda fault: str(fault["status"]),
)
def test_row_85_a_key_that_may_chat_but_not_list_models(
    fault: dict[str, Any], mock: RunningMock, tmp_path: Path
) -> None:
    ended = run_harvest(mock, tmp_path, [{**fault, "on": "models"}])
    assert ended.fired >= 1
    assert (ended.exit_code, ended.outcomes) == (0, {"ok": 3})
