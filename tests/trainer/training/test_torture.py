"""Kill a training at random steps and inside saves; the final adapter equals that of an undisturbed run."""

from __future__ import annotations

import os
import random
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
SHAPE = {
    "train": {"epochs": 2, "batch_tokens": 128, "save_every": 1, "max_length": 64, "pack_tokens": 64},
    "lora": {"dropout": 0.2},
}


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    result = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in result.items()}


def torture(fork_server, folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = tiny.skill(16)

    def live(toml: Path, point: str = "", kill_after_s: float | None = None) -> dict[str, int]:
        words = ("train", toml)
        return fork_server(
            "command", words=words, env={"HARVESTER_FAILPOINT": point}, kill_after_s=kill_after_s
        )

    uninterrupted = tiny.train_toml(folder / "whole", rows, **SHAPE)
    began = time.monotonic()
    assert live(uninterrupted)["code"] == 0
    life_s = time.monotonic() - began
    wanted = adapter_bytes(folder / "whole")
    done, victim = 0, 0
    while done < kills:  # a training that outlives its last kill is finished, compared, and another begins
        toml = tiny.train_toml(folder / f"victim-{victim}", rows, **SHAPE)
        while True:
            if done >= kills:
                ended = live(toml)
            elif draw.random() < 0.7:
                ended = live(toml, f"{draw.choice(POINTS)}:{draw.randint(1, 4)}")
            else:
                ended = live(toml, kill_after_s=draw.uniform(0.0, life_s))
            if ended["signal"] != 9:
                break
            done += 1
        assert (ended["signal"], ended["code"]) == (0, 0), ended["err"]
        assert adapter_bytes(toml.parent) == wanted
        assert not list((toml.parent / "out").glob(".adapter*"))
        victim += 1
    print(f"{done} kills of {victim} trainings, no bit changed")


@pytest.mark.long
def test_05_twenty_kills_change_no_bit(fork_server, tmp_path):
    torture(fork_server, tmp_path, 20, seed=7)


@pytest.mark.torture
def test_two_hundred_kills_change_no_bit(fork_server, tmp_path):
    torture(
        fork_server, tmp_path, int(os.environ.get("TORTURE_KILLS", "200")), seed=int.from_bytes(os.urandom(4))
    )
