"""Go with `trainer distil` from prompts to a student: once, again, after kills, and with changed files."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.store.reader import Corpus
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.evaluation.test_evaluated_rows import never_read
from tests.trainer.training.test_run_workers import alive
from tests.waiting import until
from trainer.data import dataset
from trainer.distil.pipeline import STAGES
from trainer.starter import write_starter
from trainer.training.validation import Validation

ROWS, HELD_OUT = 24, 6


def write_run(folder: Path, mock: RunningMock, *, is_tiny: bool = True) -> Path:
    """The folder of `trainer init` with another teacher, a tinier base, and fewer prompts."""
    write_starter(folder)
    if is_tiny:
        shutil.rmtree(folder / "base")
        tiny.base(folder / "base")
    for name, count in (("train", ROWS), ("held-out", HELD_OUT)):
        path = folder / "prompts" / f"{name}.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:count]) + "\n")
    text = (folder / "harvest.toml").read_text()
    address = next(line for line in text.splitlines() if line.startswith("base_url"))
    (folder / "harvest.toml").write_text(text.replace(address, f'base_url = "{mock.base_url}"'))
    replace(folder / "distil.toml", "mock_teacher = true", "mock_teacher = false")
    replace(folder / "train.toml", "epochs = 6", "epochs = 2\nthreads = 1\nlog_every = 1")
    quick = "every = 0\nmax_new_tokens = 8\nspeed_prompts = 0"
    replace(folder / "train.toml", 'every = "10%"', quick)
    replace(folder / "train.toml", "patience = 3", "patience = 0")
    return folder / "distil.toml"


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def made_now(result: dict[str, Any]) -> list[str]:
    return [stage["stage"] for stage in result["stages"] if stage["is_new"]]


@pytest.mark.slow
def test_every_stage_is_made_once_through_kills_and_changes(
    run_trainer,  # noqa: F811
    fork_server,
    mock_teacher,
    tmp_path: Path,
) -> None:
    mock = mock_teacher(accuracy=1.0)
    toml = write_run(tmp_path / "run", mock)
    out = toml.parent / "distil"
    for place in ("distil.harvest", "distil.curate", "stages.trained"):
        ended = fork_server("command", words=["distil", toml], env={"HARVESTER_FAILPOINT": place})
        assert ended["signal"] == signal.SIGKILL, ended["err"]
        assert not (out / "distil.html").exists()
    steps = [path.read_text() for path in out.glob("trainings/*/train.jsonl")]
    ended = fork_server("command", words=["distil", toml, "--json"], env={"HARVESTER_FAILPOINT": ""})
    assert ended["code"] == 0, ended["err"]
    assert mock.totals()["requests"] == ROWS + HELD_OUT
    assert [
        path.read_text() for path in out.glob("trainings/*/train.jsonl")
    ] == steps  # nothing was learned twice
    first = json.loads((out / "distil.json").read_text())
    assert [stage["stage"] for stage in first["stages"]] == list(STAGES)
    made = {stage["stage"]: stage["result"] for stage in first["stages"]}
    assert made["curate"]["kept"] == made["harvest"]["rows_total"] == ROWS + HELD_OUT
    assert made["evaluate"]["macro"]["teacher"]["accuracy"] == 1.0
    assert (out / "student" / "model.safetensors").is_file()
    page = (out / "distil.html").read_text()
    assert all(name in page for name in ("report.html", "disagreements.html", "<svg"))
    assert "<script" not in page
    [live] = out.glob("trainings/*/train.html")
    assert 'data-state="complete"' in live.read_text()

    code, printed, err = run_trainer("distil", toml, "--json")
    assert code == 0, err
    assert made_now(json.loads(printed)) == []
    assert mock.totals()["requests"] == ROWS + HELD_OUT

    replace(toml.parent / "train.toml", "epochs = 2", "epochs = 1")
    replace(toml.parent / "curate.toml", '"not_blank"]', '"not_blank", {longest = 2000}]')
    code, printed, err = run_trainer("distil", toml, "--until", "train", "--json")
    assert code == 0, err
    assert made_now(json.loads(printed)) == ["curate", "plan", "train"]
    assert len(list(out.glob("trainings/*/adapter"))) == 2  # the earlier student stays
    replace(toml.parent / "curate.toml", ", {longest = 2000}]", "]")
    replace(toml.parent / "train.toml", "epochs = 1", "epochs = 2")
    code, printed, err = run_trainer("distil", toml, "--from", "train", "--json")
    assert code == 0, err
    # --from takes what was curated last: other shards with the same rows, which are not learned again
    assert "done before" in err
    assert "train" not in made_now(json.loads(printed))
    assert len(list(out.glob("trainings/*/adapter"))) == 2
    assert mock.totals()["requests"] == ROWS + HELD_OUT


@pytest.mark.slow
def test_a_large_corpus_is_known_and_learned_as_a_small_one(
    run_trainer,  # noqa: F811
    mock_teacher,
    tmp_path: Path,
    monkeypatch,
) -> None:
    toml = write_run(tmp_path / "run", mock_teacher(accuracy=1.0))
    replace(toml.parent / "train.toml", "every = 0", "every = 2")  # held-out prompts are part of the key
    out = toml.parent / "distil"

    def train() -> tuple[str, dict[str, bytes]]:
        code, _, err = run_trainer("distil", toml, "--until", "train", "--json")
        assert code == 0, err
        [adapter] = out.glob("trainings/*/adapter")
        names = ("adapter_model.safetensors", "hash_tree.rows.jsonl")
        return err, {"folder": str(adapter).encode(), **{n: (adapter / n).read_bytes() for n in names}}

    _, small = train()
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    monkeypatch.setattr(dataset, "read", never_read)
    for path in out.glob("stages/train-*.json"):
        path.unlink()
    err, found = train()
    assert "done before" in err, "the training has the same key"
    assert found == small
    shutil.rmtree(out / "trainings")
    err, large = train()
    assert "done before" not in err.rpartition("train:")[2]
    assert large == small
    code, _, err = run_trainer("distil", toml, "--until", "evaluate", "--json")
    assert (code, "tokenising" in err) == (0, False), err


@pytest.mark.slow
def test_what_another_setting_overwrote_or_a_fault_damaged_is_made_again(
    run_trainer,  # noqa: F811
    mock_teacher,
    tmp_path: Path,
) -> None:
    mock = mock_teacher(accuracy=1.0)
    toml = write_run(tmp_path / "run", mock)
    out = toml.parent / "distil"

    def distil(folder: Path = toml.parent) -> dict[str, Any]:
        code, printed, err = run_trainer("distil", folder / "distil.toml", "--json")
        assert code == 0, err
        result: dict[str, Any] = json.loads(printed)
        return result

    results = {stage["stage"]: stage["result"] for stage in distil()["stages"]}
    student, merged = (out / "student").resolve(), Path(results["export"]["merged"])
    assert student == merged
    weights, page = (merged / "model.safetensors").read_bytes(), (out / "report.html").read_bytes()
    replace(toml.parent / "train.toml", "epochs = 2", "epochs = 1")
    distil()
    assert (out / "student").resolve() != student
    assert (out / "report.html").read_bytes() != page
    replace(toml.parent / "train.toml", "epochs = 1", "epochs = 2")
    assert made_now(distil()) == ["report"]  # the only file that both settings write
    assert (out / "student").resolve() == student
    assert (merged / "model.safetensors").read_bytes() == weights

    (merged / "model.safetensors").write_bytes(b"")
    code, _, err = run_trainer("distil", toml, "--from", "report")
    assert (code, "start with --from export" in err) == (2, True)
    assert "export" in made_now(distil())
    assert (merged / "model.safetensors").read_bytes() == weights
    (merged.parent / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert "train" in made_now(distil())
    assert (merged / "model.safetensors").read_bytes() == weights
    assert made_now(distil()) == []

    shutil.copytree(toml.parent, tmp_path / "copy", symlinks=True)
    shutil.rmtree(toml.parent)
    again = distil(tmp_path / "copy")
    assert made_now(again) == ["export", "report"]  # its commands name folders
    results = {stage["stage"]: stage["result"] for stage in again["stages"]}
    assert str(toml.parent) not in json.dumps(results)
    assert (tmp_path / "copy" / "distil" / "student" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_harvest_that_its_budget_ends_goes_on_with_a_higher_one(
    run_trainer,  # noqa: F811
    mock_teacher,
    tmp_path: Path,
) -> None:
    mock = mock_teacher()
    toml = write_run(tmp_path / "run", mock)
    replace(toml.parent / "harvest.toml", "tokens = 1_000_000", "tokens = 600")
    code, _, err = run_trainer("distil", toml, "--until", "harvest")
    assert (code, "--from curate" in err) == (10, True)
    assert "exit code 10 (budget: " in err
    stored = Corpus.open(toml.parent / "store").count()
    assert 0 < stored < ROWS + HELD_OUT
    replace(toml.parent / "harvest.toml", "tokens = 600", "tokens = 1_000_000")
    code, _, err = run_trainer("distil", toml, "--until", "harvest")
    assert code == 0, err
    assert mock.totals()["requests"] == ROWS + HELD_OUT


@pytest.mark.slow
def test_a_training_that_patience_ended_is_told_by_the_steps_it_made(
    run_trainer,  # noqa: F811
    mock_teacher,
    tmp_path: Path,
    monkeypatch,
) -> None:
    toml = write_run(tmp_path / "run", mock_teacher())
    replace(toml.parent / "train.toml", "every = 0", "every = 1")
    replace(toml.parent / "train.toml", "patience = 0", "patience = 1")
    replace(toml.parent / "train.toml", "epochs = 2", "epochs = 4")
    losses = iter((1.0, 2.0))
    monkeypatch.setattr(Validation, "_loss", lambda _self: next(losses))
    code, printed, err = run_trainer("distil", toml, "--until", "train")
    assert code == 0, err
    made = json.loads((toml.parent / "distil" / "stages" / "train.json").read_text())["result"]
    assert (made["steps_done"], made["best_step"]) == (2, 1)
    assert made["steps"] > 2
    told = f"2 of {made['steps']} steps in "
    assert told in printed + err
    assert told in (toml.parent / "distil" / "distil.html").read_text()


@pytest.mark.slow
def test_filters_that_keep_nothing_are_named(run_trainer, mock_teacher, tmp_path: Path) -> None:  # noqa: F811
    toml = write_run(tmp_path / "run", mock_teacher())
    replace(toml.parent / "curate.toml", '"not_blank"]', '"not_blank", {longest = 1}]')
    code, _, err = run_trainer("distil", toml)
    assert (code, f"kept no row; dropped {ROWS + HELD_OUT}: too_long" in err) == (2, True)
    assert not list((toml.parent / "distil" / "stages").glob("curate*"))


@pytest.mark.slow
def test_a_judge_that_is_down_is_asked_again(run_trainer, mock_teacher, tmp_path: Path) -> None:  # noqa: F811
    toml = write_run(tmp_path / "run", mock_teacher(accuracy=1.0), is_tiny=False)  # it has answers to judge
    judge = mock_teacher()
    judge.stop()
    (toml.parent / "judge.toml").write_text(
        f'[teacher]\nbase_url = "{judge.base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        '[store]\npath = "judged"\n[run]\npatience_s = 1\n'
    )
    replace(toml.parent / "train.toml", "speed_prompts = 0", 'speed_prompts = 0\njudge = "judge.toml"')
    code, _, err = run_trainer("distil", toml)
    assert (code, "(parked: " in err, "asks the judge again" in err) == (10, True, True)
    answers = next(toml.parent.glob("distil/trainings/*/answers.jsonl"))
    answered = answers.stat().st_mtime_ns
    code, _, err = run_trainer("distil", toml)
    assert code == 10
    assert "the judge compares answers" in err
    assert answers.stat().st_mtime_ns == answered  # the models did not answer again
    code, printed, err = run_trainer("distil", toml, "--from", "export", "--json")
    assert code == 0, err
    assert json.loads(printed)["stages"][-1]["stage"] == "report"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is one of Linux")
def test_a_killed_command_leaves_no_harvest_running(mock_teacher, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=1.0)
    toml = write_run(tmp_path / "run", mock)
    with (toml.parent / "harvest.toml").open("a") as file:
        file.write("\n[teacher.limits]\nmax_concurrency = 2\n")
    command = subprocess.Popen([sys.executable, "-m", "trainer", "distil", toml], stderr=subprocess.DEVNULL)
    try:
        until(lambda: mock.state()["received"] > 0)
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    finally:
        command.kill()
        command.wait()
    assert children
    until(lambda: not any(alive(int(child)) for child in children))
    assert mock.state()["received"] < ROWS + HELD_OUT  # it drained, and asked for nothing more
