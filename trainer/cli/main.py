"""Build the command line, and turn every error into a message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import typer

from harvester.system import disk_refusal
from harvester.system.command_line.extras import PACKAGES, missing_package
from harvester.system.command_line.remedies import error_lines
from harvester.system.command_line.unused_imports import skip_unused_imports
from harvester.system.command_line.verb_command import VerbApp
from harvester.system.command_line.version import version_option
from trainer.cli import evaluation, experiments, publishing, reference, trace, training
from trainer.cli.options import TrainerCommand
from trainer.console import print_message
from trainer.errors import HarvesterError
from trainer.process import end_on_sigterm, ignore_sigterm

EXIT_CODES = """Exit codes: 0 complete, 1 the data has a fatal fault, or the training diverged or does not fit
the memory, 2 usage, configuration, corpus, student or a missing package, 5 storage error, 75 another training
holds the output folder, or a process or machine of this one was lost, 77 the terms do not permit it, 130/143
interrupted and checkpointed (the same command resumes). `distil`, `loop`, `onpolicy` and `evaluate` end
with the exit code of a harvest or judge that fails."""


app = VerbApp(
    TrainerCommand,
    name="trainer",
    help="Fine-tune a local student on a corpus of teacher answers, and evaluate it.",
    epilog=EXIT_CODES,
)


@app.callback()
def _root(version: bool = version_option("trainer", typer.echo)) -> None:
    """Fine-tune a local student on a corpus of teacher answers, and evaluate it."""


for commands in (reference, training, evaluation, publishing, experiments, trace):
    commands.register(app)


def main() -> None:
    """Run the app. Every HarvesterError ends as one message on stderr and its documented exit code."""
    # OpenMP reads this when torch loads. Threads that spin while they wait compete with other processes for
    # the cores: 500 tokens/s beside a second two-thread process, against 9,000 with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # CUDA's allocator can then grow a block: packs differ in size, and fixed blocks fragment.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if sys.argv[1:2] in (["train"], ["plan"], ["doctor"]):  # lm-evaluation-harness needs pandas
        skip_unused_imports()
    # PEFT imports bitsandbytes where it is installed, which on a CPU with bf16 arithmetic fetches a kernel
    # from a hub by this package, or warns that it can't. Nothing is downloaded here.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    end_on_sigterm()
    try:
        app(prog_name="trainer")
    except HarvesterError as error:
        _end_with(error)
    except OSError as error:
        if error.filename is None or isinstance(error.filename, int):
            raise
        _end_with(disk_refusal.refused(error, "can't be read or written", Path(str(error.filename)), ""))
    except ModuleNotFoundError as error:  # in a command that looks for none of them first
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES["train"]:
            raise
        _end_with(missing_package("train", "this command", package))
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with(error: HarvesterError) -> NoReturn:
    """Print an error and end with its exit code."""
    ignore_sigterm()
    for line in error_lines(error):
        print_message(line)
    sys.exit(error.exit_code)
