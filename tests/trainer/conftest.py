"""Share what many tests of the trainer need: a finished training, and a warm process that forks others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.trainer import tiny
from trainer import config as settings
from trainer.training.train import Trained, train

ForkServer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> tuple[settings.TrainConfig, Trained]:
    """A finished training of 40 rows, 10 held out. Look, don't touch."""
    folder = tmp_path_factory.mktemp("learned")
    path = tiny.train_toml(folder, tiny.skill(40, held_out=10), train={"epochs": 12, "log_every": 1})
    config = settings.load(path)
    return config, train(config)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """`fork_server(what, **told)` -> how a fresh process ended that did it; see `fork_server.py`."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.trainer.fork_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def live(what: str, **command: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps({"what": what, **command}, default=str) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield live
        process.kill()  # nothing it holds is worth an orderly end
