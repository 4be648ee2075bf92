"""How a run behaves, as frozen values: what it may spend, how patient it is, its hours, its canaries."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from harvester.config import schedule as hours
from harvester.config.bounds import EXACT, MOST_A_MINUTE, MOST_USD, YEAR_S

BASE_DEADLINE_S = 120.0
"""What an attempt may take beside its tokens: the connection, the teacher's queue, the prompt."""
SLOWEST_TOKENS_PER_S = 10.0
UNBOUNDED_DEADLINE_S = 600.0
LONGEST_DEADLINE_S = 3600.0
Rate = Annotated[float, Field(gt=0, le=MOST_A_MINUTE)]
PositiveInt = Annotated[int, Field(gt=0, le=EXACT)]
Count = Annotated[int, Field(ge=0, le=EXACT)]
Seconds = Annotated[float, Field(gt=0, le=YEAR_S)]


class FrozenModel(BaseModel):
    """A table of harvest.toml: it never changes, and refuses what it does not know, and what is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class BudgetSection(FrozenModel):
    """Ceilings on what may be spent in one run."""

    usd: float | None = Field(default=None, gt=0, le=MOST_USD)
    tokens: PositiveInt | None = None


class RunSection(FrozenModel):
    """How one run behaves.

    Without `deadline_s`, an attempt may take as long as its `max_tokens` need from a slow teacher.
    `retry_possibly_billed = false` sends nothing again that may have been billed: it is a dead letter.
    """

    max_failed: Count = 0
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

    def deadline_for(self, max_tokens: int) -> float:
        """Seconds that one attempt may take, connect to last byte; `max_tokens` is 0 for no ceiling."""
        if self.deadline_s is not None:
            return self.deadline_s
        if not max_tokens:
            return UNBOUNDED_DEADLINE_S
        return min(LONGEST_DEADLINE_S, BASE_DEADLINE_S + max_tokens / SLOWEST_TOKENS_PER_S)


class CanarySection(FrozenModel):
    """A few prompts asked again on schedule, to see whether the teacher is still who it was.

    `tolerance` bounds the mean share of words in which answers may differ from the first ones; `pause` holds
    the run at a change, until `harvester resume`.
    """

    prompts: str | None = None
    every_s: Seconds = 3600
    tolerance: float = Field(default=0.5, ge=0, le=1)
    pause: bool = False


class ScheduleSection(FrozenModel):
    """When a run may work; outside its hours it ends with exit 10, or waits when it watches."""

    hours: tuple[str, ...] = ()
    finish_by: AwareDatetime | None = None

    @field_validator("hours")
    @classmethod
    def _openings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            hours.parse(text)
        return value

    @field_validator("finish_by")
    @classmethod
    def _in_sight(cls, value: datetime | None) -> datetime | None:
        if value is not None:
            hours.stamp(value)
        return value
