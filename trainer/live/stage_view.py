"""Show each training of a command that makes several: a line of progress, and its train.html."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.config import TrainConfig
from trainer.live.figures import UNKNOWN_MFU, Figures, TrainingEvent
from trainer.live.page import live_page
from trainer.live.terminal import Show, event_lines, sample_lines
from trainer.training.logbook import StepLog, TrainingStarted


class StageView:
    """Shows the training that runs: figures of its steps as progress, the rest as lines, all on its page.

    A note that several trainings have is printed once.

    Args:
        note: called with lines for the operator.
        update: called with steps made, steps in all, and the figures of the newest step.
    """

    def __init__(self, note: Callable[[str], None], update: Callable[[int, int, str], None]) -> None:
        self._note = note
        self._update = update
        self._said: set[str] = set()

    @contextmanager
    def __call__(self, config: TrainConfig, title: str) -> Iterator[Show]:
        """Show the events that the yielded function gets during the block.

        Args:
            config: of the training, with its own folder.
            title: what this training is, among those of the command.
        """
        figures = Figures()
        with live_page(config, title) as show_page:

            def show(event: TrainingEvent) -> None:
                figures.add(event)
                show_page(event)
                self._say(event)
                if isinstance(event, TrainingStarted | StepLog):
                    self._update(figures.steps_done, figures.steps, f"{title}, {figures.detail}")

            yield show

    def _say(self, event: TrainingEvent) -> None:
        lines = event_lines(event)
        if isinstance(event, StepLog) and event.mfu is None:
            lines.append(f"MFU {UNKNOWN_MFU}")
        if isinstance(event, TrainingStarted | StepLog):
            lines = [line for line in dict.fromkeys(lines) if line not in self._said]
            self._said.update(lines)
        for line in [*lines, *sample_lines(event)]:
            self._note(line)
