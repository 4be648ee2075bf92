"""How a run behaves, as frozen values: what it may spend, how patient it is, its hours, its canaries."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from harvester import hours

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Frozen(BaseModel):
    """A table of harvest.toml: it never changes, and refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Budget(Frozen):
    """Ceilings on what may be spent in one run."""

    usd: Positive | None = None
    tokens: PositiveInt | None = None


class Run(Frozen):
    """How one run behaves."""

    max_failed: int = Field(default=0, ge=0)
    deadline_s: Positive = 120
    connect_timeout_s: Positive = 10
    max_attempts: PositiveInt = 5
    grace_s: Positive = 25
    purpose: Literal["train", "eval"] = "train"
    epoch: int = Field(default=0, ge=0)
    trust_env: bool = False
    patience_s: Positive = 600
    strict_model: bool = False


class Canary(Frozen):
    """A few prompts asked again on schedule, to see whether the teacher is still who it was.

    `tolerance` bounds the mean share of words in which answers may differ from the first ones; `pause` holds
    the run at a change, until `harvester resume`.
    """

    prompts: str | None = None
    every_s: Positive = 3600
    tolerance: float = Field(default=0.5, ge=0, le=1)
    pause: bool = False


class Schedule(Frozen):
    """When a run may work; outside its hours it ends with exit 10, or waits when it watches."""

    hours: tuple[str, ...] = ()
    finish_by: AwareDatetime | None = None

    @field_validator("hours")
    @classmethod
    def _openings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            hours.parse(text)
        return value
