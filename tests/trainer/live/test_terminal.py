"""Test what a training shows on the terminal, as lines and as a drawing; foreign text is harmless."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.pages import hostile
from tests.trainer.live.test_figures import line
from trainer.live import terminal
from trainer.live.figures import UNKNOWN_MFU, Figures
from trainer.training.logbook import Evaluation, Sampled, TrainingStarted


def answer(text: str) -> dict[str, str | None]:
    return dict.fromkeys(("prompt_id", "prompt", "answer", "reference", "teacher"), text)


def test_lines_say_everything_once(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.training_display() as show:  # stderr is captured: no terminal
        show(TrainingStarted(0, 100, ("cpu, base float32", "resumed at step 0")))
        for step in range(1, 101):
            show(line(step))
            if step == 50:
                show(Evaluation(50, 100, 1.25, 50, 1.25, (answer("x"),), 1.0))
                show(Sampled(50, 100, (answer("why"),), 1.0))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:2] == ["cpu, base float32", "resumed at step 0"]
    assert err.count(UNKNOWN_MFU) == 1
    assert "step 50: held-out loss 1.2500, the lowest so far" in lines
    assert "step 50: why: student 'why', teacher 'why'" in lines
    progress = [text for text in lines if text.startswith("train: ")]
    assert len(progress) == 6  # the beginning and each fifth
    assert all("812 MiB" in text for text in progress[1:])
    assert " left" in progress[1]
    assert " left" not in progress[-1]


@pytest.mark.parametrize("text", hostile.TEXTS)
def test_foreign_text_can_neither_move_the_cursor_nor_forge_a_line(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with terminal.training_display() as show:
        show(Sampled(1, 2, (answer(text),), 0.0))
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "\x1b" not in err
    seen = Figures()
    seen.add(TrainingStarted(0, 2, ()))
    seen.add(line(1))
    seen.add(Sampled(1, 2, (answer(text),), 0.0))
    stream = io.StringIO()
    Console(file=stream, width=100, markup=False, highlight=False).print(terminal.render(seen))
    drawn = stream.getvalue()
    assert "\x1b" not in drawn
    assert "\u202e" not in drawn
    assert len(drawn.splitlines()) == 1 + 5 + 3


def test_the_drawing_fits_narrow_terminals_and_has_every_figure() -> None:
    seen = Figures()
    seen.add(TrainingStarted(0, 100, ()))
    for step in (1, 2):
        seen.add(line(step, mfu=0.4))
    seen.add(Evaluation(2, 100, 1.25, 1, 1.0, (answer("why " * 99),), 1.0))
    for width in (60, 120):
        stream = io.StringIO()
        Console(file=stream, width=width, markup=False, highlight=False).print(terminal.render(seen))
        drawn = stream.getvalue()
        assert all(len(row) <= width for row in drawn.splitlines())
        for word in ("2 of 100 steps", "1.0000", "1,002 tokens/s", "40.0%", "812 MiB", "left", "student why"):
            assert word in drawn
    assert terminal.rows(Figures()) == [("", "first step")]
