"""Write train.html into the output folder while a training runs, and say on it how the training ended.

The file is replaced every few seconds by a thread, so it also shows a training whose steps take minutes. Its
script loads it again as long as the training lives. When the file is no longer replaced, as after a kill, the
script says so: it compares the time at which the file was written with the browser's clock.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

from markupsafe import Markup

from harvester.system import own_files
from trainer.config import TrainConfig
from trainer.errors import HarvesterError, Interrupted
from trainer.experiments.plot import Axis, Line, plot, ticks
from trainer.live.figures import Figures, TrainingEvent, span
from trainer.pages import render
from trainer.training.logbook import TrainingStarted

PAGE = "train.html"

# Seconds between two writings of the page; it counts as deserted after `DESERTED_AFTER` of them.
WRITE_S = 5.0
DESERTED_AFTER = 4

# Characters of a prompt or an answer that are shown.
MOST_TEXT = 1200


class LivePage:
    """The page of one training. It is first written when the steps begin: then the output folder is held.

    A page that can't be written ends no training.

    Args:
        title: what this training is, among several of one command; empty: there is only one.
    """

    def __init__(self, config: TrainConfig, title: str = "") -> None:
        self._config = config
        self._title = title
        self._path = config.out_path / PAGE
        self._figures = Figures()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._writer: threading.Thread | None = None

    def add(self, event: TrainingEvent) -> None:
        """Take in an event of the training."""
        with self._lock:
            if isinstance(event, TrainingStarted):
                self._figures.read_log(self._config.out_path / "train.jsonl")
            self._figures.add(event)
        if self._writer is None:
            self._write("running", "")
            self._writer = threading.Thread(target=self._keep_writing, name="train.html", daemon=True)
            self._writer.start()

    def close(self, state: str, message: str) -> None:
        """Write the page for the last time, if it was begun.

        Args:
            state: "complete", "stopped" or "failed".
            message: what there is to say about it.
        """
        if self._writer is None:
            return
        self._ending.set()
        self._writer.join()
        done, steps = self._figures.steps_done, self._figures.steps
        if state == "complete" and done < steps:
            message = (
                f"Ended after {done:,} of {steps:,} steps: as many evaluations as [evaluate] patience allows "
                "found no lower held-out loss."
            )
        self._write(state, message)

    def _keep_writing(self) -> None:
        while not self._ending.wait(WRITE_S):
            self._write("running", "")

    def _write(self, state: str, message: str) -> None:
        with self._lock:
            text = document(self._config, self._figures, state, message, self._title)
        with suppress(OSError), own_files.replacing(self._path, 0o644) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


@contextmanager
def live_page(config: TrainConfig, title: str = "") -> Iterator[Callable[[TrainingEvent], None]]:
    """Keep train.html up to date with the events that the yielded function gets during the block.

    Args:
        title: see `LivePage`.
    """
    page = LivePage(config, title)
    try:
        yield page.add
    except Interrupted as interrupted:
        page.close("stopped", f"{interrupted.message}; {interrupted.remedy}")
        raise
    except HarvesterError as error:
        page.close("failed", ": ".join(filter(None, (error.message, error.remedy))))
        raise
    except BaseException as error:
        page.close("failed", type(error).__name__)
        raise
    page.close("complete", "")


def document(config: TrainConfig, figures: Figures, state: str, message: str, title: str = "") -> str:
    """Return the page as HTML. Every text is escaped, and control characters are shown.

    Args:
        state: "running", "complete", "stopped" or "failed".
        message: what there is to say about how it ended.
        title: see `LivePage`.
    """
    script, digest = _script()
    now = time.time()
    return render(
        "trainer.live",
        "train.html.j2",
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        title=f"Training of {config.name}",
        subtitle=title,
        state=state,
        message=message,
        written_ms=int(now * 1000),
        written_at=f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC",
        write_s=WRITE_S,
        deserted_s=WRITE_S * DESERTED_AFTER,
        lead=f"corpus {config.data.corpus} · student {config.student.base} · seed {config.train.seed}",
        share=figures.steps_done / figures.steps if figures.steps else 0.0,
        figures=figures,
        tiles=_tiles(figures, state, now),
        loss_plot=_plot("nats per token", "{:.3g}".format, figures.loss.points, figures.held_out.points),
        speed_plot=_plot("tokens per second", "{:,.0f}".format, figures.speed.points),
        answers=[{name: _shortened(value) for name, value in answer.items()} for answer in figures.answers],
    )


@cache
def _script() -> tuple[Markup, str]:
    """Return the page's script, and its SHA-256 for the page's policy."""
    text = (resources.files("trainer.live") / "train.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), digest  # noqa: S704 - our own constant, pinned by its hash


def _tiles(figures: Figures, state: str, now: float) -> list[tuple[str, str]]:
    """Return figures and their meanings."""
    tiles = [(f"{figures.steps_done:,}", f"of {figures.steps:,} steps")]
    line, evaluation = figures.line, figures.evaluation
    if line is not None:
        tiles.append((f"{line.loss:.4f}", f"loss, nats per token, at step {line.step:,}"))
    if evaluation is not None:
        best = (
            "lowest so far"
            if evaluation.best_step == evaluation.step
            else f"lowest: {evaluation.best_loss:.4f}"
        )
        tiles.append(
            (f"{evaluation.held_out_loss:.4f}", f"held-out loss at step {evaluation.step:,}, {best}")
        )
    if line is not None:
        tiles += [
            (f"{line.tokens_per_s:,.0f}", "tokens per second"),
            ("–", f"MFU {figures.mfu}") if line.mfu is None else (figures.mfu, "MFU, of the peak arithmetic"),
            (figures.memory, "memory, the most so far"),
        ]
    if state == "running":
        left_s = figures.left_s
        until = (
            "" if left_s is None else f", until {datetime.fromtimestamp(now + left_s, UTC):%m-%d %H:%M} UTC"
        )
        tiles.append((figures.left, f"left at this pace{until}"))
    tiles.append((span(figures.elapsed_s), "since the first step of this start"))
    return tiles


def _plot(label: str, form: Callable[[float], str], *paths: Sequence[tuple[float, float]]) -> Markup | None:
    """Draw curves over the steps; None before the second point."""
    lines = [
        Line(name, kind, path=path)
        for name, kind, path in zip(("training", "held out"), ("one", "two"), paths, strict=False)
        if len(path) > 1
    ]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.path]
    first, last = min(steps), max(steps)
    numbers = [number for number in ticks(first, last) if first <= number <= last and number == int(number)]
    return plot(lines, Axis("optimiser steps", "{:,.0f}".format, numbers), Axis(label, form), {})


def _shortened(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} … ({len(text):,} characters)"
