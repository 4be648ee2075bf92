"""Define the tables [budget], [run], [canary] and [schedule] of harvest.toml as frozen values."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from harvester.config import schedule
from harvester.config.budget_spans import BudgetSpan
from harvester.config.number_limits import MAX_EXACT_INT, MAX_PER_MINUTE, MAX_SAMPLES, MAX_USD, YEAR_S
from harvester.config.shard import Shard
from harvester.config.transport import Transport

# Seconds of an attempt's deadline for everything but its tokens: connection, queue of the teacher, prompt.
BASE_DEADLINE_S = 120.0
SLOWEST_TOKENS_PER_S = 10.0
UNBOUNDED_DEADLINE_S = 600.0
LONGEST_DEADLINE_S = 3600.0
Rate = Annotated[float, Field(gt=0, le=MAX_PER_MINUTE)]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_EXACT_INT)]
Count = Annotated[int, Field(ge=0, le=MAX_EXACT_INT)]
Seconds = Annotated[float, Field(gt=0, le=YEAR_S)]


def _seconds_of(value: object) -> object:
    return schedule.seconds(value) if isinstance(value, str) else value


# A number of seconds, or text such as "90s", "30m", "6h".
Duration = Annotated[
    Seconds,
    BeforeValidator(_seconds_of),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}),
]


class FrozenModel(BaseModel):
    """Base of every table of harvest.toml: frozen; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class CeilingSection(FrozenModel):
    """Ceilings for one span; None is no ceiling.

    Attributes:
        usd: US dollars, by `[teacher.price]`.
        tokens: tokens of prompts and answers.
    """

    usd: float | None = Field(default=None, gt=0, le=MAX_USD)
    tokens: PositiveInt | None = None


class BudgetSection(CeilingSection):
    """Ceilings on what may be spent: `usd` and `tokens` in one run, and tables for the other spans.

    Attributes:
        usd: US dollars in one run, by `[teacher.price]`.
        tokens: tokens of prompts and answers in one run.
        run: the same as `usd` and `tokens` beside it.
        store: in all runs of the store together, by its ledger.
        day: in a day, from midnight UTC; also by the ledger.
        month: in a calendar month.
    """

    run: CeilingSection = CeilingSection()
    store: CeilingSection = CeilingSection()
    day: CeilingSection = CeilingSection()
    month: CeilingSection = CeilingSection()

    @model_validator(mode="after")
    def _run_is_set_once(self) -> BudgetSection:
        for name in ("usd", "tokens"):
            if getattr(self, name) is not None and getattr(self.run, name) is not None:
                raise ValueError(f"{name} and run.{name} are the same ceiling: set one of them")
        return self

    @property
    def by_span(self) -> dict[BudgetSpan, CeilingSection]:
        """The ceilings of each span."""
        usd = self.usd if self.run.usd is None else self.run.usd
        tokens = self.tokens if self.run.tokens is None else self.run.tokens
        return {
            BudgetSpan.RUN: CeilingSection(usd=usd, tokens=tokens),
            BudgetSpan.STORE: self.store,
            BudgetSpan.DAY: self.day,
            BudgetSpan.MONTH: self.month,
        }


class RunSection(FrozenModel):
    """How one run behaves.

    Attributes:
        max_failed: rows that may fail; a complete run with more exits with 3.
        connect_timeout_s: time limit for a connection.
        max_attempts: attempts for one request before the row counts as failed. Waiting for a rate limit is
            not an attempt.
        purpose: what the answers are for; the terms are checked for it.
        trust_env: use proxies and certificates that environment variables name.
        strict_model: park the run when another model or build answers than the first one. Later runs of this
            teacher send nothing until `harvester resume`.
        deadline_s: time limit of one attempt; None: long enough for `max_tokens` from a slow teacher.
        grace_s: how long a signal waits for answers that are on their way.
        epoch: part of every request key; another number asks everything again.
        max_unusable: share of the answers, from 0 to 1, that may be empty, invalid, filtered, refused or
            unknown; a run parks above it. Attempts that may have been paid and brought no answer count as
            such. None: no limit.
        patience_s: how long a run waits for a teacher that answers nothing.
        retry_possibly_billed: false never resends what may have been billed; it becomes a dead letter.
        shard: which part of the prompts this process asks, as in "2/8"; None for all.
        share_limits: share the teacher's limits with other harvests of this machine that use the same host
            and credential.
        priority: weight among them; a harvest with 2 gets twice the share of one with 1.
        transport: how requests reach the teacher: one by one, in batches at the batch price, or in batches
            and then one by one what these don't answer in time.
    """

    max_failed: Count = 0
    max_unusable: float | None = Field(default=None, ge=0, le=1)
    deadline_s: Seconds | None = None
    connect_timeout_s: Seconds = 10
    max_attempts: PositiveInt = 5
    grace_s: Seconds = 25
    purpose: Literal["train", "eval"] = "train"
    epoch: Count = 0
    trust_env: bool = False
    patience_s: Seconds = 600
    strict_model: bool = False
    retry_possibly_billed: bool = True
    transport: Transport = Transport.ONLINE
    shard: str | None = None
    share_limits: bool = True
    priority: int = Field(default=1, ge=1, le=100)

    @field_validator("shard")
    @classmethod
    def _one_of_several(cls, value: str | None) -> str | None:
        return None if value is None else str(Shard.parse(value))

    def deadline_for(self, max_tokens: int) -> float:
        """Return the seconds that one attempt may take, from connecting to the last byte.

        Args:
            max_tokens: of the request; 0 for no ceiling.
        """
        if self.deadline_s is not None:
            return self.deadline_s
        if not max_tokens:
            return UNBOUNDED_DEADLINE_S
        return min(LONGEST_DEADLINE_S, BASE_DEADLINE_S + max_tokens / SLOWEST_TOKENS_PER_S)

    @property
    def longest_attempt_s(self) -> float:
        """The seconds after which no attempt is in flight any more, whatever its `max_tokens`."""
        return LONGEST_DEADLINE_S if self.deadline_s is None else self.deadline_s


class BatchSection(FrozenModel):
    """How a run deals with batches. Times are seconds, or text such as "90s", "30m", "6h".

    Attributes:
        patience: `hybrid` cancels a batch that is older than this, and asks its open rows one by one.
        lead: `hybrid` does the same this long before the deadline of the run.
        poll: seconds between two looks at the batches; they grow to `poll_max` while nothing changes.
        poll_max: most seconds between two looks.
        settle: a batch whose creation was not confirmed counts as never created when the provider does not
            list it this long after it was written down.
    """

    patience: Duration = 86_400
    lead: Duration = 3600
    poll: Duration = 60
    poll_max: Duration = 600
    settle: Duration = 30


class AcceptSection(FrozenModel):
    """Ask until enough answers pass their verifier.

    Attributes:
        per_prompt: answers of a prompt that must pass.
        of: most answers that are asked of a prompt.
        until: accepted answers at which the run ends; None: it goes through all prompts.
    """

    per_prompt: int = Field(gt=0, le=MAX_SAMPLES)
    of: int = Field(gt=0, le=MAX_SAMPLES)
    until: PositiveInt | None = None

    @model_validator(mode="after")
    def _asks_enough(self) -> AcceptSection:
        if self.of < self.per_prompt:
            raise ValueError(f"of = {self.of} is less than per_prompt = {self.per_prompt}")
        return self


# The default is left out of the hash of a configuration, which is what it was before the key existed.
REPLICAS_EVERY_S = 30.0


class CanarySection(FrozenModel):
    """A few prompts asked again on schedule, to detect whether the teacher has changed.

    Attributes:
        prompts: file of the prompts that are asked again. Absent: there are none.
        every_s: seconds from one round to the next.
        tolerance: largest mean share of words in which answers may differ from the first ones.
        pause: whether a change pauses the run until `harvester resume`.
        replicas_every_s: how often each of several addresses is asked the first of the prompts, or a built-in
            one, and compared with the others; 0 for never.
    """

    prompts: str | None = None
    every_s: Seconds = 3600
    tolerance: float = Field(default=0.5, ge=0, le=1)
    pause: bool = False
    replicas_every_s: float = Field(
        default=REPLICAS_EVERY_S, ge=0, le=YEAR_S, exclude_if=lambda value: value == REPLICAS_EVERY_S
    )


class ScheduleSection(FrozenModel):
    """When a run may work. Outside its hours it ends with exit 10; a watching run waits.

    Attributes:
        hours: opening hours, such as `Mon-Fri 22:00-07:00 Europe/Berlin`. Empty: always.
        finish_by: time at which the run ends, with its offset from UTC.
    """

    hours: tuple[str, ...] = ()
    finish_by: AwareDatetime | None = None

    @field_validator("hours")
    @classmethod
    def _openings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            schedule.parse(text)
        return value

    @field_validator("finish_by")
    @classmethod
    def _within_calendar(cls, value: datetime | None) -> datetime | None:
        if value is not None:
            schedule.stamp(value)
        return value
