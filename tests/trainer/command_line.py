"""Run the real command line in this process; return exit code, stdout and stderr."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import commands
from tests.trainer import tiny
from trainer import harvester_process
from trainer.cli import main as cli

RunTrainer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_trainer(monkeypatch, capsys) -> RunTrainer:
    """`run_trainer("train", toml)` -> (exit code, stdout, stderr).

    A harvest is a process of its own, forked from one that has imported the harvester.
    """
    monkeypatch.setattr(harvester_process, "program", lambda: commands.program("harvester"))

    def run(*words: object) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr("sys.argv", ["trainer", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)  # the command sets its own
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return run


@pytest.fixture
def toml(tmp_path) -> Path:
    """A small training of some ten steps, a checkpoint after each."""
    return tiny.train_toml(
        tmp_path,
        tiny.skill(40, held_out=4),
        train={"epochs": 2, "log_every": 1, "save_every": 1, "pack_tokens": 128, "warmup": 0.0},
    )


def lines(path: Path) -> list[dict[str, object]]:
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]
