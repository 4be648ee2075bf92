"""init, plan, run: the verbs around harvest.toml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from harvester.config.bounds import EXACT, MOST_USD, YEAR_S

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")
CONFIG = typer.Argument(..., help="Path of a harvest.toml.", show_default=False)


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog="Example: harvester init my-run")(init)
    app.command(epilog="Example: harvester plan my-run/harvest.toml")(plan)
    app.command(epilog="Example: harvester run my-run/harvest.toml --max-usd 2")(run)


def init(
    folder: Path = typer.Argument(..., help="Folder to make.", show_default=False), as_json: bool = JSON
) -> None:
    """Make a runnable folder: harvest.toml, prompts, README."""
    import shlex

    from harvester.cli.console import emit
    from harvester.cli.init_config import write_starter

    files = write_starter(folder)
    lines = [
        f"made {folder}: {', '.join(path.name for path in files)}",
        "next: harvester mock-teacher --port 8000   (in another terminal)",
        f"      harvester run {shlex.quote(str(folder / 'harvest.toml'))}",
    ]
    emit({"folder": str(folder), "files": [str(path) for path in files]}, lines, as_json=as_json)


def plan(config: Path = CONFIG, as_json: bool = JSON) -> None:
    """Count, price and time a harvest without sending a request."""
    from harvester.cli.console import emit
    from harvester.run import prepare

    outlook = prepare.look_ahead(config)
    emit(outlook.as_dict(), outlook.lines(), as_json=as_json)


def run(
    config: Path = CONFIG,
    limit: int | None = typer.Option(None, min=1, max=EXACT, help="Stop after this many new answers."),
    max_usd: float | None = typer.Option(None, min=0, max=MOST_USD, help="Ceiling on this run's cost."),
    max_tokens: int | None = typer.Option(None, min=1, max=EXACT, help="Ceiling on this run's tokens."),
    max_runtime: str | None = typer.Option(None, help="Stop after a while, as in 90s, 30m, 2h."),
    grace: float | None = typer.Option(
        None, min=0, max=YEAR_S, help="Seconds to wait for paid answers on a signal."
    ),
    epoch: int | None = typer.Option(
        None, min=0, max=EXACT, help="Another number asks everything again, on purpose."
    ),
    watch: bool = typer.Option(False, "--watch", help="Stay up: take prompt files that appear or grow."),
    finish_by: str | None = typer.Option(None, help="Stop then, as in 2026-11-27T18:00+01:00."),
    metrics_file: Path | None = typer.Option(None, help="Keep a Prometheus textfile here, every 15 s."),
    otel: bool = typer.Option(False, "--otel", help="Send metrics by OTLP; needs the extra `otel`."),
    log_json: bool = typer.Option(False, "--log-json", help="JSON records on stderr, one a line."),
    as_json: bool = JSON,
) -> None:
    """Harvest until done or a limit. Resume is the default: held answers are never asked again."""
    import asyncio
    import contextlib

    from harvester.cli import malloc

    malloc.settle()
    from harvester.cli.console import emit, log_as_json, painted, talk
    from harvester.config import schedule
    from harvester.config.overrides import Overrides
    from harvester.errors import StoreError, UsageError
    from harvester.run import job, prepare, signals

    if log_json:
        log_as_json()

    signals.end_at_once()
    try:
        runtime_s = None if max_runtime is None else schedule.seconds(max_runtime)
        ends_at = None if finish_by is None else schedule.instant(finish_by)
    except ValueError as error:
        raise UsageError(str(error), place="--max-runtime or --finish-by") from None
    flags = Overrides(
        rows=limit,
        usd=max_usd,
        tokens=max_tokens,
        runtime_s=runtime_s,
        grace_s=grace,
        epoch=epoch,
        watch=watch,
        finish_by=ends_at,
        metrics_file=metrics_file,
        otel=otel,
    )
    prepared = prepare.prepare(config, flags)
    for line in prepared.lines():
        talk(line)
    with contextlib.ExitStack() as watchers:
        tell = [watchers.enter_context(painted(prepared.rows_total, "harvest"))]
        if metrics_file is not None:
            from harvester.observe.report.prometheus import kept

            watchers.enter_context(kept(prepared.store, metrics_file, talk))
        if otel:
            from harvester.observe.otel import sent

            teacher = prepared.config.teacher
            tell.append(watchers.enter_context(sent(teacher.base_url, teacher.model, talk)))

        def watched(told: Mapping[str, Any]) -> None:
            for one in tell:
                one(told)

        summary = asyncio.run(job.run(prepared, watched))
    try:
        emit(summary.as_dict(), summary.lines(), as_json=as_json)
    except StoreError as error:
        talk(str(error))  # how it ended counts, not who could hear of it
    raise typer.Exit(summary.exit_code)
