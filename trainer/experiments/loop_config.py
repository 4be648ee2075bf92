"""Read loop.toml into frozen values. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harvester.system.toml_file import read_toml, validate
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.experiments.harvest_file import load_both, system_prompt

_LEAST = "a loop.toml needs harvest, train, pool and rows_per_round"
PositiveInt = Annotated[int, Field(gt=0)]


class LoopConfig(BaseModel):
    """All of loop.toml.

    Attributes:
        harvest: the harvest.toml with teacher, price and store; its own prompts (held-out ones, and rows to
            start with if there are any) are harvested first.
        train: the train.toml; `[data] corpus` is the store of the harvest.
        pool: JSON-lines files of prompts to choose from, with references or tasks that `[verify]` can judge.
        rounds: rounds of choosing, harvesting, training and scoring.
        rows_per_round: prompts that are chosen in each round.
        choose: prompts that the student failed ("hard"), or random ones. The first round is random.
        control: also run a loop that chooses random prompts, with as many rows, to compare with.
        candidates: prompts of the pool that the student answers in a round, to find those that it fails.
            Absent: four times `rows_per_round`.
        seed: seed of the order of the pool.
        max_usd: ceiling of what all runs of the store may cost together, those before the loop included.
        max_tokens: the same in tokens.
        resamples: bootstrap resamples for the intervals.
        out: folder of loop.json, loop.html, the chosen prompts and the trainings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    harvest: str = Field(min_length=1)
    train: str = Field(min_length=1)
    pool: Annotated[tuple[str, ...], Field(min_length=1)]
    rounds: Annotated[int, Field(ge=1, le=100)] = 3
    rows_per_round: PositiveInt
    choose: Literal["hard", "random"] = "hard"
    control: bool = True
    candidates: PositiveInt | None = None
    seed: int = Field(default=0, ge=0)
    max_usd: Annotated[float, Field(gt=0)] | None = None
    max_tokens: PositiveInt | None = None
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    out: str = "loop"


@dataclass(frozen=True, slots=True)
class LoopFiles:
    """Hold loop.toml with what it names.

    Attributes:
        harvest: path of harvest.toml; `harvest_table` is its content.
        pool: the files of prompts.
        folder: the output folder.
    """

    config: LoopConfig
    train: TrainConfig
    harvest: Path
    harvest_table: dict[str, Any]
    pool: tuple[Path, ...]
    folder: Path

    @property
    def arms(self) -> tuple[str, ...]:
        """Ways of choosing that are run, the one in question first."""
        is_compared = self.config.choose == "hard" and self.config.control
        return (self.config.choose, "random") if is_compared else (self.config.choose,)

    @property
    def system(self) -> str | None:
        """The system prompt that the harvest adds."""
        return system_prompt(self.harvest_table)


def load_loop(path: Path) -> LoopFiles:
    """Read loop.toml, and the train.toml and harvest.toml that it names.

    Raises:
        ConfigError: a file is missing or broken, or the training reads another store than is harvested.
    """
    file = read_toml(path, _LEAST)
    config = validate(LoopConfig, file.table, place_of=file.place_of, missing=_LEAST)
    if config.candidates is not None and config.candidates < config.rows_per_round:
        raise ConfigError(
            f"candidates: {config.candidates:,} are fewer than rows_per_round",
            place=file.place_of(("candidates",)),
            remedy="name several times rows_per_round, or leave it out",
        )
    shared = load_both(path.parent, config.harvest, config.train)
    pool = tuple((path.parent / name).resolve() for name in config.pool)
    return LoopFiles(
        config, shared.train, shared.harvest, shared.harvest_table, pool, (path.parent / config.out).resolve()
    )
