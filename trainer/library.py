"""Offer the trainer to Python programs: `import trainer`, then `trainer.train("train.toml")`.

The commands call the same functions. None of them needs the main thread or a free event loop; they install no
signal handlers and leave torch's random numbers and threads, and the messages of transformers, as they were.
Errors are those of `trainer.errors`, with place and remedy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harvester.system.background import Running, StopRequests
from harvester.system.command_line.displays import can_draw
from harvester.system.command_line.extras import require
from harvester.system.command_line.known_options import with_known_options
from trainer import actions
from trainer.actions import Exported, HarnessTasks
from trainer.live.figures import TrainingEvent

if TYPE_CHECKING:
    from trainer.training.train import Trained

FilePath = str | os.PathLike[str]
Result = TypeVar("Result")


@with_known_options
def train(
    config: FilePath,
    *,
    on_event: Callable[[TrainingEvent], object] | None = None,
    progress: bool | None = None,
    allow_change: bool = False,
    force_faults: bool = False,
) -> Trained:
    """Train the adapter, as `trainer train` in one process; the same call resumes.

    Ctrl-C lets the step end, writes a checkpoint, and is raised then.

    Args:
        config: path of a train.toml.
        on_event: is called with each event, in the thread of the training. What it raises ends the training
            as Ctrl-C does.
        progress: show a bar in the notebook (with ipywidgets) or on a terminal. None: where that can be.
        allow_change: resume although settings or corpus changed.
        force_faults: train although the data has fatal faults.

    Returns:
        Steps, loss, and the folder of the adapter.

    Raises:
        MissingPackage, ConfigError, DataError, StudentError, TermsRefused, FindingsError: nothing was
            started.
        TrainingDiverged, OutOfMemory: the last checkpoint is good.
    """
    running = start(
        config,
        on_event=on_event,
        progress=progress,
        allow_change=allow_change,
        force_faults=force_faults,
    )
    return running.result()


@with_known_options
def start(
    config: FilePath,
    *,
    on_event: Callable[[TrainingEvent], object] | None = None,
    progress: bool | None = False,
    allow_change: bool = False,
    force_faults: bool = False,
) -> Running[TrainingEvent, Trained]:
    """Start a training in a thread of its own; see `train`.

    Returns:
        The training that runs: `async for event in running`, `await running`, `running.result()`,
        `running.stop()`, after which it raises Interrupted.
    """

    require("train", "trainer.train")

    def work(emit: Callable[[TrainingEvent], None], requests: StopRequests) -> Trained:
        from trainer.config import load

        loaded = load(Path(config))
        with _display(progress) as display, _libraries_kept():

            def show(event: TrainingEvent) -> None:
                display(event)
                emit(event)

            return actions.train(
                loaded, show, allow_change=allow_change, force_faults=force_faults, requests=requests
            )

    return Running("train", work, on_event)


@with_known_options
def evaluate(
    config: FilePath,
    *,
    harness: Sequence[str] = (),
    harness_tasks: FilePath | None = None,
    harness_limit: int | None = None,
    merged: FilePath | None = None,
    gguf: FilePath | None = None,
    gguf_limit: int | None = None,
    on_note: Callable[[str], None] = lambda _: None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Let base and student answer the held-out prompts, as `trainer evaluate`.

    Args:
        config: path of a train.toml.
        harness: tasks of lm-evaluation-harness to score, too; harness_tasks: folder of tasks of your own;
            harness_limit: examples of each.
        merged: exported student to score on these tasks, too.
        gguf: folder of an export whose GGUF files llama.cpp's server answers from, too; gguf_limit: held-out
            prompts for each of these files.
        on_note: is called with lines for people.
        progress: as of `train`.

    Returns:
        The content of scorecard.json.

    Raises:
        DataError, StudentError, FindingsError: there is nothing to evaluate, or it was changed.
    """
    require("train", "trainer.evaluate")
    tasks = HarnessTasks(
        tuple(harness),
        None if harness_tasks is None else Path(harness_tasks),
        harness_limit,
        None if merged is None else Path(merged),
    )

    def work() -> dict[str, Any]:
        from trainer.config import load

        loaded = load(Path(config))
        with _bar(progress, "score", "prompts") as update:
            folder = None if gguf is None else Path(gguf)
            return actions.evaluate(loaded, tasks, update, on_note, gguf=folder, gguf_limit=gguf_limit)

    return _in_thread("evaluate", work)


@with_known_options
def export(config: FilePath, out: FilePath, *, dtype: str = "", gguf: Sequence[str] = ()) -> Exported:
    """Merge the adapter into the base, as `trainer export`.

    Args:
        config: path of a train.toml.
        out: folder of the merged student.
        dtype: "float32", "bfloat16" or "float16"; empty: the base's own.
        gguf: "f16", "q8_0", "q4_k_m": GGUF files to write, too.

    Raises:
        TermsRefused, StudentError, FindingsError, ConfigError, StoreFull: nothing was written.
    """

    require("train", "trainer.export")

    def work() -> Exported:
        from trainer.config import load

        return actions.export(load(Path(config)), Path(out), dtype, gguf)

    return _in_thread("export", work)


def _in_thread(name: str, work: Callable[[], Result]) -> Result:
    """Do work in a thread of its own, which no signal handler of its libraries can reach."""

    def quiet_work(_emit: Callable[[None], None], _requests: StopRequests) -> Result:
        with _libraries_kept():
            return work()

    running: Running[None, Result] = Running(name, quiet_work, ends_when_asked=False)
    return running.result()


@contextlib.contextmanager
def _display(wanted: bool | None) -> Iterator[Callable[[TrainingEvent], None]]:
    from trainer.live.terminal import training_display

    if wanted is False or not can_draw():
        yield lambda _event: None
        return
    with training_display() as show:
        yield show


@contextlib.contextmanager
def _bar(wanted: bool | None, title: str, unit: str) -> Iterator[actions.Update]:
    from trainer.console import progress_bar

    if wanted is False or not can_draw():
        yield lambda _done, _total, _what: None
        return
    with progress_bar(title, unit) as update:
        yield update


@contextlib.contextmanager
def _libraries_kept() -> Iterator[None]:
    """Set back what the block changes of torch and transformers: random numbers, threads, messages."""
    import torch
    from transformers.utils import logging

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    has_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
