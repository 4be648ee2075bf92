"""Read distil.toml and the files that it names. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harvester.system.toml_file import read_toml, validate
from trainer.config import TrainConfig, load
from trainer.errors import ConfigError

_LEAST = "a distil.toml needs harvest and train"


class DistilConfig(BaseModel):
    """All of distil.toml. Each file that it names is also read by a command of its own.

    Attributes:
        harvest: the harvest.toml: teacher, prompts, budget, store.
        curate: the curate.toml, whose corpus is that store. Empty: all answers are learned from.
        train: the train.toml, whose corpus is the curated one (`out` of curate.toml), or that store.
        dtype: of the exported weights: float32, bfloat16 or float16. Empty: the base's own.
        gguf: GGUF files to export, too: f16, q8_0, q4_k_m (extra `gguf`).
        mock_teacher: start `harvester mock-teacher` at the address of harvest.toml while it is harvested.
        out: folder of distil.html, the curated corpora, the trainings and the student. It has no
            input in it, and lies in none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    harvest: str = Field(min_length=1)
    curate: str = ""
    train: str = Field(min_length=1)
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    gguf: tuple[Literal["f16", "q8_0", "q4_k_m"], ...] = ()
    mock_teacher: bool = False
    out: str = "distil"


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A TOML file and its content."""

    path: Path
    table: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where relative paths of the file start."""
        return self.path.parent


@dataclass(frozen=True, slots=True)
class DistilFiles:
    """Hold distil.toml with what it names.

    Attributes:
        path: of distil.toml.
        train_file: train.toml; `train` is what it means.
        store: the store that is harvested.
        folder: the output folder.
    """

    path: Path
    config: DistilConfig
    harvest: NamedFile
    curate: NamedFile | None
    train_file: NamedFile
    train: TrainConfig
    store: Path
    folder: Path

    @property
    def name(self) -> str:
        """Name of the student: `[out] name` of train.toml, else that of the folder of distil.toml."""
        return self.train.out.name or self.folder.parent.name


def load_distil(path: Path) -> DistilFiles:
    """Read distil.toml, and the harvest.toml, curate.toml and train.toml that it names.

    Raises:
        ConfigError: a file is missing or broken, or one does not read what the one before it writes.
    """
    file = read_toml(path, _LEAST)
    config = validate(DistilConfig, file.table, place_of=file.place_of, missing=_LEAST)
    root = path.resolve().parent
    harvest = _named(root / config.harvest)
    section = harvest.table.get("store")
    store = section.get("path", "store") if isinstance(section, dict) else "store"
    filled = (harvest.folder / str(store)).resolve()
    curate = _named(root / config.curate) if config.curate else None
    learned = filled
    if curate is not None:
        read = (curate.folder / str(curate.table.get("corpus", ""))).resolve()
        _require_same(filled, read, f"{config.curate}: corpus", "[store] path of harvest.toml")
        learned = (curate.folder / str(curate.table.get("out", ""))).resolve()
    train = load(root / config.train)
    wanted = "out of curate.toml" if curate is not None else "[store] path of harvest.toml"
    _require_same(learned, train.corpus, f"{config.train}: [data] corpus", wanted)
    train_file = _named(root / config.train)
    out = (root / config.out).resolve()
    return DistilFiles(path.resolve(), config, harvest, curate, train_file, train, filled, out)


def _named(path: Path) -> NamedFile:
    return NamedFile(path.resolve(), read_toml(path, "`trainer init` writes one").table)


def _require_same(written: Path, read: Path, place: str, wanted: str) -> None:
    if written != read:
        raise ConfigError(
            f"reads {read}, and the stage before it writes {written}",
            place=place,
            remedy=f"let it name the {wanted}",
        )
