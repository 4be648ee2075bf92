"""Harvest from the local teachers over HTTP, by `harvester run`.

The held-out rows are asked first, once and greedily, in a store of each teacher; a harvest goes on in a copy
of that store with its own sampling. All servers of a folder listen on one port, since requests are known by
their address: an interrupted harvest goes on.

    harvests/KEY/store, harvest.json (written last)
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harvester_data.skill_rows import Row, harvest_rows, held_out_rows

from benchmarks.quality import answer_server, commands
from benchmarks.quality import cache as made
from harvester.mock_teacher.tasks.phrasings import pattern_of
from harvester.mock_teacher.tasks.rules import Solved, wrong_answer

SKILLS = Path(__file__).resolve().parents[2] / "data" / "skills"
# Folders in data/skills. All teachers are served under the name that the terms record of the mock explains.
STRONG, WEAK, UNSURE = "mock-teacher", "weaker/mock-teacher", "unsure/mock-teacher"
# Right answers, from `answer_server`.
GOLD = "gold"
MODEL = "mock-teacher"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Harvest:
    """What is asked of a teacher.

    Attributes:
        teacher: a folder in data/skills, or `GOLD`: the right answers.
        prompts: the first so many of the 8,000 harvest rows; 0: the held-out rows alone.
        samples, temperature, top_logprobs: as in `[sampling]`.
        corrupted: share of the answers that are replaced by a plausible wrong one, the same for all samples
            of a prompt.
        splits: held-out splits that are asked; empty: all.
        test_each: every so manieth held-out row is asked.
    """

    teacher: str
    prompts: int
    samples: int = 1
    temperature: float = 0.0
    top_logprobs: int = 0
    corrupted: float = 0.0
    splits: tuple[str, ...] = ()
    test_each: int = 1

    @property
    def held_out(self) -> Harvest:
        """Return the harvest of its held-out rows alone."""
        return Harvest(self.teacher, 0, splits=self.splits, test_each=self.test_each)


class Harvests:
    """Makes harvests in a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "harvests"
        self._port_file = folder / "port.json"

    def folder_of(self, harvest: Harvest) -> Path:
        """Return the folder of a harvest."""
        teacher = made.digest(SKILLS / harvest.teacher) if harvest.teacher != GOLD else GOLD
        rows = [*train_rows(harvest), *scored_rows(harvest)]
        return self._folder / made.digest(asdict(harvest), teacher, rows, MAX_TOKENS)

    def make(self, harvest: Harvest) -> Path:
        """Return the folder of a finished harvest."""
        folder = self.folder_of(harvest)
        if (folder / "harvest.json").exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        if harvest.prompts and not (folder / "store").exists():
            shutil.copytree(self.make(harvest.held_out) / "store", folder / "part", dirs_exist_ok=True)
            (folder / "part").rename(folder / "store")
        made.write_lines(folder / "rows.jsonl", train_rows(harvest) or scored_rows(harvest))
        (folder / "harvest.toml").write_text(harvest_toml(harvest, self.port, "rows.jsonl"))
        with serve(harvest, self.port, folder):
            result = commands.harvester("run", folder / "harvest.toml")
        result["seconds"] = round(time.monotonic() - began, 1)
        made.write_json(folder / "harvest.json", result)
        return folder

    @property
    def port(self) -> int:
        """Return the port of all servers of this folder, chosen once."""
        if not self._port_file.exists():
            made.write_json(self._port_file, free_port())
        port: int = made.read_json(self._port_file)
        return port


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_rows(harvest: Harvest) -> list[Row]:
    """Return the rows whose answers are learned."""
    return _harvest_rows()[: harvest.prompts]


@cache
def _harvest_rows() -> list[Row]:
    return harvest_rows()


def scored_rows(harvest: Harvest) -> list[Row]:
    """Return the held-out rows, which are asked and scored but never learned."""
    rows = [row for row in held_out_rows() if not harvest.splits or row["split"] in harvest.splits]
    return rows[:: harvest.test_each]


def harvest_toml(harvest: Harvest, port: int, prompts: str) -> str:
    """Return a harvest.toml."""
    sampling: dict[str, Any] = {
        "temperature": harvest.temperature,
        "max_tokens": MAX_TOKENS,
        "samples": harvest.samples,
        "top_logprobs": harvest.top_logprobs,
    }
    if not harvest.prompts:
        sampling = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    return commands.toml(
        {
            "teacher": {
                "base_url": f"http://127.0.0.1:{port}/v1",
                "model": MODEL,
                "terms": "mock-teacher",
            },
            "teacher.limits": {"max_concurrency": 64},
            "prompts": {"files": [prompts]},
            "sampling": sampling,
            "store": {"path": "store"},
        }
    )


def serve(harvest: Harvest, port: int, folder: Path) -> AbstractContextManager[Any]:
    """Serve the teacher of a harvest."""
    if harvest.teacher == GOLD:
        answers = {row["prompt"]: row["reference"] for row in (*train_rows(harvest), *scored_rows(harvest))}
        return answer_server.serve(MODEL, answers, port)
    flags = ["--model", str(SKILLS / harvest.teacher), "--port", str(port)]
    if harvest.corrupted:
        faults = folder / "faults.json"
        faults.write_text(json.dumps({"fault": corruptions(train_rows(harvest), harvest.corrupted)}))
        flags += ["--faults", str(faults)]
    return commands.mock_teacher(*flags)


def corruptions(rows: list[Row], share: float) -> list[dict[str, Any]]:
    """Return fault rules: each replaces a share of the answers to one prompt by a plausible wrong answer."""

    rules = []
    for number, row in enumerate(rows):
        match = pattern_of(row["phrasing"]).fullmatch(row["prompt"])
        assert match is not None
        solved = Solved(row["task"], row["reference"], row["phrasing"], match.groupdict())
        rules.append(
            {
                "action": "content",
                "prompt": row["prompt"],
                "probability": share,
                "seed": number,
                "value": wrong_answer(solved, random.Random(number)),
            }
        )
    return rules
