"""Define the class of the harvester's commands: variables, as HARVESTER_RUN_LIMIT, can set their options."""

from __future__ import annotations

from typing import Any

from harvester.cli.console import log_as_json, message
from harvester.system.command_line.verb_command import VerbApp, VerbCommand

# Titles of the sections of `harvester --help`.
PREPARE = "Prepare a harvest"
HARVEST = "Harvest"
CONTROL = "Control a run"
LOOK = "Look at a store"
KEEP = "Keep a store"
CORPUS = "Make and share a corpus"
REFERENCE = "Try it, or look something up"


class HarvesterCommand(VerbCommand):
    """A command of the harvester."""

    program = "HARVESTER"

    def warn(self, ctx: Any, line: str) -> None:
        """Print a message, as all others of the command."""
        if ctx.params.get("log_json"):
            log_as_json()
        message(line)


class HarvesterApp(VerbApp):
    """The harvester's commands, or a group of them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(HarvesterCommand, **settings)
