"""Test the Python API of the trainer: from a thread, in a running event loop, with events, and its limits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

import harvester
import trainer
from harvester.errors import UsageError
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer, toml  # noqa: F401 - fixtures
from trainer.errors import ConfigError, Interrupted


def process_state() -> tuple[Any, ...]:
    """What a library must leave alone."""
    return (
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        dict(os.environ),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        (logging.get_verbosity(), logging.is_progress_bar_enabled()),
    )


def test_a_training_is_that_of_the_command_and_leaves_the_process_as_it_was(
    run_trainer,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = tiny.skill(40, held_out=4)
    settings = {"epochs": 1, "log_every": 1, "pack_tokens": 128}
    (tmp_path / "api").mkdir()
    (tmp_path / "command").mkdir()
    files = [tiny.train_toml(tmp_path / name, rows, train=settings) for name in ("api", "command")]
    logging.enable_progress_bar()
    logging.set_verbosity_warning()
    before, events, threads = process_state(), [], set()

    def note(event: object) -> None:
        events.append(event)
        threads.add(threading.current_thread())

    trained = trainer.train(files[0], on_event=note)
    assert process_state() == before
    logging.disable_progress_bar()
    assert isinstance(events[0], trainer.TrainingStarted)
    steps = [event.step for event in events if isinstance(event, trainer.StepLog)]
    assert steps == list(range(1, trained.steps + 1))
    assert threading.main_thread() not in threads
    code, _, err = run_trainer("train", files[1])
    assert code == 0, err
    weights = [path.parent / "out" / "adapter" / "adapter_model.safetensors" for path in files]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert trainer.train(files[0]).steps_now == 0

    card = trainer.evaluate(files[0])
    exported = trainer.export(files[0], tmp_path / "merged")
    assert card["macro"]["teacher"]["accuracy"] == 1.0
    assert (exported.merged / "model.safetensors").is_file()
    assert exported.parity["greedy_agreement"] == 1.0
    assert exported.serving.stops == ("<|im_end|>",)


def test_a_stopped_training_is_checkpointed_and_goes_on(toml: Path) -> None:  # noqa: F811
    async def stop_early() -> list[int]:
        running = trainer.start(toml)
        steps = []
        try:
            async for event in running:
                if isinstance(event, trainer.StepLog):
                    steps.append(event.step)
                    running.stop()
        except Interrupted as stopped:
            assert "checkpointed" in stopped.message  # noqa: PT017 - an iteration is more than one statement
            return steps
        raise AssertionError("the training was not stopped")

    steps = asyncio.run(stop_early())
    rest = trainer.train(toml)
    assert 0 < steps[-1] < rest.steps
    assert 0 < rest.steps_now < rest.steps


def test_errors_have_a_place_and_a_remedy(tmp_path: Path) -> None:
    for call in (trainer.train, trainer.evaluate, lambda path: trainer.export(path, tmp_path / "out")):
        with pytest.raises(ConfigError) as caught:
            call(tmp_path / "none.toml")
        assert caught.value.place
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("call", "option", "nearest"),
    [
        (trainer.train, "progres", "progress"),
        (trainer.train, "epochs", "known: "),
        (trainer.start, "force_fault", "force_faults"),
        (trainer.evaluate, "ggufs", "gguf"),
        (trainer.export, "dtypes", "dtype"),
        (harvester.plan, "shards", "shard"),
        (harvester.open, "column", "columns"),
        (harvester.curate, "pages", "page"),
    ],
)
def test_an_option_that_a_function_lacks_is_named_with_the_nearest(call, option: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no option '{option}'") as caught:
        call("none.toml", **{option: 1})
    assert caught.value.place == option
    assert nearest in caught.value.remedy


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; import trainer; trainer.__all__; dir(trainer)\n"
        "print([m for m in sys.modules if m.startswith(('trainer.', 'harvester.'))])\n"
        "trainer.train; trainer.export; trainer.StepLog\n"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
    assert {name: getattr(trainer, name) for name in trainer.__all__}.keys() == set(trainer.__all__)
