"""Define the Parquet schema of a shard and convert between rows and `Sample`.

Version 1. Columns are only ever added; a reader selects columns by name. `data/FORMAT.md` specifies the
same for readers in other languages. Imports pyarrow and the standard library, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from harvester.api.types import Message

SCHEMA_VERSION = 1
LINEAGE_KEY = b"distil.lineage"
VERSION_KEY = b"distil.schema_version"

_MESSAGE = pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string())])
_ALTERNATIVE = pa.struct(
    [pa.field("token", pa.string()), pa.field("bytes", pa.binary()), pa.field("logprob", pa.float16())]
)
_TOKEN = pa.struct(
    [
        pa.field("token", pa.string()),
        pa.field("bytes", pa.binary()),
        pa.field("logprob", pa.float16()),
        pa.field("top", pa.list_(_ALTERNATIVE)),
    ]
)

# name, type, nullable, meaning. The order is the order on disk.
COLUMNS: tuple[tuple[str, pa.DataType, bool, str], ...] = (
    ("key", pa.string(), False, "SHA-256 of the canonical request and teacher identity, 64 hex digits"),
    ("prompt_id", pa.string(), False, "id of the prompt that was asked"),
    ("sample_index", pa.int32(), False, "which of the prompt's samples, from 0"),
    ("messages", pa.list_(_MESSAGE), False, "messages sent; content that is not text is JSON"),
    ("completion", pa.string(), True, "the teacher's text, verbatim"),
    ("reasoning", pa.string(), True, "reasoning content the teacher returned beside its text"),
    ("refusal", pa.string(), True, "refusal text"),
    ("tool_calls_json", pa.string(), True, "tool calls, JSON as received"),
    (
        "outcome",
        pa.string(),
        False,
        "ok, truncated, filtered, refused, tool_call, empty, invalid, scored, unscored, unknown",
    ),
    ("finish_reason", pa.string(), False, "the teacher's own word"),
    ("logprobs", pa.list_(_TOKEN), True, "log-probabilities (natural log) of generated tokens"),
    ("reference", pa.string(), True, "the prompt's reference answer; never sent"),
    ("tags", pa.list_(pa.string()), False, "the prompt's tags"),
    ("metadata_json", pa.string(), False, "the prompt's further fields, a JSON object"),
    ("source_file", pa.string(), False, "prompt file, as named in the configuration"),
    ("source_line", pa.int32(), False, "line in that file, from 1; 0 where files have no lines"),
    ("request_json", pa.string(), False, "request body exactly as sent"),
    ("raw", pa.binary(), False, "response body exactly as received"),
    ("teacher_id", pa.string(), False, "endpoint, or `[teacher] identity`, and model: who was asked"),
    ("endpoint", pa.string(), False, "base URL that answered"),
    ("request_model", pa.string(), False, "model asked for"),
    ("response_model", pa.string(), False, "model the answer names"),
    ("system_fingerprint", pa.string(), False, "the teacher's build, where it names one"),
    ("response_id", pa.string(), False, "the teacher's id of this answer; not unique by contract"),
    ("provider", pa.string(), False, "who served it, where a router names one"),
    ("terms_id", pa.string(), False, "terms record in force on the day"),
    ("permission_sha256", pa.string(), False, "hash of the recorded permission, '' where none was needed"),
    ("purpose", pa.string(), False, "train or eval; eval rows are never trained on"),
    ("mock", pa.bool_(), False, "true when the mock teacher answered"),
    ("input_tokens", pa.int64(), False, "prompt tokens"),
    ("output_tokens", pa.int64(), False, "completion tokens"),
    ("cached_tokens", pa.int64(), False, "prompt tokens served from the provider's cache"),
    ("reasoning_tokens", pa.int64(), False, "completion tokens spent on reasoning"),
    ("usage_source", pa.string(), False, "reported, estimated or corrected"),
    ("cost_microusd", pa.int64(), False, "cost at the configured price, in millionths of a dollar"),
    ("attempts", pa.int32(), False, "attempts until this answer, from 1"),
    ("latency_s", pa.float64(), False, "seconds from send to last byte, of the last attempt"),
    ("created_at", pa.timestamp("us", tz="UTC"), False, "when the answer arrived"),
    ("run_id", pa.string(), False, "run that paid for it"),
    ("config_sha256", pa.string(), False, "hash of that run's configuration"),
    ("tool_version", pa.string(), False, "version of the harvester"),
    ("former_key", pa.string(), False, "key before the row was adopted by an identity, '' for none"),
)

# Columns that earlier files of this version may lack; they are read as ''.
ADDED_COLUMNS = frozenset({"provider", "former_key"})

SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})
        for name, kind, nullable, meaning in COLUMNS
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Prompt + completion + provenance: one row. Field names are the column names."""

    key: str
    prompt_id: str
    messages: list[Message]
    completion: str | None
    outcome: str
    finish_reason: str
    sample_index: int = 0
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls_json: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    reference: str | None = None
    tags: list[str] = field(default_factory=list)
    metadata_json: str = "{}"
    source_file: str = ""
    source_line: int = 0
    request_json: str = "{}"
    raw: bytes = b""
    teacher_id: str = ""
    endpoint: str = ""
    request_model: str = ""
    response_model: str = ""
    system_fingerprint: str = ""
    response_id: str = ""
    provider: str = ""
    terms_id: str = ""
    permission_sha256: str = ""
    purpose: str = "train"
    mock: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    usage_source: str = "reported"
    cost_microusd: int = 0
    attempts: int = 1
    latency_s: float = 0.0
    created_at: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    run_id: str = ""
    config_sha256: str = ""
    tool_version: str = ""
    former_key: str = ""

    @property
    def metadata(self) -> dict[str, Any]:
        """The prompt's further fields."""
        loaded: dict[str, Any] = json.loads(self.metadata_json)
        return loaded


# Columns in which every row has a value.
_REQUIRED = frozenset(field.name for field in SCHEMA if not field.nullable)
_NAMES = tuple(f.name for f in fields(Sample))
if set(_NAMES) != set(SCHEMA.names):  # a column without a field, or the reverse, is a bug at import
    raise AssertionError(f"Sample and SCHEMA differ: {set(_NAMES) ^ set(SCHEMA.names)}")


def with_added_columns(table: pa.Table) -> pa.Table:
    """Add the missing `ADDED_COLUMNS` to a table, in the order of `SCHEMA`."""
    lacking = ADDED_COLUMNS - set(table.column_names)
    if not lacking:
        return table
    for name in lacking:
        table = table.append_column(SCHEMA.field(name), pa.array([""] * len(table), pa.string()))
    return table.select(SCHEMA.names)


def columns_with_nulls(rows: pa.Table | pa.RecordBatch) -> list[str]:
    """Return the columns with nulls among those that always have a value, in their order."""
    columns = zip(rows.schema.names, rows.columns, strict=True)
    return [name for name, column in columns if column.null_count and name in _REQUIRED]


def text_of(content: Any) -> str | None:
    """Encode a message's content for the `messages` column: text as is, anything else as JSON."""
    if content is None or isinstance(content, str):
        return content
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def to_row(sample: Sample) -> dict[str, Any]:
    """Convert a `Sample` to a dict for `pa.Table.from_pylist(rows, schema=SCHEMA)`."""
    row = {name: getattr(sample, name) for name in _NAMES}
    row["messages"] = [{"role": m["role"], "content": text_of(m.get("content"))} for m in sample.messages]
    return row


def from_row(row: Mapping[str, Any]) -> Sample:
    """Convert a row, or some columns of it, to a `Sample`; missing columns keep their defaults.

    `key`, `prompt_id`, `messages`, `completion`, `outcome` and `finish_reason` default to empty values
    when they were projected away.
    """
    empty: dict[str, Any] = {
        "key": "",
        "prompt_id": "",
        "messages": [],
        "completion": None,
        "outcome": "",
        "finish_reason": "",
    }
    return Sample(**{**empty, **{name: row[name] for name in _NAMES if name in row}})


def to_table(samples: Iterable[Sample]) -> pa.Table:
    """Convert samples to a table of exactly `SCHEMA`."""
    return pa.Table.from_pylist([to_row(sample) for sample in samples], schema=SCHEMA)
