"""Feed one mutated input to a parser, and compare the result with what the oracle says.

Each target makes its input from a random generator and returns a sentence for every rule that is broken. An
exception that is not an error of the harvester is caught by the caller and is a finding too.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import orjson

from harvester.api.error_body import EXCERPT_CHARS, classify, retry_after_s
from harvester.api.redaction import Redactor
from harvester.api.replies import choices, completion
from harvester.api.request_builder import requests
from harvester.api.types import Completion, Outcome
from harvester.config.config import HarvestConfig
from harvester.errors import PromptError, TeacherError
from harvester.prompts import formats, reader, recognise
from harvester.prompts.turns import RowError
from harvester.teacher.limiter.limits import MONTH_S
from harvester.teacher.limiter.rate_headers import HeaderPeriods, parse_rate_headers

from . import bodies, keys, mutate, oracle, prompt_rows, texts

Result = tuple[bytes, list[str]]


def valid_answer(random: Random) -> Result:
    """A valid body in any shape: outcome, text, reasoning and tools are those that it was made of."""
    body = bodies.make_body(random)
    truth, broken = body.truth, []
    try:
        parsed = completion._parse(body.raw, 10, True)
    except TeacherError as error:
        return body.raw, [f"refused: {error.message}"]
    if parsed.outcome != truth.outcome:
        broken.append(f"outcome {parsed.outcome}, not {truth.outcome}")
    if truth.text is not None and (parsed.text or "").strip() != truth.text.strip():
        broken.append(f"text {parsed.text!r}, not {truth.text!r}")
    if texts.cyrillic(parsed.reasoning or "") != texts.cyrillic(truth.reasoning):
        broken.append(f"reasoning {parsed.reasoning!r}, not {truth.reasoning!r}")
    if truth.tools and truth.tools not in json.dumps(
        json.loads(parsed.tool_calls_json or "null"), ensure_ascii=False
    ):
        broken.append(f"tools {parsed.tool_calls_json}, not {truth.tools!r}")
    return body.raw, broken


def mutated_answer(random: Random) -> Result:
    """A mutated body: never a row that is `ok` and says something else than the bytes do."""
    body = bodies.make_body(random)
    raw, repeats = _mutated(random, body)
    return raw, check_answer(raw, is_stream=body.is_stream, repeats=repeats)


def _mutated(random: Random, body: bodies.Body) -> tuple[bytes, bool]:
    """Return mutated bytes, and whether whole messages may be repeated in them."""
    way = random.random()
    if way < 0.45:
        return mutate.mutate_bytes(random, body.raw), body.has_snapshots
    if not body.is_stream:
        return bodies.encode(random, mutate.mutate_tree(random, body.document)), False
    chunks = mutate.mutate_tree(random, body.document)
    chunks = chunks if isinstance(chunks, list) else [chunks]
    if way < 0.6 and len(chunks) > 1:
        random.shuffle(chunks)
    if body.has_snapshots:
        return b"\n".join(json.dumps(chunk).encode() for chunk in chunks) + b"\n", True
    events = [b"data: " + json.dumps(chunk).encode() for chunk in chunks]
    if way < 0.8 and events:
        junk = random.choice(
            (b"data: {", b"data: x", b"event: error", b"x: y", b"data: []", b"data: 7", b"data:")
        )
        events.insert(random.randrange(len(events) + 1), junk)
    if way < 0.9:
        events.append(b"data: [DONE]")
    return b"\n\n".join(events) + b"\n\n", False


def check_answer(raw: bytes, *, is_stream: bool, repeats: bool = False) -> list[str]:
    """Return the rules that the parsed body breaks."""
    try:
        parsed = completion._parse(raw, 10, True)
    except TeacherError as error:
        return [] if error.message.isprintable() else ["a message that can't be printed"]
    except RecursionError:
        return [] if raw.count(b"[") + raw.count(b"{") > 200 else ["RecursionError in a flat body"]
    broken = _check_values(parsed)
    if parsed.outcome is Outcome.OK:
        broken += _check_ok(parsed, oracle.spelled(raw, is_stream=is_stream), repeats=repeats)
    return broken


def several_choices(random: Random) -> Result:
    """A mutated body, split for two choices: rows read as they were split, and add up to the bill."""
    body = bodies.make_body(random)
    document, other = body.document, bodies.make_body(random).document
    is_plain = isinstance(document, dict) and isinstance(document.get("choices"), list)
    if is_plain and not body.is_stream and random.random() < 0.7:
        further = other.get("choices") if isinstance(other, dict) else None
        listed = [*document["choices"], *(further if isinstance(further, list) else document["choices"])]
        indexed = [
            {**item, "index": at} if isinstance(item, dict) and random.random() < 0.7 else item
            for at, item in enumerate(listed)
        ]
        raw = bodies.encode(random, mutate.mutate_tree(random, {**document, "choices": indexed}))
    else:
        raw, _ = _mutated(random, body)
    try:
        parsed = choices._split(raw, 2, 10, None)
    except TeacherError as error:
        return raw, [] if error.message.isprintable() else ["a message that can't be printed"]
    except RecursionError:
        return raw, [] if raw.count(b"[") + raw.count(b"{") > 200 else ["RecursionError in a flat body"]
    answers = [answer for answer in parsed.answers if answer is not None]
    broken = [problem for answer in answers for problem in _check_values(answer.completion)]
    broken += ["a row reads otherwise" for a in answers if _reread(a.raw) != a.completion]
    usages = [answer.completion.usage for answer in answers]
    for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"):
        if sum(getattr(usage, name) for usage in usages) != getattr(parsed.usage, name):
            broken.append(f"{name} do not add up")
    return raw, broken


def _reread(raw: bytes) -> Completion | None:
    try:
        return completion._parse(raw, 0, False)
    except TeacherError:
        return None


def _check_values(parsed: Completion) -> list[str]:
    """Return what no answer may hold, whatever its outcome."""
    broken = []
    for name in ("text", "reasoning", "refusal", "tool_calls_json", "model", "response_id", "finish_reason"):
        value = getattr(parsed, name)
        if value is not None and not _is_encodable(value):
            broken.append(f"{name} can't be encoded")
    usage = parsed.usage
    if min(usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens) < 0:
        broken.append("negative tokens")
    return broken


def _check_ok(parsed: Completion, spelled: oracle.Spelled, *, repeats: bool) -> list[str]:
    """Return the rules that a row breaks which is to be learned from."""
    broken = []
    if not (parsed.text or "").strip():
        broken.append("ok without a text")
    if not spelled.is_readable:
        broken.append("ok, though the bytes are neither JSON nor events")
    if not spelled.ends:
        broken.append("ok, though no end is spelled")
    if repeats:
        return broken
    given, thought = texts.greek(parsed.text or ""), texts.cyrillic(parsed.reasoning or "")
    wanted, wanted_thought = "".join(spelled.greek), "".join(spelled.cyrillic)
    if given not in (wanted, spelled.greek_outside_tags):
        broken.append(f"ok with the letters {given!r}, but {wanted!r} are spelled")
    if sorted(thought + texts.cyrillic(parsed.text or "")) != sorted(wanted_thought):
        broken.append(f"reasoning {thought!r}, but {wanted_thought!r} are spelled")
    return broken


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_HEADERS = (
    *(
        "retry-after",
        "retry-after-ms",
        "date",
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
    ),
    *("x-ratelimit-reset-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "ratelimit"),
    *("x-ratelimit-reset-tokens", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"),
    *(
        "ratelimit-limit",
        "ratelimit-remaining",
        "ratelimit-reset",
        "ratelimit-policy",
        "x-ratelimit-limit-second",
    ),
    *(
        "anthropic-ratelimit-requests-limit",
        "anthropic-ratelimit-requests-reset",
        "x-ratelimit-limit-requests-day",
    ),
    *("anthropic-ratelimit-requests-remaining", "content-type", "location", "x-should-retry"),
)
_VALUES = (
    *(
        "0",
        "1",
        "60",
        "1.5",
        "-1",
        "1e3",
        "1e400",
        "-inf",
        "nan",
        "12,000",
        "100, 100;w=60",
        "10;w=1",
        "10;w=0",
    ),
    *(
        "6m0s",
        "1s",
        "120ms",
        "1h2m3s",
        "500us",
        "3d",
        "0s",
        "s",
        "1m1m",
        "",
        " ",
        "x",
        "9" * 400,
        "0x10",
        "١٢",
        "1_0",
    ),
    *("Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 21 Oct 9999 07:28:00 GMT", "Wed, 21 Oct 0001 07:28:00 +1400"),
    *(
        "2026-11-28T21:00:00Z",
        "9999-12-31T23:59:59-14:00",
        "0001-01-01T00:00:00+14:00",
        "1795899600",
        "1795899600000",
    ),
    *(
        "1e18",
        "99999999999999999999",
        "w=60",
        "q=100;w=60",
        '"default";q=10;w=1',
        "https://x.invalid/",
        "//",
        "http://[",
        "\x00",
    ),
)


def headers(random: Random) -> Result:
    """Headers of a reply: waits and limits are finite, in range, or not there."""
    given = {name: _value(random) for name in random.sample(_HEADERS, random.randint(1, 8))}
    broken = []
    wait = retry_after_s(given)
    if wait is not None and not 0 <= wait <= 86_400:
        broken.append(f"a wait of {wait}")
    periods = HeaderPeriods()
    for limit in parse_rate_headers(given):
        for when in (0.0, 1.0, 1e6):
            decided = periods.decide(limit, when)
            if decided is not None and not 0 < decided.key.period_s <= 2 * MONTH_S:
                broken.append(f"a period of {decided.key.period_s}")
        for value in (limit.limit, limit.remaining, limit.reset_s, limit.rate):
            if value is not None and (not math.isfinite(value) or value < 0):
                broken.append(f"a value of {value} in {limit}")
    return orjson.dumps(given, option=orjson.OPT_NON_STR_KEYS), broken


def _value(random: Random) -> str:
    value = random.choice(_VALUES)
    if random.random() < 0.3:
        at = random.randrange(len(value) + 1)
        value = (
            value[:at] + random.choice((" ", ";", ",", "-", "0", "9", "e", ".", "m", "é", "\t")) + value[at:]
        )
    return value


_ERRORS: tuple[Any, ...] = (
    {"error": {"message": "m", "type": "tokens", "code": "rate_limit_exceeded"}},
    {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["violence"]}}},
    {"error": "no such model"},
    {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
    {"object": "error", "message": "m", "code": 40003},
    {"detail": [{"loc": ["body", "messages"], "msg": "field required", "type": "missing"}]},
    {"errors": [{"message": "m", "extensions": {"code": "X"}}]},
    {"choices": [{"error": {"code": 502, "message": "m"}, "message": {"content": ""}}]},
    {"promptFeedback": {"blockReason": "SAFETY"}},
)


def error_body(random: Random) -> Result:
    """A refusal: one error of the harvester with a short, printable message."""
    document = mutate.mutate_tree(random, random.choice(_ERRORS))
    raw = bodies.encode(random, document)
    if random.random() < 0.4:
        raw = mutate.mutate_bytes(random, raw)
    status = random.choice(
        (200, 301, 400, 401, 402, 403, 404, 408, 413, 422, 429, 451, 498, 499, 500, 503, 529, 599)
    )
    given = {name: _value(random) for name in random.sample(_HEADERS, 2)}
    error = classify(status, given, raw, place="host/path")
    broken = []
    if not error.message or not error.message.isprintable() or len(error.message) > EXCERPT_CHARS + 150:
        broken.append(f"the message {error.message!r}")
    if error.retry_after_s is not None and not 0 <= error.retry_after_s <= 86_400:
        broken.append(f"a wait of {error.retry_after_s}")
    broken += check_answer(raw, is_stream=False)
    return raw, broken


@cache
def _config() -> HarvestConfig:
    teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    return HarvestConfig.model_validate({"teacher": teacher, "prompts": {"files": ["a"]}})


def prompt_line(random: Random) -> Result:
    """A line of a prompt file: refused with its place, or sent exactly as it stands there."""
    raw, is_plain = prompt_rows.line(random)
    row = formats._json_row(raw, "a.jsonl:1")
    try:
        if isinstance(row, PromptError):
            raise row
        prompt = reader.to_prompt(row, file="a.jsonl", line=1)
    except PromptError as error:
        broken = [] if error.place == "a.jsonl:1" else [f"the place {error.place!r}"]
        return raw, [*broken, *(["a valid line is refused: " + error.message] if is_plain else [])]
    (request,) = requests([prompt], _config())
    sent = json.loads(orjson.dumps(request.body))
    line = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    wanted = (
        line["messages"]
        if line.get("messages") is not None
        else [{"role": "user", "content": line["prompt"]}]
    )
    broken = []
    if sent["messages"] != wanted:
        broken.append("other messages are sent")
    for name in recognise.SENT_FIELDS:
        if name in sent and sent[name] != line.get(name):
            broken.append(f"another {name} is sent")
    if request.budget_tokens <= 0 or request.input_tokens <= 0:
        broken.append("no tokens are reserved")
    return raw, broken


def foreign_row(random: Random) -> Result:
    """A row of another tool: question and context are asked whole and in order, the last answer never is."""
    row, question, is_valid = prompt_rows.foreign(random)
    raw = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        converted = recognise.convert(row)
    except RowError as error:
        return raw, [f"a valid row is refused: {error}"] if is_valid else []
    if converted is None:
        return raw, ["a valid row is not recognised"] if is_valid else []
    asked = json.dumps(converted.messages, ensure_ascii=False)
    broken = []
    if not converted.messages:
        broken.append("nothing is asked")
    if is_valid and texts.greek(asked) != question:
        broken.append(f"asked {texts.greek(asked)!r}, not {question!r}")
    if is_valid and (
        texts.cyrillic(asked) or (converted.answer is None) != ("body" in row or "request" in row)
    ):
        broken.append("the answer is asked or lost")
    return raw, broken


def prompt_file(random: Random) -> Result:
    """A prompt file as bytes, of any suffix: rows and errors with a place, nothing else."""
    lines = [prompt_rows.line(random)[0] for _ in range(random.randint(1, 3))]
    suffix = random.choice(
        (".jsonl", ".csv", ".txt", ".json", ".jsonl.gz", ".jsonl.zst", ".arrow", ".parquet")
    )
    raw = prompt_rows.container(random, suffix, lines)
    if random.random() < 0.8:
        raw = mutate.mutate_bytes(random, raw)
    path = _folder() / f"a{suffix}"
    path.write_bytes(raw)
    broken = []
    try:
        for number, row in formats.rows(path, "a", any_columns=random.random() < 0.5):
            if isinstance(row, PromptError):
                if not row.place.startswith("a:"):
                    broken.append(f"the place {row.place!r}")
                continue
            try:
                reader.to_prompt(row, file="a", line=number)
            except PromptError as error:
                if error.place != f"a:{number}":
                    broken.append(f"the place {error.place!r}, not a:{number}")
    except PromptError as error:
        if not error.place.startswith("a"):
            broken.append(f"the place {error.place!r}")
    return raw, broken


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def echoed_key(random: Random) -> Result:
    """A body that holds the API key in some spelling: nothing that is kept of it holds the key."""
    key = keys.make_key(random)
    body = keys.body_with_key(random, key)
    redactor = Redactor(key)
    masked = redactor.body(body)
    broken = [f"the raw body spells the key ({name})" for name in keys.spellings_in(masked, key)]
    try:
        parsed = completion._parse(masked, 10, True)
    except TeacherError as error:
        kept = " ".join((error.message, error.error_code, error.raw.decode("utf-8", "replace")))
        return body, [*broken, *(["the error holds the key"] if keys.holds(kept, key) else [])]
    except RecursionError:
        return body, broken
    for name in parsed.__dataclass_fields__:
        if keys.holds(keys.flat(getattr(parsed, name)), key):
            broken.append(f"{name} holds the key")
    return body, broken


TARGETS: Mapping[str, Callable[[Random], Result]] = {
    "valid answer": valid_answer,
    "mutated answer": mutated_answer,
    "several choices": several_choices,
    "error body": error_body,
    "headers": headers,
    "prompt line": prompt_line,
    "row of another tool": foreign_row,
    "prompt file": prompt_file,
    "echoed key": echoed_key,
}
# How often each target is tried, of 100.
SHARES = {
    "valid answer": 22,
    "mutated answer": 33,
    "several choices": 5,
    "error body": 8,
    "headers": 8,
    "prompt line": 9,
    "row of another tool": 8,
    "prompt file": 2,
    "echoed key": 5,
}
