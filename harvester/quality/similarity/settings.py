"""Define the table `[decontaminate]`, which harvest.toml and curate.toml share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from harvester.errors import ConfigError
from harvester.quality.held_out import DEFAULT_EVAL_SHARE, is_drawn, named_split, prompt_key
from harvester.quality.similarity import eval_sets
from harvester.quality.similarity.duplicates import DEFAULT_THRESHOLD, LEAST_THRESHOLD
from harvester.quality.similarity.leaks import DEFAULT_OVERLAP, LeakIndex, leak_label
from harvester.system.files import sha256_of
from harvester.system.toml_file import validate


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EvalSetSection(_Frozen):
    """An evaluation set: a file or folder, and the fields to compare.

    Attributes:
        path: file or folder, relative to the configuration file.
        fields: names of the fields to compare. Empty: those that ask.
    """

    path: str = Field(min_length=1)
    fields: tuple[str, ...] = ()


class DecontaminateSection(_Frozen):
    """Which texts must not be in training data. Held-out prompts always count as such.

    Attributes:
        sets: evaluation sets: JSON lines, JSON, Parquet, or folders of them; relative to the configuration.
        overlap: least share of common runs of 13 words that is a hit, of the shorter text; 0: any.
        similarity: least similarity of a fuzzy hit.
        split_field: metadata field with a row's split; rows with another split than "train" are held out.
        eval_share: share of the prompts without a split that the training holds out, as `[data] eval_share`
            of train.toml; 0: none.
    """

    sets: tuple[str | EvalSetSection, ...] = ()
    overlap: float = Field(default=DEFAULT_OVERLAP, ge=0, le=1)
    similarity: float = Field(default=DEFAULT_THRESHOLD, ge=LEAST_THRESHOLD, le=1)
    split_field: str = "split"
    eval_share: float = Field(default=DEFAULT_EVAL_SHARE, ge=0, le=1)

    def is_held_out(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a row's metadata puts it into another split than "train"."""
        return named_split(metadata, self.split_field) not in {"", "train"}

    def is_drawn(self, metadata: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a training draws a row without a split for evaluation; `messages` are as stored."""
        if named_split(metadata, self.split_field) or not self.eval_share:
            return False
        return is_drawn(prompt_key(messages), self.eval_share)

    def empty_index(self) -> LeakIndex:
        """Return an index of texts that must not be in training data, without a text so far."""
        return LeakIndex(self.overlap, self.similarity)


class _DecontaminateFile(_Frozen):
    """A file of which only `[decontaminate]` is looked at."""

    decontaminate: DecontaminateSection


def parse(table: dict[str, Any], place_of: Callable[..., str]) -> DecontaminateSection:
    """Validate a table `[decontaminate]`.

    Raises:
        ConfigError: an unknown key or an impossible value.
    """

    class _HasFiles(_Frozen):
        decontaminate: DecontaminateSection

    return validate(
        _HasFiles, {"decontaminate": table}, place_of=place_of, missing="name the sets in `sets`"
    ).decontaminate


def load_sets(section: DecontaminateSection, root: Path) -> tuple[LeakIndex, list[dict[str, Any]]]:
    """Read the evaluation sets; return their index, and a description of each file for cards.

    Raises:
        ConfigError: a set can't be read.
    """
    index = section.empty_index()
    described = []
    for entry in section.sets:
        named = EvalSetSection(path=entry) if isinstance(entry, str) else entry
        path = root / named.path
        try:
            for text in eval_sets.read(path, named.fields):
                index.add(text.text, leak_label(named.path, text.place, text.text))
            files = eval_sets.files_of(path)
        except ConfigError as error:
            index.close()
            raise error from None
        described += [{"set": named.path, "file": file.name, "sha256": sha256_of(file)} for file in files]
    return index, described
