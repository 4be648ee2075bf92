"""Read curve.toml into frozen values. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from harvester.system.toml_file import read_toml, validate
from trainer.config import TrainConfig, load
from trainer.errors import ConfigError
from trainer.experiments.power_law import FEWEST_SIZES

_LEAST = 'a curve.toml needs `train = "train.toml"`'
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


class CurveConfig(BaseModel):
    """All of curve.toml.

    Attributes:
        train: the train.toml with base, corpus, held-out split, training settings and `[verify]`.
        rows: sizes of the subsets in rows of the corpus, four different ones at least. Absent: all rows of
            the training split, and five times half of it.
        steps: optimiser steps of each size: as many as the largest makes ("equal"), so that sizes differ in
            their rows alone, or as many as `[train] epochs` passes over its own rows take ("epochs"), which
            gives fewer rows fewer steps, too, and so lets further rows seem worth more.
        seeds: seeds of the order of the prompts and of the training; each size is trained once for each.
            Absent: `[train] seed`. With several, the intervals include the noise between trainings directly.
        measure: what is scored on the held-out prompts: the accuracy (mean over the tasks), or the loss on
            the teacher's answers in nats per token.
        next_dollars: dollars whose gain is predicted.
        next_rows: rows whose gain is predicted where rows have no price.
        least_gain: gain that the next dollars must bring to go on, in the unit of the score.
        resamples: bootstrap resamples for the intervals.
        out: folder of curve.json, curve.html and of the trainings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str = Field(min_length=1)
    rows: tuple[PositiveInt, ...] | None = None
    steps: Literal["equal", "epochs"] = "equal"
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    measure: Literal["accuracy", "loss"] = "accuracy"
    next_dollars: Positive = 1.0
    next_rows: PositiveInt = 1000
    least_gain: float = Field(default=0.0, ge=0)
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    out: str = "curve"


def load_curve(path: Path) -> tuple[CurveConfig, TrainConfig, Path]:
    """Read curve.toml and the train.toml that it names.

    Returns:
        both, and the output folder.

    Raises:
        ConfigError: a file is missing or broken, or there are too few sizes or the same seed twice.
    """
    file = read_toml(path, _LEAST)
    config = validate(CurveConfig, file.table, place_of=file.place_of, missing=_LEAST)
    if config.rows is not None and len(set(config.rows)) < FEWEST_SIZES:
        raise ConfigError(
            f"rows: a curve of three parameters needs {FEWEST_SIZES} different sizes at least, "
            f"there are {len(set(config.rows))}",
            place=file.place_of(("rows",)),
            remedy="name more sizes, each about half of the next",
        )
    if config.seeds is not None and len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(
            "seeds: a seed is named twice; its training would be counted twice",
            place=file.place_of(("seeds",)),
            remedy="name each seed once",
        )
    return config, load(path.parent / config.train), (path.parent / config.out).resolve()
