"""explain, config, schedule: what a code means, which keys there are, how a scheduler starts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")
keys = typer.Typer(no_args_is_help=True, help="What harvest.toml may say.")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog="Example: harvester explain rate_limited")(explain)
    app.command(epilog="Example: harvester schedule --systemd my-run/harvest.toml")(schedule)
    keys.command(epilog="Example: harvester config schema > harvest.schema.json")(schema)
    app.add_typer(keys, name="config")


def explain(
    code: str = typer.Argument(..., help="As in error[CODE], dead_letters.jsonl, or an exit code."),
    as_json: bool = JSON,
) -> None:
    """Say what an error means, what was done about it, and what you can do."""
    from harvester.cli import explain as room
    from harvester.cli.console import emit

    for one in room.explain(code):
        emit(one.as_dict(), one.lines(), as_json=as_json)


def schema(as_json: bool = JSON) -> None:
    """Print the JSON Schema of harvest.toml. Editors read `#:schema FILE` on its first line."""
    from harvester.cli.console import emit
    from harvester.config.config import HarvestConfig

    data: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **HarvestConfig.model_json_schema(),
    }
    emit(data, json.dumps(data, indent=2).splitlines(), as_json=as_json)


def schedule(
    config: Path = typer.Argument(..., help="Path of a harvest.toml.", show_default=False),
    systemd: bool = typer.Option(False, "--systemd", help="A service and its timer."),
    cron: bool = typer.Option(False, "--cron", help="Lines for a crontab."),
    k8s: bool = typer.Option(False, "--k8s", help="A Kubernetes CronJob, or a Job where no hours are set."),
    name: str | None = typer.Option(None, help="Of the units; default: by the folder."),
    image: str = typer.Option("harvester", help="Container image; see the Containerfile."),
    as_json: bool = JSON,
) -> None:
    """Print what a scheduler needs to start this harvest in its hours; write nothing."""
    import re
    import shutil
    import sys

    from harvester.cli import service_units
    from harvester.cli.console import emit
    from harvester.config import config as settings
    from harvester.config import schedule as hours
    from harvester.errors import UsageError

    if systemd + cron + k8s != 1:
        raise UsageError("for which scheduler?", remedy="one of --systemd, --cron, --k8s")
    if name is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", name):
        raise UsageError(f"{name!r} is no name for a unit", remedy="lower case letters, digits and dashes")
    chosen = settings.load(config)
    found = shutil.which("harvester", path=str(Path(sys.executable).parent))
    harvest = service_units.Harvest(
        name=name or service_units.name_of(config),
        command=[found] if found else [sys.executable, "-m", "harvester"],
        config=config.resolve(),
        store=chosen.store.path,
        grace_s=chosen.run.grace_s,
        openings=[hours.parse(text) for text in chosen.schedule.hours],
        key_env=chosen.teacher.api_key_env,
        image=image,
    )
    make = service_units.systemd if systemd else service_units.cron if cron else service_units.kubernetes
    files = make(harvest)
    lines: list[str] = []
    for path, text in files.items():
        lines += ["---" if k8s else f"# ---- {path}", *text.rstrip().splitlines()]
    emit({"files": files}, lines, as_json=as_json)
