"""The types a line of a prompt file passes through on its way: Prompt -> Request -> Completion.

The last stop, `Sample`, is a row of the Parquet contract and lives in `schema`.
Values only: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, Any]
"""One chat message as it goes on the wire: `role`, `content` (text or parts), tool fields."""


UNKNOWN_MODEL = "no name"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a human prepared: messages to send, and what stays at home.

    `reference`, `tags` and `metadata` are never sent to the teacher.
    """

    id: str
    messages: tuple[Message, ...]
    reference: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt dressed for the wire.

    Attributes:
        key: 32 bytes; see `keys.request_key`.
        body: the final JSON body, defaults merged; exactly what is sent.
        sample_index: which of the prompt's `samples` answers this asks for.
        input_tokens: estimated prompt tokens.
        output_tokens: tokens to reserve for the answer (`max_tokens`, or a default guess).
        estimated_microusd: price of both at the configured rates, in millionths of a dollar.
        budget_tokens, budget_microusd: what it can't exceed; the budget sets that aside.
    """

    key: bytes
    prompt: Prompt
    body: Mapping[str, Any]
    sample_index: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    estimated_microusd: int = 0
    budget_tokens: int = 0
    budget_microusd: int = 0


class Outcome(StrEnum):
    """What kind of answer it is. Every one of them is stored and was paid."""

    OK = "ok"
    TRUNCATED = "truncated"  # finish_reason "length"
    FILTERED = "filtered"  # finish_reason "content_filter"
    REFUSED = "refused"  # message.refusal is set
    TOOL_CALL = "tool_call"
    EMPTY = "empty"  # null or "" content and nothing else
    INVALID = "invalid"  # not the JSON that response_format asked for
    UNKNOWN = "unknown"  # a finish_reason we have never heard of


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the teacher reports them; `source` says when we had to estimate."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    source: str = "reported"  # or "estimated"


@dataclass(frozen=True, slots=True)
class Alternative:
    """One token and its natural-log probability. `data` is its exact UTF-8 bytes, None if unknown."""

    token: str
    data: bytes | None
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token and the alternatives the teacher weighed at its position."""

    token: str
    data: bytes | None
    logprob: float
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, parsed from the raw body; the raw bytes stay the truth."""

    text: str | None
    outcome: Outcome
    finish_reason: str
    usage: Usage
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls_json: str | None = None
    model: str = ""
    system_fingerprint: str = ""
    response_id: str = ""
    provider: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def served_model(self) -> str:
        """Model and build as the answer names them, `UNKNOWN_MODEL` where it names none."""
        return f"{self.model} {self.system_fingerprint}".strip() or UNKNOWN_MODEL


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What came back from one attempt, before anyone tried to understand it.

    `latency_s` is measured on the monotonic clock; `received_at` is Unix time, for records only.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    endpoint: str
    latency_s: float
    received_at: float
