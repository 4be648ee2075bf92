"""Commands that answer questions: `explain`, `config schema`, `schedule`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from harvester.cli.commands import PREPARE, REFERENCE, HarvesterApp
from harvester.cli.console import JSON, emit
from harvester.cli.run_options import CONFIG
from harvester.config.shard import MOST_SHARDS
from harvester.errors import UsageError

config_app = HarvesterApp(help="Describe the keys of harvest.toml.")


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: harvester explain rate_limited", section=REFERENCE)(explain)
    app.command(epilog="Example: harvester schedule --systemd my-run/harvest.toml", section=PREPARE)(schedule)
    config_app.command(epilog="Example: harvester config schema > harvest.schema.json")(schema)
    app.add_typer(config_app, name="config", rich_help_panel=REFERENCE)


def explain(
    code: str | None = typer.Argument(
        None,
        metavar="[CODE]",
        help="Error code, as in error[CODE] or dead_letters.jsonl; or exit code. Default: list all codes.",
    ),
    as_json: bool = JSON,
) -> None:
    """Say what an error or exit code of either program means, what was done about it, and what you can do."""
    from harvester.cli.explain import all_explanations, explanations, listing
    from harvester.system.command_line.remedies import EXIT_CODES

    if code is None:
        known = [each.as_dict() for each in all_explanations().values()]
        emit({"codes": known, "exit_codes": EXIT_CODES}, listing(), as_json=as_json)
        return
    for explanation in explanations(code):
        emit(explanation.as_dict(), explanation.lines(), as_json=as_json)


def schema(as_json: bool = JSON) -> None:
    """Print the JSON Schema of harvest.toml.

    An editor uses it if the first line of harvest.toml is `#:schema FILE`.
    """
    from harvester.config.config import HarvestConfig

    data: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **HarvestConfig.model_json_schema(),
    }
    emit(data, json.dumps(data, indent=2).splitlines(), as_json=as_json)


def schedule(
    config: Path = CONFIG,
    systemd: bool = typer.Option(False, "--systemd", help="Print a service and its timer."),
    cron: bool = typer.Option(False, "--cron", help="Print lines for a crontab."),
    k8s: bool = typer.Option(False, "--k8s", help="Print a CronJob, or a Job without [schedule] hours."),
    slurm: bool = typer.Option(False, "--slurm", help="Print a job array: one task for each of --shards."),
    shards: int | None = typer.Option(
        None, min=2, max=MOST_SHARDS, help="Split the harvest: for --slurm, and for --k8s an indexed Job."
    ),
    name: str | None = typer.Option(None, help="Name of the units; default: from the folder's name."),
    image: str = typer.Option("harvester", help="Container image, for --k8s; the Containerfile builds it."),
    as_json: bool = JSON,
) -> None:
    """Print the files that let systemd, cron, Kubernetes or Slurm run this harvest; write nothing."""
    from harvester.cli import service_units
    from harvester.config import schedule as opening_hours
    from harvester.config.config import load
    from harvester.config.overrides import Overrides
    from harvester.run.sharding import with_shard
    from harvester.system import unit_text

    if systemd + cron + k8s + slurm != 1:
        raise UsageError("name exactly one scheduler", remedy="give --systemd, --cron, --k8s or --slurm")
    if slurm and shards is None:
        raise UsageError("--slurm needs --shards", remedy="as in --slurm --shards 8")
    if shards is not None and not (slurm or k8s):
        raise UsageError(
            "--shards is for job arrays", remedy="give --slurm or --k8s with it, or leave it out"
        )
    if name is not None:
        unit_text.require_name(name, "unit")
    settings = load(config)
    if shards is not None:
        with_shard(settings, Overrides(shard=f"1/{shards}"))  # refuses what so many shards can't share
    harvest = service_units.Harvest(
        name=name or unit_text.name_of(config, "harvest"),
        command=unit_text.command_of("harvester"),
        config=config.resolve(),
        store=settings.store.path,
        grace_s=settings.run.grace_s,
        budget=settings.budget,
        openings=[opening_hours.parse(text) for text in settings.schedule.hours],
        key_env=settings.teacher.api_key_env,
        image=image,
        shards=shards or 1,
    )
    build = next(
        make
        for make, is_chosen in (
            (service_units.systemd, systemd),
            (service_units.cron, cron),
            (service_units.kubernetes, k8s),
            (service_units.slurm, slurm),
        )
        if is_chosen
    )
    files = build(harvest)
    lines: list[str] = []
    for path, text in files.items():
        lines += ["---" if k8s else f"# ---- {path}", *text.rstrip().splitlines()]
    emit({"files": files}, lines, as_json=as_json)
