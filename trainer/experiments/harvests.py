"""Run `harvester run` as a process of its own, for prompts that were chosen or texts that are scored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import HarvestFailed
from trainer.files import read_json, write_json, write_text
from trainer.harvester_process import DONE, ending_of, run_harvester, toml_text

_STOPPED_AT_LIMIT = 10
_BUDGET = "budget"


class Ceilings(Protocol):
    """The budget of an experiment."""

    @property
    def max_usd(self) -> float | None:
        """Most that all runs of the store may cost together."""

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that all runs of the store may use together."""


class HarvestFiles(Protocol):
    """What an experiment names."""

    @property
    def config(self) -> Ceilings:
        """Its settings."""

    @property
    def harvest(self) -> Path:
        """Path of harvest.toml."""

    @property
    def harvest_table(self) -> dict[str, Any]:
        """Content of harvest.toml."""

    @property
    def folder(self) -> Path:
        """The output folder."""


class Harvests:
    """Runs the harvests of one experiment under its budget."""

    def __init__(self, files: HarvestFiles) -> None:
        self._files = files

    def run_own(self) -> bool:
        """Harvest the prompts that harvest.toml itself names; return whether they are all done.

        Raises:
            HarvestFailed: it ended early, for another reason than the budget.
        """
        return self._run(self._files.harvest)

    def run_chosen(self, chosen: Path) -> bool:
        """Harvest a file of chosen prompts; return whether all are done, and not stopped by the budget.

        What is done is not started again. The configuration is that of harvest.toml, written beside it with
        other prompts, so that everything else which lies beside it is found.

        Raises:
            HarvestFailed: it ended early, for another reason than the budget.
        """
        prompts = {**self._files.harvest_table.get("prompts", {}), "files": [self._relative(chosen)]}
        return self._run_once(chosen, {**self._files.harvest_table, "prompts": prompts}, "loop")

    def run_scoring(self, texts: Path, via: str, top_logprobs: int | None = None) -> bool:
        """Ask for the log-probabilities of a file of texts; return whether all are done, as `run_chosen`.

        The configuration is that of harvest.toml without what only concerns answers.

        Args:
            via, top_logprobs: as in `[score]`.

        Raises:
            HarvestFailed: it ended early, for another reason than the budget.
        """
        table = {
            name: section
            for name, section in self._files.harvest_table.items()
            if name not in {"accept", "batch", "canary", "sampling", "prompts", "verify"}
        }
        if "run" in table:  # texts are scored one by one
            table["run"] = {key: value for key, value in table["run"].items() if key != "transport"}
        extra = self._files.harvest_table.get("sampling", {}).get("extra", {})
        table |= {"prompts": {"files": [self._relative(texts)]}, "score": {"via": via}}
        if top_logprobs is not None:
            table["score"]["top_logprobs"] = top_logprobs
        return self._run_once(texts, table | ({"sampling": {"extra": extra}} if extra else {}), "onpolicy")

    def _relative(self, path: Path) -> str:
        """Return a relative name, which is stored with the rows, so that all can be moved together."""
        return os.path.relpath(path, self._files.harvest.parent)

    def _run_once(self, prompts: Path, table: Mapping[str, Any], command: str) -> bool:
        text = toml_text(table)
        content = hashlib.sha256(text.encode() + prompts.read_bytes()).hexdigest()
        marker = self._files.folder / "harvests" / f"{content[:16]}.json"
        if read_json(marker) is not None:
            return True
        harvest = self._files.harvest
        config = harvest.with_name(f"{harvest.stem}.{command}.toml")
        write_text(config, f"# Written by `trainer {command}`, and overwritten by it.\n{text}")
        is_done = self._run(config)
        if is_done:
            write_json(marker, {"prompts": prompts.name})
        return is_done

    def _run(self, config: Path) -> bool:
        words = ["run", str(config)]
        ceilings = (
            ("--max-usd", self._files.config.max_usd),
            ("--max-tokens", self._files.config.max_tokens),
        )
        for flag, ceiling in ceilings:
            words += [] if ceiling is None else [flag, f"{ceiling}", "--budget-per", "store"]
        code, summary = run_harvester(*words)
        if code in DONE:
            return True
        if code == _STOPPED_AT_LIMIT and summary.get("ending") == _BUDGET:
            return False
        ending, why = ending_of(summary)
        raise HarvestFailed(code, ending=ending, why=why)
