"""Test the options of a run: impossible ones are refused first, and the command to resume is complete."""

from __future__ import annotations

import asyncio
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.config.overrides import Overrides
from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock
from harvester.run import job
from harvester.run.prepare import prepare
from tests.journey.run_process import write_folder

Mock = Callable[..., RunningMock]
PRICED = "[teacher.price]\ninput = 1.0\noutput = 2.0\n"


@pytest.mark.parametrize("usd", [0.0, 5.0, math.inf, math.nan])
def test_a_ceiling_in_usd_that_cant_be_kept_is_refused_before_the_first_byte(
    tmp_path: Path, usd: float
) -> None:
    config = write_folder(tmp_path, "http://127.0.0.1:9/v1", 3)
    with pytest.raises(ConfigError) as refused:
        prepare(config, Overrides(usd=usd))
    assert refused.value.place == "--max-usd"
    assert refused.value.exit_code == 2


def test_a_limit_slower_than_the_patience_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    slow = "[teacher.limits]\nrequests_per_minute = 0.05\n"
    config = write_folder(tmp_path, "http://127.0.0.1:9/v1", 3, teacher=slow)
    with pytest.raises(ConfigError, match=r"1,200 s.*patience_s"):
        prepare(config)


def test_a_ceiling_of_nothing_sends_nothing(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 3, teacher=PRICED)
    ended = asyncio.run(job.run(prepare(config, Overrides(usd=0)), lambda _: None))
    assert (ended.ending, ended.exit_code, mock.totals()["requests"]) == ("budget", 10, 0)


def test_the_resume_command_keeps_the_epoch(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    folder = tmp_path / "my 'own' run"
    folder.mkdir()
    config = write_folder(folder, mock.base_url, 3)
    first = asyncio.run(job.run(prepare(config, Overrides(epoch=2, rows=1, grace_s=2.5)), lambda _: None))
    text = first.lines()[-1].removeprefix("resume with: ")
    assert shlex.split(text) == ["harvester", "run", str(config), "--epoch", "2", "--grace", "2.5"]
    second = asyncio.run(job.run(prepare(config, Overrides(epoch=2)), lambda _: None))
    assert (second.counts.from_cache, mock.totals()["requests"]) == (1, 3)


def test_the_resume_command_repeats_every_option_but_ceilings() -> None:
    flags = Overrides(
        rows=1,
        usd=2.0,
        tokens=3,
        runtime_s=4.0,
        finish_by=5.0,
        watch=True,
        otel=True,
        metrics_file=Path("a b.prom"),
    )
    assert flags.again(Path("h.toml")) == "harvester run h.toml --metrics-file 'a b.prom' --watch --otel"
    assert Overrides(share_opening=True).again(Path("h.toml")) == "harvester run h.toml --share-opening"
