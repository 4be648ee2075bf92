"""Read the harvest.toml and the train.toml of an experiment, which must share a store. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from harvester.config.teacher_section import TeacherSection
from harvester.system.toml_file import read_toml, validate
from trainer.config import TrainConfig, load
from trainer.errors import ConfigError

_MISSING = "`harvester init` writes one"


class _OfTeacher(BaseModel):
    """What a harvest.toml says of its teacher."""

    teacher: TeacherSection


@dataclass(frozen=True, slots=True)
class SharedStore:
    """A harvest and the training that reads its store.

    Attributes:
        harvest: path of harvest.toml; `harvest_table` is its content.
    """

    harvest: Path
    harvest_table: dict[str, Any]
    train: TrainConfig


def load_both(folder: Path, harvest: str, train: str) -> SharedStore:
    """Read harvest.toml and train.toml; the names are relative to `folder`.

    Raises:
        ConfigError: a file is missing or broken, or the training reads another store than is harvested.
    """
    path = folder / harvest
    table = read_toml(path, _MISSING).table
    config = load(folder / train)
    section = table.get("store")
    store = section.get("path", "store") if isinstance(section, dict) else "store"
    filled = (path.parent / str(store)).resolve()
    if filled != config.corpus:
        raise ConfigError(
            f"harvest.toml fills {filled}, but the training reads another store",
            place=str(config.corpus),
            remedy="let [data] corpus of train.toml name the [store] path of harvest.toml",
        )
    return SharedStore(path.resolve(), table, config)


def system_prompt(harvest_table: Mapping[str, Any]) -> str | None:
    """Return the system prompt that a harvest adds."""
    system = harvest_table.get("prompts", {}).get("system")
    return system if isinstance(system, str) else None


def teacher_id(harvest: Path) -> str:
    """Return what the rows call the teacher of a harvest.toml; its other tables are not looked at.

    Raises:
        ConfigError: the file or its [teacher] can't be used.
    """
    file = read_toml(harvest, _MISSING)
    table = {name: value for name, value in file.table.items() if name == "teacher"}
    return validate(_OfTeacher, table, place_of=file.place_of, missing=_MISSING).teacher.teacher_id
