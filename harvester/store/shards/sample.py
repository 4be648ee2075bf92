"""Convert an answer of the journal to a `Sample`: parse its raw body, add prompt and lineage. No I/O.

An answer that can't be parsed keeps its raw bytes and gets the outcome "unknown", so it is never lost.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from harvester.api import parse_in_child
from harvester.api.replies import completion
from harvester.api.replies.model_name import model_and_provider
from harvester.api.scoring.request_forms import way_of
from harvester.api.types import Alternative, Completion, Outcome, TokenLogprob, Usage
from harvester.errors import TeacherError
from harvester.store.journal.records import as_json
from harvester.store.shards.schema import Sample, text_of
from harvester.terms.lineage import REPEATED_COLUMNS, Lineage

SELECT_ANSWERS = (
    "SELECT id, key, asker, run, outcome, max_tokens, status, sample_index, attempts, input_tokens,"
    " output_tokens, cost_microusd, latency_us, at_us, checksum, endpoint, prompt_json, body_json, raw"
    " FROM answers"
)
SELECT_TERMS_COLUMNS = "SELECT run, body_json, raw FROM answers"
# Columns that are filled by parsing the raw body.
PARSED = frozenset(
    {
        "completion",
        "outcome",
        "finish_reason",
        "reasoning",
        "refusal",
        "tool_calls_json",
        "logprobs",
        "response_model",
        "system_fingerprint",
        "response_id",
        "provider",
        "cached_tokens",
        "reasoning_tokens",
        "usage_source",
    }
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def sample_of(row: Mapping[str, Any], lineage: Lineage, columns: Collection[str] | None = None) -> Sample:
    """One row of the journal's `answers`, with the lineage of its run, as a row of the corpus.

    Args:
        columns: what will be looked at; what costs much (log-probabilities: four times the memory of the raw
            body, and most of the time) stays empty where it is not among them. None fills all.
    """
    body = orjson.loads(row["body_json"])
    if columns is not None and PARSED.isdisjoint(columns):
        answer = Completion(None, Outcome.UNKNOWN, "", Usage(0, 0))
    else:
        answer = parse_answer(row, body, logprobs=columns is None or "logprobs" in columns)
    return Sample(
        key=row["key"].hex(),
        messages=[
            {"role": message["role"], "content": text_of(message.get("content"))}
            for message in body.get("messages") or []
        ],
        request_json=row["body_json"],
        raw=row["raw"],
        teacher_id=lineage.teacher_id,
        endpoint=row["endpoint"],
        request_model=str(body.get("model") or ""),
        terms_id=lineage.terms_id,
        permission_sha256=lineage.permission_sha256,
        purpose=lineage.purpose,
        mock=lineage.mock,
        input_tokens=row["input_tokens"],
        output_tokens=row["output_tokens"],
        cost_microusd=row["cost_microusd"],
        attempts=row["attempts"],
        latency_s=row["latency_us"] / 1e6,
        created_at=_EPOCH + timedelta(microseconds=row["at_us"]),
        run_id=lineage.run_id,
        config_sha256=lineage.config_sha256,
        tool_version=lineage.tool_version,
        former_key=row.get("former_key", ""),
        **parsed_columns(answer),
        **prompt_columns(row["prompt_json"], row["sample_index"]),
    )


def parsed_columns(answer: Completion) -> dict[str, Any]:
    """Return the columns of a row that come from its raw body (`PARSED`)."""
    return {
        "completion": answer.text,
        "outcome": str(answer.outcome),
        "finish_reason": answer.finish_reason,
        "reasoning": answer.reasoning,
        "refusal": answer.refusal,
        "tool_calls_json": answer.tool_calls_json,
        "logprobs": [_token(token) for token in answer.logprobs] or None,
        "response_model": answer.model,
        "system_fingerprint": answer.system_fingerprint,
        "response_id": answer.response_id,
        "provider": answer.provider,
        "cached_tokens": answer.usage.cached_tokens,
        "reasoning_tokens": answer.usage.reasoning_tokens,
        "usage_source": answer.usage.source,
    }


def prompt_columns(prompt_json: str, sample_index: int) -> dict[str, Any]:
    """Return the columns of a row that depend on the prompt, not on the answer."""
    try:
        prompt = orjson.loads(prompt_json)
    except orjson.JSONDecodeError:  # lone surrogates: only the standard library reads them back
        prompt = json.loads(prompt_json)
    reference = prompt["reference"]
    return {
        "prompt_id": encodable(prompt["id"]),
        "sample_index": sample_index,
        "reference": None if reference is None else encodable(reference),
        "tags": [encodable(tag) for tag in prompt["tags"]],
        "metadata_json": as_json(prompt["metadata"]).decode(),
        "source_file": encodable(prompt["file"]),
        "source_line": prompt["line"],
    }


def encodable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 can't encode, with question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def model_names(body_json: str, raw: bytes) -> tuple[str, str, str]:
    """The model asked for, the one that answered, and its provider, without parsing the raw body."""
    return str(orjson.loads(body_json).get("model") or ""), *model_and_provider(raw)


def terms_columns(request_model: str, response_model: str, provider: str, lineage: Lineage) -> dict[str, Any]:
    """The columns that the terms check reads (`lineage.FACT_COLUMNS`), of a row with these `model_names`."""
    return {
        "run_id": lineage.run_id,
        **{name: getattr(lineage, name) for name in REPEATED_COLUMNS},
        "request_model": request_model,
        "response_model": response_model,
        "provider": provider,
    }


def parse_answer(row: Mapping[str, Any], body: Mapping[str, Any], *, logprobs: bool = True) -> Completion:
    """Parse the raw body of a row; one without a completion gives the outcome "unknown".

    Args:
        row: with `raw`, `input_tokens` and `output_tokens`.
        body: the request's body.
    """
    if way_of(body) is not None:
        return parse_in_child.parse_stored_score(row["raw"], body, row["input_tokens"], logprobs=logprobs)
    try:
        parsed = parse_in_child.parse_stored(
            row["raw"], row["input_tokens"], body.get("response_format"), logprobs=logprobs
        )
    except TeacherError:
        usage = Usage(row["input_tokens"], row["output_tokens"], source="estimated")
        return Completion(None, Outcome.UNKNOWN, "", usage)
    return completion.flag_unasked_tool_call(parsed, body)


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {**_alternative(token), "top": [_alternative(other) for other in token.top]}


def _alternative(token: TokenLogprob | Alternative) -> dict[str, Any]:
    return {"token": token.token, "bytes": token.data, "logprob": token.logprob}
