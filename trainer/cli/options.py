"""Define what the commands share: how they are built, CONFIG, and options that several have."""

from __future__ import annotations

import typer

from harvester.system.command_line.verb_command import VerbCommand

CONFIG = typer.Argument(
    ..., metavar="CONFIG", help="Path of a train.toml (`trainer init` writes one).", show_default=False
)
PROCESSES = typer.Option(1, min=1, help="Processes on this machine, one per device.")
AS_JSON = typer.Option(False, "--json", help="Print the result as one JSON line on stdout.")


# Titles of the sections of `trainer --help`.
TRAIN = "Train a student"
JUDGE = "Judge a student"
PUBLISH = "Publish a student"
MANY = "Train in several stages"
REFERENCE = "Look something up"


class TrainerCommand(VerbCommand):
    """A command of the trainer."""

    program = "TRAINER"
