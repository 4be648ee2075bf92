"""What `harvester fleet` refuses before it connects to a cluster, and how ranks' endings become one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from harvester.errors import ConfigError, RunState, StoreError, TermsRefused
from harvester.fleet.checks import FleetOptions, require_possible
from harvester.fleet.folder import FleetState, read_state, require_ranks, write_state
from harvester.fleet.status import RankView, exit_code_of, fleet_status, overall_state, rank_lines
from harvester.library import HarvestOptions
from harvester.mock_teacher.running import RunningMock
from tests import commands
from tests.harvester.run.test_shards import write

Mock = Callable[..., RunningMock]


def options(ranks: int | None = 2, **harvest: object) -> FleetOptions:
    return FleetOptions(None, ranks, False, HarvestOptions(**harvest))  # type: ignore[typeddict-item]


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_extra_is_named(mock_teacher: Mock, tmp_path: Path) -> None:
    path = write(tmp_path, mock_teacher(), 2)
    done = commands.run("harvester", ["fleet", path])
    assert done.returncode == 2
    assert "error[missing_package]" in done.stderr
    assert "pip install 'blackbox-distillation[ray]'" in done.stderr
    assert "ray" not in sys.modules


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ('[run]\ntransport = "batch"\n', "run.transport"),
        ('[run]\nshard = "1/2"\n', "run.shard"),
        ('[score]\nvia = "echo"\n', "score"),
    ],
)
def test_what_a_fleet_cannot_do_is_refused(mock_teacher: Mock, tmp_path: Path, more: str, place: str) -> None:
    path = write(tmp_path, mock_teacher(), 2, more)
    with pytest.raises(ConfigError) as caught:
        require_possible(path, options())
    assert caught.value.place == place


def test_terms_are_asked_before_anything_else(mock_teacher: Mock, tmp_path: Path) -> None:
    path = write(tmp_path, mock_teacher(), 2)
    path.write_text(path.read_text().replace('terms = "mock-teacher"', 'terms = "openai"'))
    with pytest.raises(TermsRefused):
        require_possible(path, options())


def test_a_fleet_keeps_its_number_of_ranks(tmp_path: Path) -> None:
    state = FleetState(4, {2: "a 192.0.2.7"}, {"ranks": {}})
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    require_ranks(state, 4, tmp_path)
    require_ranks(state, None, tmp_path)
    with pytest.raises(ConfigError, match="has 4 ranks"):
        require_ranks(state, 5, tmp_path)
    (tmp_path / "fleet.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        read_state(tmp_path)
    (tmp_path / "fleet.json").unlink()
    assert read_state(tmp_path) is None


@pytest.mark.parametrize(
    ("codes", "signal_number", "code"),
    [
        ([0, 0], 0, 0),
        ([0, 3], 0, 3),
        ([10, 3, 0], 0, 10),
        ([143, 0], 15, 143),
        ([0, 0], 2, 130),
        ([143, 77, 5], 15, 77),
        ([5, 10], 0, 5),
        ([75, 0], 0, 75),
    ],
)
def test_the_gravest_rank_decides(codes: list[int], signal_number: int, code: int) -> None:
    assert exit_code_of(codes, signal_number) == code


def test_the_status_of_all_ranks_adds_up() -> None:
    one = {
        "state": "running",
        "answers_stored": 5,
        "from_cache": 2,
        "rows_total": 20,
        "errors": {"timeout": 1},
    }
    two = {"state": "on hold", "answers_stored": 7, "rows_total": 30, "errors": {"timeout": 2}}
    rates = {"rates": {"requests_per_minute": 60.0, "answers_per_minute": 50.0}, "refused_share": 0.1}
    views = [
        RankView("running", "a", 20, "s1", status={**one, **rates}),
        RankView("on hold", "b", 30, "s2", losses=1, note="slow", status={**two, **rates}),
        RankView(rows_total=10),
    ]
    budgets = {"run": {"tokens": 100, "tokens_spent": 40}}
    status = fleet_status(views, overall_state(views, is_draining=False), budgets, {"run_id": "fleet of 3"})
    assert status["state"] == RunState.RUNNING
    assert (status["answers_stored"], status["rows_total"], status["errors"]) == (12, 60, {"timeout": 3})
    assert (status["rates"]["requests_per_minute"], status["refused_share"]) == (120.0, 0.1)
    assert [rank["rows_done"] for rank in status["ranks"]] == [7, 7, 0]
    lines = rank_lines(status)
    assert len(lines) == 3
    assert "lost 1x; slow" in lines[1]
    assert overall_state(views, is_draining=True) == RunState.DRAINING
