"""Killed at random steps and inside saves, the final adapter is bit-equal to that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trainer import tiny

POINTS = (
    "train.backward",
    "train.update",
    "checkpoint.adapter_written",
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
)
SHAPE = {"train": {"epochs": 3, "save_every": 1, "pack_tokens": 128}, "lora": {"dropout": 0.2}}


@pytest.fixture(scope="module")
def nursery():
    """One process with torch loaded, which forks the trainings."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.trainer.nursery"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:

        def live(toml: Path, point: str = "", kill_after_s: float | None = None) -> dict[str, int]:
            told = {"toml": str(toml), "env": {"HARVESTER_FAILPOINT": point}, "kill_after_s": kill_after_s}
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield live
        process.stdin.close()


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    found = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def torture(nursery, folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = tiny.skill(40)
    whole = tiny.train_toml(folder / "whole", rows, **SHAPE)
    began = time.monotonic()
    assert nursery(whole)["code"] == 0
    life_s = time.monotonic() - began
    wanted = adapter_bytes(folder / "whole")
    done, victim = 0, 0
    while done < kills:  # a training that outlives its last kill is finished, compared, and another begins
        toml = tiny.train_toml(folder / f"victim-{victim}", rows, **SHAPE)
        while True:
            if done >= kills:
                ended = nursery(toml)
            elif draw.random() < 0.7:
                ended = nursery(toml, f"{draw.choice(POINTS)}:{draw.randint(1, 4)}")
            else:
                ended = nursery(toml, kill_after_s=draw.uniform(0.0, life_s))
            if ended["signal"] != 9:
                break
            done += 1
        assert ended == {"signal": 0, "code": 0}
        assert adapter_bytes(toml.parent) == wanted
        assert not list((toml.parent / "out").glob(".adapter*"))
        victim += 1


def test_twenty_kills_change_no_bit(nursery, tmp_path):
    torture(nursery, tmp_path, 20, seed=7)


@pytest.mark.torture
def test_two_hundred_kills_change_no_bit(nursery, tmp_path):
    torture(nursery, tmp_path, 200, seed=int.from_bytes(os.urandom(4)))
