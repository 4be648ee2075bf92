"""Record which stages are done: by the hash of what they read, with the hashes of the files that they made.

Paths are relative to the output folder, so a copy or a moved folder uses its own files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvester.system import failpoints
from trainer.files import read_json, write_json
from trainer.model.made_files import MadeFiles, are_unchanged

# Facts of stages that are paths in the output folder.
_PATHS = frozenset({"out", "adapter", "scorecard", "merged", "student", "report"})


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage did.

    Attributes:
        key: hash of what it read.
        result: its facts.
        seconds: that it took, when it was made.
        is_new: whether it was made by this call.
        files: that it made, by paths relative to the output folder.
    """

    name: str
    key: str
    result: Mapping[str, Any]
    seconds: float
    is_new: bool
    files: MadeFiles = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for distil.json."""
        return {
            "stage": self.name,
            "key": self.key,
            "seconds": round(self.seconds, 2),
            "is_new": self.is_new,
            "result": dict(self.result),
        }


class Records:
    """The records of one output folder: one file for each stage and key, and the newest of each stage."""

    def __init__(self, folder: Path) -> None:
        self._out = folder
        self._folder = folder / "stages"

    def find(self, name: str, key: str) -> StageResult | None:
        """Return the record of a stage that is done; None if it is not.

        It is not, either, if its files are not as it made them.
        """
        done = self._read(name, self._folder / f"{name}-{key[:16]}.json", key)
        return done if done is not None and self.is_whole(done) else None

    def newest(self, name: str) -> StageResult | None:
        """Return what a stage did last, whatever it read; None if it never was done."""
        path = self._folder / f"{name}.json"
        held = read_json(path)
        return self._read(name, path, str(held.get("key"))) if isinstance(held, dict) else None

    def is_whole(self, done: StageResult) -> bool:
        """Return whether the files that a stage made are still there, with their hashes."""
        return are_unchanged(self._out, done.files)

    def add(self, done: StageResult) -> None:
        """Write the record of a stage that is done, or was done before."""
        result = {
            fact: os.path.relpath(value, self._out) if fact in _PATHS and isinstance(value, str) else value
            for fact, value in done.result.items()
        }
        facts = {"key": done.key, "seconds": done.seconds, "result": result, "files": done.files}
        if done.is_new:
            failpoints.reach(f"distil.{done.name}")
            write_json(self._folder / f"{done.name}-{done.key[:16]}.json", facts)
        write_json(self._folder / f"{done.name}.json", facts)

    def _read(self, name: str, path: Path, key: str) -> StageResult | None:
        held = read_json(path)
        if not isinstance(held, dict) or held.get("key") != key:
            return None
        result, seconds, files = held.get("result"), held.get("seconds"), held.get("files")
        if (
            not isinstance(result, dict)
            or not isinstance(seconds, int | float)
            or not isinstance(files, dict)
        ):
            return None  # of an earlier version, or damaged
        if not all(isinstance(each, list) and len(each) == 2 for each in files.values()):
            return None
        placed = {fact: self._absolute(fact, value) for fact, value in result.items()}
        return StageResult(name, key, placed, seconds, is_new=False, files=files)

    def _absolute(self, fact: str, value: Any) -> Any:
        return str(self._out / value) if fact in _PATHS and isinstance(value, str) else value
