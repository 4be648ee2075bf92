"""Define the values that a line of a prompt file becomes: Prompt, Request, RawAnswer, Completion.

The last one, `Sample`, is a row of a Parquet shard and is defined in `store.shards.schema`. Values only: no
I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# One chat message as it is sent: `role`, `content` (text or parts), tool fields.
Message = dict[str, Any]

# `Completion.served_model` of an answer that names no model.
UNKNOWN_MODEL = "no name"
# Route of requests for answers.
CHAT_PATH = "/chat/completions"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file.

    `reference`, `tags` and `metadata` are stored with the answer and never sent to the teacher. `fields`,
    such as `tools`, are sent with the messages and override those of the configuration. `file` and `line` say
    where the prompt comes from.
    """

    id: str
    messages: tuple[Message, ...]
    reference: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with the configuration applied, ready to be sent.

    Attributes:
        key: 32 bytes; see `request_key.request_key`.
        body: the final JSON body, defaults merged; exactly what is sent.
        sample_index: which of the prompt's `samples` answers this asks for.
        input_tokens: estimated prompt tokens.
        output_tokens: tokens to reserve for the answer at the limiter (`max_tokens`, or a default guess).
        estimated_microusd: price of `input_tokens` and `output_tokens`, in millionths of a dollar.
        budget_tokens, budget_microusd: upper bounds of what it can use and cost; the budget reserves these.
        path: route that it is sent to, below the base URL (`scoring.request_forms.url_of`).
        budget_output_tokens: the part of `budget_tokens` that the answer can use.
        rows: of a request that asks for several samples at once (`n`), the requests that it stands for, by
            sample number; empty for an ordinary one. `key` and `sample_index` are those of the first.
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
    path: str = CHAT_PATH
    budget_output_tokens: int = 0
    rows: tuple[Request, ...] = ()

    @property
    def each(self) -> tuple[Request, ...]:
        """The rows that it asks for: those it was joined from, or itself."""
        return self.rows or (self,)


class Outcome(StrEnum):
    """What kind of answer it is. All of them were paid for, so all are stored."""

    OK = "ok"
    TRUNCATED = "truncated"  # finish_reason "length" or another word for it
    FILTERED = "filtered"  # finish_reason "content_filter" or another word for it
    REFUSED = "refused"  # message.refusal is set
    TOOL_CALL = "tool_call"
    EMPTY = "empty"  # no content, or white space only, and nothing else
    INVALID = "invalid"  # not the JSON that response_format asked for, or a tool call that was not asked for
    SCORED = "scored"  # no answer: the log-probabilities of a given text
    UNSCORED = "unscored"  # a reply that was to be such and lacks them
    UNKNOWN = "unknown"  # a finish_reason that is not in our list, or a part that was not understood


# Outcomes of answers that hold nothing to learn from. They can be asked again: `harvester run --retry`.
UNUSABLE = (
    Outcome.EMPTY,
    Outcome.INVALID,
    Outcome.FILTERED,
    Outcome.REFUSED,
    Outcome.UNSCORED,
    Outcome.UNKNOWN,
)
# Outcomes of replies to [score]. Their rows are no answers: whoever reads answers passes them over.
OF_TEXTS = frozenset({Outcome.SCORED, Outcome.UNSCORED})

# Where the token counts of an answer come from.
USAGE_REPORTED = "reported"  # by the teacher
USAGE_ESTIMATED = "estimated"  # from the length of the texts: the teacher reported no usable counts
USAGE_CORRECTED = "corrected"  # the teacher reported less than the texts hold: the higher of both counts


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer. `source` is one of the `USAGE_` values above."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    source: str = USAGE_REPORTED

    @property
    def total(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Alternative:
    """One token and its natural-log probability. `data`: its exact UTF-8 bytes. None: unknown."""

    token: str
    data: bytes | None
    logprob: float | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token and the most likely alternatives at its position. See `Alternative`."""

    token: str
    data: bytes | None
    logprob: float | None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, parsed from the raw body. The raw bytes are stored too, and decide in case of doubt."""

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


@dataclass(frozen=True, slots=True, weakref_slot=True)
class RawAnswer:
    """The HTTP reply to one attempt, not parsed yet.

    `headers` have lower-case names. `latency_s` is measured on the monotonic clock; `received_at` is Unix
    time, for records only. `release` gives back the memory of the body: call it once the body is stored.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    endpoint: str
    latency_s: float
    received_at: float
    release: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)
