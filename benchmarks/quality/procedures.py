"""Run `trainer loop` (E8) and `trainer curve` (E11), each once for the same content.

loops/KEY/loop.toml, out/loop.json, seconds.json (written last)
curves/KEY/curve.toml, out/curve.json, seconds.json (written last)
"""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import cache, commands
from benchmarks.quality.bootstrap import Array
from benchmarks.quality.experiments import CONTENT, SPLITS, Sizes
from benchmarks.quality.harvests import (
    SKILLS,
    STRONG,
    Harvest,
    Harvests,
    harvest_toml,
    scored_rows,
    train_rows,
)
from benchmarks.quality.trainings import Training, train_toml

POOL = 8000


class Procedures:
    """Runs loops and the curve in a folder, in the processes of a pool."""

    def __init__(self, folder: Path, harvests: Harvests, pool: commands.Pool, sizes: Sizes) -> None:
        self._folder = folder
        self._harvests = harvests
        self._pool = pool
        self._sizes = sizes

    def loop_harvest(self) -> Harvest:
        """Return the harvest whose store each loop begins with: the held-out rows."""
        return Harvest(STRONG, 0, splits=CONTENT, test_each=self._sizes.test_each)

    def loop_folder(self, seed: int) -> Path:
        """Return the folder of a loop."""
        sizes, rows = self._sizes, train_rows(Harvest(STRONG, POOL))
        settings = (sizes.loop_rows, sizes.loop_rounds, seed, self._loop_training(seed))
        begun = self._harvests.folder_of(self.loop_harvest()).name
        return self._folder / "loops" / cache.digest(SKILLS / "student", begun, rows, *settings)

    def _loop_training(self, seed: int) -> str:
        small = {"batch_tokens": self._sizes.batch_tokens}
        training = Training(self.loop_harvest(), self._sizes.loop_epochs, seed=seed, train=small)
        return train_toml(training, Path("store"), Path("base"))

    def start_loop(self, seed: int) -> Future[Any] | None:
        """Start a loop; the teacher is served at the port of the harvests until all have ended."""
        folder = self.loop_folder(seed)
        if (folder / "seconds.json").exists():
            return None
        if not (folder / "store").exists():
            begun = self._harvests.make(self.loop_harvest())
            shutil.copytree(begun / "store", folder / "part", dirs_exist_ok=True)
            (folder / "part").rename(folder / "store")
        cache.write_lines(folder / "rows.jsonl", scored_rows(self.loop_harvest()))
        cache.write_lines(folder / "pool.jsonl", train_rows(Harvest(STRONG, POOL)))
        (folder / "harvest.toml").write_text(
            harvest_toml(self.loop_harvest(), self._harvests.port, "rows.jsonl")
        )
        base = os.path.relpath(SKILLS / "student", folder)
        (folder / "train.toml").write_text(
            self._loop_training(seed).replace('"base"', json.dumps(base)).replace('"."', '"student"')
        )
        loop = {
            "harvest": "harvest.toml",
            "train": "train.toml",
            "pool": ["pool.jsonl"],
            "rounds": self._sizes.loop_rounds,
            "rows_per_round": self._sizes.loop_rows,
            "seed": seed,
            "out": "out",
        }
        (folder / "loop.toml").write_text(commands.toml(loop))
        return self._pool.start(run, folder, "loop")

    def curve_folder(self) -> Path:
        """Return the folder of the curve."""
        rows = self._harvests.folder_of(self._claim_harvest()).name
        settings = (self._sizes.curve, "equal steps", self._sizes.seeds, self._curve_training())
        return self._folder / "curves" / cache.digest(SKILLS / "student", rows, *settings)

    def _claim_harvest(self) -> Harvest:
        return Harvest(STRONG, self._sizes.claim, splits=SPLITS, test_each=self._sizes.test_each)

    def _curve_training(self) -> str:
        small = {"batch_tokens": self._sizes.batch_tokens}
        training = Training(self._claim_harvest(), self._sizes.curve_epochs, train=small)
        return train_toml(training, Path("store"), Path("base"))

    def start_curve(self) -> Future[Any] | None:
        """Start the curve on nested subsets of the rows of E2."""
        folder = self.curve_folder()
        if (folder / "seconds.json").exists():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        store = os.path.relpath(self._harvests.folder_of(self._claim_harvest()) / "store", folder)
        base = os.path.relpath(SKILLS / "student", folder)
        text = (
            self._curve_training().replace('"store"', json.dumps(store)).replace('"base"', json.dumps(base))
        )
        (folder / "train.toml").write_text(text.replace('path = "."', 'path = "student"'))
        curve = {
            "train": "train.toml",
            "rows": self._sizes.curve,
            "steps": "equal",
            "seeds": self._sizes.seeds,
            "out": "out",
        }
        (folder / "curve.toml").write_text(commands.toml(curve))
        return self._pool.start(run, folder, "curve")

    def loop_scores(self, seed: int, prompt_ids: list[str]) -> dict[tuple[str, int], Array]:
        """Return whether each held-out prompt was answered correctly, by choice and round.

        A loop's report has accuracies; the answers to single prompts lie in the cache of its scores. They are
        found by their accuracy, which is that of the report to the last bit.

        Raises:
            LookupError: no stored score has the accuracy of a round.
        """
        out = self.loop_folder(seed) / "out"
        stored = [cache.read_json(file)["values"] for file in sorted((out / "scores").glob("*.json"))]
        tasks = [prompt.split("-")[1] for prompt in prompt_ids]
        share = {task: 1 / tasks.count(task) / len(set(tasks)) for task in tasks}
        weights = np.array([share[task] for task in tasks])
        of_prompts = [np.array(values, dtype=float) for values in stored if len(values) == len(tasks)]
        found = {}
        for entry in cache.read_json(out / "loop.json")["rounds"]:
            near = [v for v in of_prompts if abs(float(v @ weights) - entry["score"]) < 1e-9]
            if not near:
                raise LookupError(f"{out}: no score of round {entry['round']} ({entry['choose']})")
            found[entry["choose"], entry["round"]] = near[0]
        return found


def run(folder: Path, verb: str) -> None:
    """Run `trainer VERB` in its folder. Runs in a process of its own."""
    began, spent = time.monotonic(), commands.cpu_s()
    commands.trainer(folder / "log.txt", verb, folder / f"{verb}.toml", "--json")
    times = {
        "all": round(time.monotonic() - began, 1),
        "cpu": round(commands.cpu_s() - spent, 1),
    }
    cache.write_json(folder / "seconds.json", times)
