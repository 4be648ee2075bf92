"""Commands that describe train.toml: `config schema`."""

from __future__ import annotations

import json

from harvester.system.command_line.verb_command import VerbApp
from trainer.cli.options import AS_JSON, REFERENCE, TrainerCommand
from trainer.console import print_result


def register(app: VerbApp) -> None:
    """Add the commands of this module to `app`."""
    config = VerbApp(TrainerCommand, help="Describe train.toml.")
    config.command()(schema)
    app.add_typer(config, name="config", rich_help_panel=REFERENCE)


def schema(as_json: bool = AS_JSON) -> None:
    """Print the JSON Schema of train.toml.

    An editor uses it if the first line of train.toml is `#:schema FILE`.

    Example: trainer config schema > train.schema.json
    """
    from trainer import reference

    data = reference.schema()
    print_result(data, json.dumps(data, indent=2, ensure_ascii=False).splitlines(), as_json=as_json)
