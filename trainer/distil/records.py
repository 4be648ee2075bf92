"""Record which stages are done, by the hash of what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.system import failpoints
from trainer.files import read_json, write_json


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage did.

    Attributes:
        key: hash of what it read.
        result: its facts.
        seconds: that it took, when it was made.
        is_new: whether it was made by this call.
    """

    name: str
    key: str
    result: Mapping[str, Any]
    seconds: float
    is_new: bool

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
        self._folder = folder / "stages"

    def find(self, name: str, key: str) -> StageResult | None:
        """Return the record of a stage that is done; None if it is not."""
        return self._read(name, self._folder / f"{name}-{key[:16]}.json", key)

    def newest(self, name: str) -> StageResult | None:
        """Return what a stage did last, whatever it read; None if it never was done."""
        path = self._folder / f"{name}.json"
        held = read_json(path)
        return self._read(name, path, str(held.get("key"))) if isinstance(held, dict) else None

    def add(self, done: StageResult) -> None:
        """Write the record of a stage that is done, or was done before."""
        facts = {"key": done.key, "seconds": done.seconds, "result": done.result}
        if done.is_new:
            failpoints.reach(f"distil.{done.name}")
            write_json(self._folder / f"{done.name}-{done.key[:16]}.json", facts)
        write_json(self._folder / f"{done.name}.json", facts)

    def _read(self, name: str, path: Path, key: str) -> StageResult | None:
        held = read_json(path)
        if not isinstance(held, dict) or held.get("key") != key:
            return None
        return StageResult(name, key, held["result"], held["seconds"], is_new=False)
