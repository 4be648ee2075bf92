"""Define the journal's records and query results as plain values, without I/O.

An `Intent` is durable before its request is sent. It is followed by at most one `Refund`, `Failure` or
`Answer` with the same attempt id. An attempt with an intent and nothing else was possibly billed.

A request for several answers (`n`) is one attempt. In the journal it has a row, with a number of its own, for
each of them: `attempt_id` is the first, the others follow. Its end is an `AnswerGroup`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from harvester.api.types import Outcome, Prompt
from harvester.terms.lineage import Lineage


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as the journal remembers it: who was asked, under which terms, for what.

    Sealed rows take their lineage from here, not from the process that seals. `duties` are what the terms
    ask of those who use the answers, `providers` those a router was held to; `template_sha256`
    is that of the file which wrote the prompts. `config_json` holds no secret, for a configuration only names
    keys.
    """

    run_id: str
    started_at: float
    teacher_id: str
    host: str = ""
    model: str = ""
    terms_id: str = ""
    permission_sha256: str = ""
    purpose: str = "train"
    mock: bool = False
    duties: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    config_sha256: str = ""
    template_sha256: str = ""
    config_json: str = "{}"
    tool_version: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)

    def lineage(self) -> Lineage:
        """What travels in every shard that holds answers of this run."""
        return Lineage(
            {
                "run_id": self.run_id,
                "started_at": datetime.fromtimestamp(self.started_at, UTC).isoformat(timespec="milliseconds"),
                "teacher_id": self.teacher_id,
                "host": self.host,
                "model": self.model,
                "terms_id": self.terms_id,
                "permission_sha256": self.permission_sha256,
                "purpose": self.purpose,
                "mock": self.mock,
                "duties": list(self.duties),
                "providers": list(self.providers),
                "config_sha256": self.config_sha256,
                **({"template_sha256": self.template_sha256} if self.template_sha256 else {}),
                "tool_version": self.tool_version,
                "labels": dict(self.labels),
            }
        )


@dataclass(frozen=True, slots=True)
class BatchRef:
    """The batch that a row's outcome comes from. Answer and cost are those of the run that sent the batch.

    `run` is the number of that run, `sent_at` when the batch was written down, in Unix seconds.
    """

    batch: int
    run: int
    sent_at: float


@dataclass(frozen=True, slots=True)
class Intent:
    """An attempt that is about to be sent. `at` is Unix seconds.

    Attributes:
        further_keys: of the other answers that the same request asks for. The reservation, which is that of
            the request, is split evenly over them all.
    """

    attempt_id: int
    key: bytes
    run_id: str
    endpoint: str
    at: float
    reserved_tokens: int = 0
    reserved_microusd: int = 0
    further_keys: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Refund:
    """The request for `answers` answers was not sent after all: its intents are deleted."""

    attempt_id: int
    answers: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that ended without an answer.

    `raw` is kept up to 2 KB. With `maybe_billed` the intent stays on the list of possibly billed attempts.
    `answers` is how many were asked for; `key` is that of the first.
    """

    attempt_id: int
    key: bytes
    code: str
    status: int | None
    raw: bytes
    maybe_billed: bool
    at: float
    answers: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """A paid answer, as received. `body` is the JSON body as sent, `at` Unix seconds.

    Attributes:
        charged: tokens and micro-dollars that the budget was charged; None for tokens and cost as they are.
        batch: the batch that brought it; None for a request of its own.
    """

    attempt_id: int
    key: bytes
    raw: bytes
    status: int
    prompt: Prompt
    sample_index: int
    body: Mapping[str, Any]
    outcome: Outcome
    input_tokens: int
    output_tokens: int
    cost_microusd: int
    attempts: int
    latency_s: float
    at: float
    endpoint: str
    charged: tuple[int, int] | None = None
    batch: BatchRef | None = None

    @property
    def charge(self) -> tuple[int, int]:
        """Tokens and micro-dollars that count against budgets."""
        if self.charged is not None:
            return self.charged
        return self.input_tokens + self.output_tokens, self.cost_microusd


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """The answers that one request for several brought. They are stored together or not at all.

    `attempts` holds the numbers of all intents of the request, also of those without an answer.
    """

    answers: tuple[Answer, ...]
    attempts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that gets no answer, and why. `batch` is the batch in which it failed, if any."""

    key: bytes
    prompt: Prompt
    sample_index: int
    body: Mapping[str, Any]
    code: str
    message: str
    attempts: int
    at: float
    batch: BatchRef | None = None


@dataclass(frozen=True, slots=True)
class BatchRowReopened:
    """A row that its batch did not answer: it may be asked again.

    With `maybe_billed` it is listed as possibly billed, with what was reserved for it. `status` is that of
    its line in the error file, None where there is none; `raw` is kept up to 2 KB.
    """

    attempt_id: int
    key: bytes
    batch: BatchRef
    endpoint: str
    code: str
    at: float
    status: int | None = None
    raw: bytes = b""
    maybe_billed: bool = False
    reserved_tokens: int = 0
    reserved_microusd: int = 0


@dataclass(frozen=True, slots=True)
class SharedAnswer:
    """A further prompt that shares a held answer, or the same prompt with new metadata."""

    key: bytes
    prompt: Prompt
    sample_index: int


@dataclass(frozen=True, slots=True)
class PossiblyBilledAttempt:
    """An attempt that the teacher may have charged although the store holds no answer of it.

    Attributes:
        at: Unix seconds.
        code: error code of its failure, "" where the journal has no outcome for it.
    """

    attempt_id: int
    key: bytes
    at: float
    run_id: str
    code: str
    reserved_tokens: int
    reserved_microusd: int

    def facts(self) -> dict[str, Any]:
        """Return it as JSON values, the time as ISO 8601."""
        return {
            "key": self.key.hex(),
            "at": datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds"),
            "run_id": self.run_id,
            "code": self.code,
            "reserved_tokens": self.reserved_tokens,
            "reserved_microusd": self.reserved_microusd,
        }


Record = Intent | Refund | Failure | Answer | AnswerGroup | DeadLetter | SharedAnswer | BatchRowReopened


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """The answer or dead letter that the store holds for a key.

    Attributes:
        state: "answered" or "dead".
        outcome: of the answer ("ok", "truncated", ...), or the dead letter's error code.
        max_tokens: ceiling that was asked for, None where none was sent.
        asker: `asker_digest` of the row whose request was paid.
        shared_with: for other rows with this key, by (prompt id, sample number), their last `asker_digest`.
    """

    state: Literal["answered", "dead"]
    outcome: str
    max_tokens: int | None
    asker: bytes
    shared_with: Mapping[tuple[str, int], bytes] = field(default_factory=dict)

    def last_digest(self, prompt_id: str, sample_index: int) -> bytes:
        """Return the digest of the metadata last recorded for this (prompt, sample).

        If the current one differs, a `SharedAnswer` record is written.
        """
        return self.shared_with.get((prompt_id, sample_index), self.asker)


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of one run, or of the whole store.

    `possibly_billed` are attempts that the teacher may have charged without an answer we hold, with what
    was reserved for them; intents without an end are among them once their run has ended. `outcomes`
    counts answers, `errors` failed attempts by code. `reopened` answers were taken out of the store to ask
    again, by `reopened_outcomes`; they are among `answers` and `outcomes`, for they were paid. `copied`
    answers were paid by other stores; they are among `outcomes` alone. `purged` and `lost` answers, by
    `purged_outcomes`, are counted for the whole store only; they are among `answers` and `outcomes`, too.
    """

    answers: int = 0
    dead: int = 0
    attempts: int = 0
    refunds: int = 0
    asks: int = 0
    possibly_billed: int = 0
    possibly_billed_microusd: int = 0
    paid_twice: int = 0
    reopened: int = 0
    copied: int = 0
    purged: int = 0
    lost: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict)
    reopened_outcomes: Mapping[str, int] = field(default_factory=dict)
    purged_outcomes: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Answers that were stored or copied, and neither taken out to be asked again nor purged or lost."""
        return max(0, self.answers + self.copied - self.reopened - self.purged - self.lost)

    @property
    def held_outcomes(self) -> dict[str, int]:
        """Those answers by outcome; with them lost ones, and purged ones of stores of earlier releases."""
        gone = Counter(self.reopened_outcomes) + Counter(self.purged_outcomes)
        counts = {name: count - gone[name] for name, count in self.outcomes.items()}
        return {name: count for name, count in counts.items() if count > 0}


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A row of the manifest: a sealed file, its hash, size and number of rows."""

    shard: int
    name: str
    sha256: str
    rows: int
    size_bytes: int
    lineage_digest: str
    sealed_at: float


def asker_digest(prompt: Prompt, sample_index: int) -> bytes:
    """Return 8 bytes over prompt id, sample number, reference, tags and metadata of a row.

    A change means that a `SharedAnswer` must be recorded. The messages are left out: they are in the key.
    """
    facts = as_json([prompt.id, sample_index, prompt.reference, prompt.tags, prompt.metadata])
    return hashlib.blake2b(facts, digest_size=8).digest()


def prompt_json(prompt: Prompt) -> bytes:
    """Encode a prompt for the journal, without its messages, which are in the request body."""
    return as_json(
        {
            "id": prompt.id,
            "reference": prompt.reference,
            "tags": prompt.tags,
            "metadata": prompt.metadata,
            "file": prompt.file,
            "line": prompt.line,
        }
    )


def as_json(value: Any) -> bytes:
    """Encode any value of a prompt file as JSON with sorted names; unknown types become text."""
    try:
        return orjson.dumps(value, default=_plain, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # lone surrogates, integers beyond 64 bits
        return json.dumps(value, default=_plain, sort_keys=True, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
