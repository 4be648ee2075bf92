"""Define the tables [teacher], [teacher.limits], [teacher.price], [teacher.batch] and [[teacher.replica]].

Secrets are named, never held: `api_key_env` is the NAME of an environment variable; only
`api_key(config)` reads it, at the moment a client is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from harvester.config import provider_presets
from harvester.config.number_limits import MAX_CHOICES, MAX_CONNECTIONS, MAX_USD_PER_MILLION, MAX_WEIGHT
from harvester.config.provider_presets import AppliedPreset
from harvester.config.run_section import FrozenModel, PositiveInt, Rate
from harvester.errors import ConfigError
from harvester.system.hosts import check_plain_http, check_url, is_private
from harvester.system.toml_file import Matching

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SHOWN_NAME = re.compile(r"[A-Z_][A-Z0-9_]*\Z")


# A price that was read longer ago than this is pointed out.
OLD_PRICE_DAYS = 90


# Spelled out because editors read the pattern as ECMA-262, which has no inline flag for ignoring case.
_IDEMPOTENCY = f"[A-Za-z-]*{''.join(f'[{c.upper()}{c}]' for c in 'idempotency')}[A-Za-z-]*"
_IdempotencyHeader = Annotated[
    str, Matching(_IDEMPOTENCY, "must be a header's name with the word idempotency, as in Idempotency-Key")
]


# A name and no address: no key that it makes is that of an address.
TEACHER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
TeacherName = Annotated[
    str, Matching(TEACHER_NAME, "must be a name of letters, digits, `.`, `_` and `-`, as in team-llama-70b")
]


class RateLimitsSection(FrozenModel):
    """Limits per minute and per day; None is none that the operator knows.

    Attributes:
        requests_per_minute: requests a minute, retries included.
        tokens_per_minute: tokens of prompts and answers a minute.
        input_tokens_per_minute: tokens of prompts a minute, where the teacher limits them by themselves.
        output_tokens_per_minute: tokens of answers a minute, likewise.
        requests_per_day: requests in any 24 hours.
        tokens_per_day: tokens of prompts and answers in any 24 hours.
    """

    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    input_tokens_per_minute: Rate | None = None
    output_tokens_per_minute: Rate | None = None
    requests_per_day: Rate | None = None
    tokens_per_day: Rate | None = None


class LimitsSection(RateLimitsSection):
    """Limits of the teacher that the operator knows; the others are learned.

    With several addresses, the limits per minute and per day belong to the credential: together the addresses
    stay within them, and each gets the part that it can use. `max_concurrency` holds for each address.

    Attributes:
        max_concurrency: most requests in flight at once; the run uses fewer where more bring nothing.
    """

    max_concurrency: int = Field(default=64, gt=0, le=MAX_CONNECTIONS)


class ReplicaLimitsSection(RateLimitsSection):
    """Limits of one address, beside its part of those of the credential.

    Attributes:
        max_concurrency: None for that of `[teacher.limits]`.
    """

    max_concurrency: int | None = Field(default=None, gt=0, le=MAX_CONNECTIONS)


class ReplicaSection(FrozenModel):
    """An address that serves the teacher's model with the same credential.

    Attributes:
        base_url: a further address, or `[teacher] base_url` to say more of that one.
        weight: relative capacity: an endpoint with 2 gets about twice the rows of one with 1, and twice the
            part of the credential's limits, where all could use more than they get.
        limits: its own.
    """

    base_url: str
    weight: float = Field(default=1.0, gt=0, le=MAX_WEIGHT)
    limits: ReplicaLimitsSection = ReplicaLimitsSection()

    @field_validator("base_url")
    @classmethod
    def _clean_url(cls, value: str) -> str:
        return check_url(value)


PricePerMillion = Annotated[float, Field(ge=0, le=MAX_USD_PER_MILLION)]


class PriceSection(FrozenModel):
    """USD per million tokens.

    Attributes:
        input: of prompts.
        output: of answers.
        cached_input: of the tokens of a prompt that the teacher had in its cache. Absent: as `input`.
        batch_input: of prompts in a batch. Absent: as `input`.
        batch_output: of answers in a batch. Absent: as `output`.
        as_of: the day on which the price was read; a price older than 90 days is pointed out.
    """

    input: PricePerMillion
    output: PricePerMillion
    cached_input: PricePerMillion | None = None
    batch_input: PricePerMillion | None = None
    batch_output: PricePerMillion | None = None
    as_of: date | None = None

    @property
    def of_batches(self) -> PriceSection:
        """The prices in a batch: those of single requests where no other is known."""
        if self.batch_input is None and self.batch_output is None:
            return self
        return PriceSection(
            input=self.input if self.batch_input is None else self.batch_input,
            output=self.output if self.batch_output is None else self.batch_output,
            as_of=self.as_of,
        )

    def age_note(self, today: date) -> str:
        """Return a sentence if the price was read longer ago than 90 days; "" if not."""
        days = (today - self.as_of).days if self.as_of is not None else 0
        if days <= OLD_PRICE_DAYS:
            return ""
        return (
            f"[teacher.price] is {days:,} days old (as_of = {self.as_of}): cost and budgets rely on it; "
            "check the price, then set as_of"
        )


class BatchApiSection(FrozenModel):
    """Bounds and words of a provider's Batch API, which has the shape of OpenAI's; the defaults are OpenAI's.

    Attributes:
        max_requests: most requests in one batch.
        max_bytes: most bytes of the file of a batch.
        window: `completion_window` to ask for.
        path: what the lines of a file name as `url`.
        purpose: of the uploaded file.
    """

    max_requests: PositiveInt = 50_000
    max_bytes: PositiveInt = 200_000_000
    window: str = "24h"
    path: str = "/v1/chat/completions"
    purpose: str = "batch"


def _preset_replaces_required_keys(schema: dict[str, Any]) -> None:
    """Let the JSON Schema require either a preset or the keys that it would set."""
    required = [{"required": [name]} for name in schema.pop("required")]
    schema["anyOf"] = [{"required": ["preset"]}, {"allOf": required}]


def _applied_preset(value: Any) -> AppliedPreset:
    """Return the preset that `provider_presets.fill` applied; refuse an unknown name, which it leaves."""
    if isinstance(value, AppliedPreset):
        return value
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    provider_presets.require_known(value)
    return AppliedPreset(value)


def _value_at(table: Mapping[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value[part]
    return value


def _is_empty(value: tuple[Any, ...]) -> bool:
    """Whether there is none: then the hash of a configuration is what it was before the key existed."""
    return not value


class TeacherSection(FrozenModel):
    """The teacher to ask: one model, one credential.

    Attributes:
        preset: provider preset that sets what this table leaves out; a file gives its name. Hashes and keys
            are those of the filled table, so it is not part of the output.
        base_url: address of an OpenAI-compatible API, up to and with `/v1`.
        model: name of the model, as the API calls it.
        api_key_env: NAME of the environment variable that holds the API key, never the key. Absent: none is
            sent.
        terms: ids of the terms records of this teacher, comma-separated (`harvester terms list`): of the
            weights, and behind a router of the host too.
        identity: a name for the teacher. It stands in the request keys in the place of `base_url`, so that a
            teacher that moves to another address stays the same. The terms go by the address all the same.
        replicas: further addresses that serve the same model with the same credential.
        replica: the same, with limits and a weight of their own.
        allow_http: plain http also outside private networks, and with a credential.
        ca_file: PEM bundle to trust in addition to the public roots. Verification can't be switched off.
        idempotency_header: name of a header that carries the same value for all attempts at a request.
        max_n: most answers that one request may ask for (`n`): several samples for one prompt fee.
        batch: the provider's Batch API; None: there is none, or nothing is known about it.
    """

    model_config = ConfigDict(json_schema_extra=_preset_replaces_required_keys)

    preset: Annotated[
        AppliedPreset,
        PlainValidator(_applied_preset),
        WithJsonSchema({"default": "", "title": "Preset", "type": "string"}),
    ] = Field(default_factory=AppliedPreset, exclude=True)
    base_url: str
    model: str = Field(min_length=1)
    identity: TeacherName | None = None
    api_key_env: str | None = None
    terms: str = ""
    replicas: tuple[str, ...] = ()
    allow_http: bool = False
    ca_file: str | None = None
    idempotency_header: _IdempotencyHeader | None = None
    max_n: int = Field(default=1, gt=0, le=MAX_CHOICES)
    limits: LimitsSection = LimitsSection()
    price: PriceSection | None = None
    batch: BatchApiSection | None = None
    replica: tuple[ReplicaSection, ...] = Field(default=(), exclude_if=_is_empty)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        return provider_presets.fill(data) if isinstance(data, Mapping) else data

    @field_validator("base_url")
    @classmethod
    def _one_clean_url(cls, value: str) -> str:
        return check_url(value)

    @field_validator("replicas")
    @classmethod
    def _clean_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_url(url) for url in value)

    @field_validator("replica")
    @classmethod
    def _each_once(cls, value: tuple[ReplicaSection, ...]) -> tuple[ReplicaSection, ...]:
        urls = [replica.base_url for replica in value]
        if twice := sorted({url for url in urls if urls.count(url) > 1}):
            raise ValueError(f"{twice[0]} stands there twice: one entry for each address")
        return value

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _one_credential(cls, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            raise ValueError("one credential per teacher: no key pools")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _a_name_not_a_key(cls, value: str | None) -> str | None:
        if value is not None and (not _ENV_NAME.match(value) or value.startswith("sk-")):
            raise ValueError("must be the NAME of an environment variable, not the key itself")
        return value

    @model_validator(mode="after")
    def _plain_http_where_it_may_be(self) -> TeacherSection:
        self.plain_http_notes()
        return self

    def plain_http_notes(self) -> list[str]:
        """Return a warning for each address to which plain http carries what others should not read.

        Raises:
            ValueError: plain http is not allowed for an address.
        """
        has_key, is_allowed = self.api_key_env is not None, self.allow_http
        notes = [check_plain_http(url, has_key=has_key, is_allowed=is_allowed) for url in self.base_urls]
        return [note for note in notes if note]

    def free_price_note(self) -> str:
        """Return a warning if the price is 0 at an address on the internet: no ceiling in USD acts then."""
        if self.price is None or self.price.input or self.price.output:
            return ""
        public = [host for url in self.base_urls if not is_private(host := urlsplit(url).hostname or "")]
        if not public:
            return ""
        return (
            f"[teacher.price] says that {public[0]} costs nothing, so no ceiling in USD ever ends a run: set "
            "its prices, or remove the table to be told that the cost is unknown"
        )

    @property
    def preset_values(self) -> dict[str, Any]:
        """The values that came from the preset, as JSON values by dotted key, as in `price.input`."""
        return {key: _value_at(self.model_dump(mode="json"), key) for key in self.preset.keys}

    @property
    def base_urls(self) -> tuple[str, ...]:
        """All addresses of this teacher, each once, `base_url` first."""
        urls = (self.base_url, *self.replicas, *(replica.base_url for replica in self.replica))
        return tuple(dict.fromkeys(urls))

    @property
    def addresses(self) -> tuple[ReplicaSection, ...]:
        """All addresses in the order of `base_urls`, with their limits and weights."""
        described = {replica.base_url: replica for replica in self.replica}
        return tuple(described.get(url) or ReplicaSection(base_url=url) for url in self.base_urls)

    def max_concurrency_of(self, address: ReplicaSection) -> int:
        """Most requests in flight at one address."""
        return address.limits.max_concurrency or self.limits.max_concurrency

    @property
    def key_name(self) -> str:
        """What stands for this teacher in request keys: its identity, or else its first address."""
        return self.identity or self.base_url

    @property
    def teacher_id(self) -> str:
        """`base_url|model` or `identity|model`: what the rows call this teacher."""
        return f"{self.key_name}|{self.model}"


def api_key(teacher: TeacherSection, environment: Mapping[str, str] = os.environ) -> str | None:
    """Read the credential from the environment; None when the teacher needs none.

    Raises:
        ConfigError: the named variable is unset or empty.
    """
    if teacher.api_key_env is None:
        return None
    value = environment.get(teacher.api_key_env, "").strip()
    # The value may be a key pasted in place of a name: do not print it.
    name = teacher.api_key_env if _SHOWN_NAME.match(teacher.api_key_env) else "named there"
    if not value:
        raise ConfigError(
            f"environment variable {name} is not set",
            place="teacher.api_key_env",
            remedy="export it, or set it in .env beside the file; remove api_key_env if no key is needed",
        )
    if not value.isascii() or not value.isprintable() or set(value) & set(" ,;"):
        raise ConfigError(
            f"environment variable {name} does not hold one key: it has spaces, commas or unusual characters",
            place="teacher.api_key_env",
            remedy="one credential per teacher: no key pools; was a quotation mark copied along?",
        )
    return value
