"""Test train.html: what it holds while a training runs, what it says at the end, and that text is escaped."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.pages import hostile
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.live.test_figures import line
from tests.trainer.live.test_terminal import answer
from trainer import actions
from trainer import config as settings
from trainer.errors import HarvesterError, Interrupted, TrainingDiverged
from trainer.live import page
from trainer.live.figures import Figures, TrainingEvent
from trainer.training.logbook import Sampled, StepLog, TrainingStarted

SHAPE = {"epochs": 1, "log_every": 1, "pack_tokens": 128, "save_every": 0}


def config_of(folder: Path) -> settings.TrainConfig:
    return settings.load(tiny.train_toml(folder, tiny.skill(24, held_out=4), train=SHAPE))


def state_of(text: str) -> str:
    [state] = re.findall(r'<body data-state="(\w+)"', text)
    return state


def test_a_training_writes_its_page_while_it_runs_and_says_how_it_ended(tmp_path: Path) -> None:
    toml = tiny.train_toml(
        tmp_path,
        tiny.skill(40, held_out=4),
        train={**SHAPE, "epochs": 2},
        evaluate={"sample_every": 2, "sample_answers": 2, "max_new_tokens": 8},
    )
    config = settings.load(toml)
    path = config.out_path / page.PAGE
    during: list[str] = []

    def stop(event: TrainingEvent) -> None:
        if isinstance(event, StepLog) and event.step == 4:
            during.append(path.read_text(encoding="utf-8"))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        actions.train(config, stop)
    assert state_of(during[0]) == "running"
    stopped = path.read_text(encoding="utf-8")
    assert state_of(stopped) == "stopped"
    assert "stopped after step 4 of" in stopped
    assert "the same command resumes" in stopped
    assert "Answers to held-out prompts, after step 2" in stopped
    done = actions.train(config, lambda _event: None)
    complete = path.read_text(encoding="utf-8")
    assert state_of(complete) == "complete"
    assert f"<b>{done.steps}</b><span>of {done.steps} steps" in complete
    assert f"after step {done.steps}</h2>" in complete
    assert complete.count("<article>") == 2
    assert "MFU unknown" in complete
    assert complete.count("<polyline") == 2  # the curve of the first start is there, too
    again = actions.train(config, lambda _event: None)
    assert again.steps_now == 0
    assert state_of(path.read_text(encoding="utf-8")) == "complete"


def test_a_page_of_another_training_is_left_alone_when_the_folder_is_held(tmp_path: Path) -> None:
    from trainer.process import lock_output_folder

    config = config_of(tmp_path)
    config.out_path.mkdir()
    (config.out_path / page.PAGE).write_text("of the other")
    with lock_output_folder(config.out_path), pytest.raises(HarvesterError, match="another training"):
        actions.train(config, lambda _event: None)
    assert (config.out_path / page.PAGE).read_text() == "of the other"


def test_a_failure_is_named_and_a_page_that_cant_be_written_ends_no_training(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.out_path.mkdir()
    started = TrainingStarted(0, 2, ("cpu",))

    def diverge() -> None:
        with page.live_page(config) as show:
            show(started)
            raise TrainingDiverged("not finite", remedy="lower <lr>")

    with pytest.raises(TrainingDiverged):
        diverge()
    failed = (config.out_path / page.PAGE).read_text(encoding="utf-8")
    assert state_of(failed) == "failed"
    assert "not finite: lower &lt;lr&gt;" in failed
    (config.out_path / page.PAGE).unlink()
    (config.out_path / page.PAGE).mkdir()
    (config.out_path / page.PAGE / "in the way").touch()
    done = actions.train(config, lambda _event: None)
    assert done.steps_now == done.steps


def test_the_page_is_written_again_without_any_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(page, "WRITE_S", 0.01)
    config = config_of(tmp_path)
    config.out_path.mkdir()
    rewritten = threading.Event()
    with page.live_page(config) as show:
        show(TrainingStarted(0, 2, ()))
        original = page.document
        monkeypatch.setattr(page, "document", lambda *told: rewritten.set() or original(*told))
        assert rewritten.wait(30)
    assert state_of((config.out_path / page.PAGE).read_text(encoding="utf-8")) == "complete"
    assert not any(thread.name == "train.html" for thread in threading.enumerate())


@pytest.mark.parametrize("text", hostile.TEXTS)
def test_every_text_is_escaped(tmp_path: Path, text: str) -> None:
    config = settings.parse(
        {"student": {"base": "base"}, "data": {"corpus": "store"}, "out": {"name": text.replace("\0", "")}},
        root=tmp_path,
        place="x",
    )
    seen = Figures()
    seen.add(TrainingStarted(0, 2, (text,)))
    seen.add(line(1))
    seen.add(Sampled(1, 2, (answer(text),), 0.0))
    html = page.document(config, seen, "failed", text)
    assert html.count("<script>") == 1
    assert "\x1b" not in html
    assert "\u202e" not in html
    for tag in ("<img", "<iframe", "<svg on", "<form", "<link", "<base", "<a ", "<math"):
        assert tag not in html
