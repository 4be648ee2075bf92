"""Test what a command that makes several trainings shows of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import hostile
from tests.trainer.live.test_figures import line
from tests.trainer.live.test_page import config_of, state_of
from tests.trainer.live.test_terminal import answer
from trainer.errors import TrainingDiverged
from trainer.live import page
from trainer.live.figures import UNKNOWN_MFU
from trainer.live.stage_view import StageView
from trainer.training.logbook import Evaluation, Sampled, TrainingStarted


def test_notes_are_said_once_and_each_training_has_its_figures_and_its_page(tmp_path: Path) -> None:
    notes: list[str] = []
    updates: list[tuple[int, int, str]] = []
    view = StageView(notes.append, lambda *update: updates.append(update))
    for number in (1, 2):
        config = config_of(tmp_path / str(number))
        config.out_path.mkdir()
        with view(config, f"training {number} of 2") as show:
            show(TrainingStarted(0, 100, ("cpu, base float32", f"resumed {number}")))
            assert state_of((config.out_path / page.PAGE).read_text()) == "running"
            for step in (1, 50, 100):
                show(line(step))
            show(Evaluation(100, 100, 1.25, 100, 1.25, (answer("x"),), 1.0))
            show(Sampled(100, 100, (answer("why"),), 1.0))
        text = (config.out_path / page.PAGE).read_text()
        assert state_of(text) == "complete"
        assert f"training {number} of 2" in text
    assert notes.count("cpu, base float32") == notes.count(f"MFU {UNKNOWN_MFU}") == 1
    assert [note for note in notes if note.startswith("resumed")] == ["resumed 1", "resumed 2"]
    assert notes.count("step 100: held-out loss 1.2500, the lowest so far") == 2
    assert notes.count("step 100: why: student 'why', teacher 'why'") == 2
    assert [update[:2] for update in updates] == [(0, 100), (1, 100), (50, 100), (100, 100)] * 2
    assert updates[4][2] == "training 2 of 2, first step"
    assert "training 2 of 2, epoch 1, loss " in updates[-1][2]


def test_a_training_that_fails_ends_its_own_page_as_failed(tmp_path: Path) -> None:
    view = StageView(lambda _: None, lambda *_: None)
    config = config_of(tmp_path)
    config.out_path.mkdir()

    def fail() -> None:
        with view(config, hostile.TEXTS[0]) as show:
            show(TrainingStarted(0, 100, ()))
            raise TrainingDiverged("the loss is not finite", remedy="lower lr")

    with pytest.raises(TrainingDiverged):
        fail()
    text = (config.out_path / page.PAGE).read_text()
    assert state_of(text) == "failed"
    assert "the loss is not finite" in text
    assert hostile.TEXTS[0] not in text
