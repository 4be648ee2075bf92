"""Run `harvester run` as a process of its own, for prompts that were chosen or texts that are scored."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import HarvestFailed
from trainer.files import read_json, write_json, write_text

# Exit codes of `harvester run` after which the answers are as complete as they will be: all rows done, and
# all done but more failed than [run] max_failed.
_DONE = frozenset({0, 3})
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

    def run_scoring(self, texts: Path, via: str) -> bool:
        """Ask for the log-probabilities of a file of texts; return whether all are done, as `run_chosen`.

        The configuration is that of harvest.toml without what only concerns answers.

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
        words = [sys.executable, "-m", "harvester", "run", str(config), "--json"]
        ceilings = (
            ("--max-usd", self._files.config.max_usd),
            ("--max-tokens", self._files.config.max_tokens),
        )
        for flag, ceiling in ceilings:
            words += [] if ceiling is None else [flag, f"{ceiling}", "--budget-per", "store"]
        # A session of its own keeps a Ctrl-C of the terminal from it. One signal is passed on below; a second
        # one would cancel answers that are paid for.
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            try:
                output, _ = process.communicate()
            except BaseException:  # a signal to this process: the harvest shall drain and end as well
                process.terminate()
                process.wait()
                raise
        if process.returncode in _DONE:
            return True
        if process.returncode == _STOPPED_AT_LIMIT and _ending(output) == _BUDGET:
            return False
        code = process.returncode
        raise HarvestFailed(code if code > 0 else 128 - code)  # a negative one is a signal's number


def _ending(output: str) -> str:
    """Return the ending that the summary on stdout names."""
    try:
        summary = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return ""
    return str(summary.get("ending", "")) if isinstance(summary, dict) else ""


def toml_text(table: Mapping[str, Any]) -> str:
    """Return parsed TOML as text, one line a key of the root."""
    return "".join(f"{_quoted(key)} = {_toml(value)}\n" for key, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    return repr(value) if isinstance(value, (int, float)) else _quoted(str(value))


def _quoted(text: str) -> str:
    """Return a TOML string: that of JSON, with the one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
