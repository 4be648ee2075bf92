"""Commands around harvest.toml: `init`, `plan`, `run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from harvester import library
from harvester.cli.commands import HARVEST, PREPARE, HarvesterApp
from harvester.cli.console import JSON, Status, emit, log_as_json, message, progress_display
from harvester.cli.run_options import BUDGET_PER, CONFIG, EPOCH, GRACE, LOG_JSON, MAX_RUNTIME
from harvester.config.budget_spans import BudgetSpan
from harvester.config.transport import Transport
from harvester.errors import Interrupted, StoppedAtLimit, StoreError, TooManyFailures
from harvester.system.command_line.unused_imports import import_without_certificates

if TYPE_CHECKING:
    from harvester.run.endings import Summary
    from harvester.run.prepare import Prepared

SHARD = typer.Option(
    None,
    metavar="I/N",
    help="Ask the I-th of N parts of the prompts, with 1/N of limits and budget, into a store of its own.",
)


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: harvester init my-run", section=PREPARE)(init)
    app.command(epilog="Example: harvester plan my-run/harvest.toml", section=PREPARE)(plan)
    app.command(epilog="Example: harvester run my-run/harvest.toml --max-usd 2", section=HARVEST)(run)


def init(
    name: str = typer.Argument(..., metavar="FOLDER", help="Folder to create.", show_default=False),
    as_json: bool = JSON,
) -> None:
    """Create a folder that can run at once: harvest.toml, a few prompts, README."""
    from harvester.cli.init_config import write_starter
    from harvester.system.command_line.shell_words import shell_line

    folder = Path(name)
    files = write_starter(folder)
    lines = [
        f"created {folder}: {', '.join(str(path.relative_to(folder)) for path in files)}",
        "next: harvester mock-teacher --port 8000   (in another terminal)",
        f"      harvester run {shell_line(folder / 'harvest.toml')}",
    ]
    emit({"folder": str(folder), "files": [str(path) for path in files]}, lines, as_json=as_json)


def plan(config: Path = CONFIG, shard: str | None = SHARD, as_json: bool = JSON) -> None:
    """Show rows, cost, duration and terms of a harvest without sending a request."""
    outlook = library.plan(config, shard=shard)
    emit(outlook.as_dict(), outlook.lines(), as_json=as_json)


def run(
    context: typer.Context,
    config: Path = CONFIG,
    limit: int | None = typer.Option(None, help="New answers after which the run stops; default: no limit."),
    max_usd: float | None = typer.Option(
        None, help="US dollars this run may cost (needs [teacher.price]); default: [budget] usd."
    ),
    max_tokens: int | None = typer.Option(None, help="Tokens this run may use; default: [budget] tokens."),
    budget_per: BudgetSpan = BUDGET_PER,
    share_opening: bool = typer.Option(
        False,
        "--share-opening",
        help="Runs since [schedule] hours began count as one: they share the ceilings of a run.",
    ),
    max_runtime: str | None = MAX_RUNTIME,
    grace: float | None = GRACE,
    epoch: int | None = EPOCH,
    retry: str | None = typer.Option(
        None, help="Ask again for stored answers with these outcomes: empty,invalid,filtered,refused,unknown."
    ),
    retry_dead: bool = typer.Option(
        False, "--retry-dead", help="Ask again for failed rows (dead_letters.jsonl), also for rejected ones."
    ),
    watch: bool = typer.Option(False, "--watch", help="Keep running; take prompt files that appear or grow."),
    finish_by: str | None = typer.Option(None, help="Stop at this time: 2026-11-27T18:00+01:00."),
    metrics_file: Path | None = typer.Option(None, help="Write Prometheus text to this file every 15 s."),
    otel: bool = typer.Option(
        False, "--otel", help="Send metrics by OTLP to OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra `otel`."
    ),
    transport: Transport | None = typer.Option(
        None, help="Ask one by one (online), in batches (batch), or both (hybrid); [run] transport."
    ),
    shard: str | None = SHARD,
    detach: bool = typer.Option(
        False, "--detach", help="Go on in the background, with a log beside the store; `attach` shows it."
    ),
    log_json: bool = LOG_JSON,
    as_json: bool = JSON,
) -> None:
    """Harvest until all rows are done or a limit is reached.

    Run the same command again to resume: what is stored is never asked again.
    """
    from harvester.cli import malloc

    malloc.use_one_arena()  # before threads start and Arrow is imported

    from harvester.cli.detach import OwnLog
    from harvester.run import signals

    own_log = OwnLog()
    if log_json:
        log_as_json()
    signals.end_at_once()
    options = library.HarvestOptions(
        limit=limit,
        max_usd=max_usd,
        max_tokens=max_tokens,
        budget_per=budget_per.value,
        share_opening=share_opening,
        max_runtime=max_runtime,
        grace=grace,
        epoch=epoch,
        retry=retry,
        retry_dead=retry_dead,
        watch=watch,
        finish_by=finish_by,
        metrics_file=metrics_file,
        otel=otel,
        transport=None if transport is None else transport.value,
        shard=shard,
    )
    if detach:
        _detach(context, config, options, as_json=as_json)
    with _saying_when_interrupted():
        prepared = library.prepared(config, options, _flag)
    for line in prepared.lines():
        message(line)
    summary = run_prepared(prepared, own_log.bound)
    try:
        emit(summary.as_dict(), summary.lines(), as_json=as_json)
    except StoreError as error:
        message(str(error))  # the exit code is that of the run, whether or not its result could be printed
    raise typer.Exit(summary.exit_code)


def _detach(
    context: typer.Context, config: Path, options: library.HarvestOptions, *, as_json: bool
) -> NoReturn:
    """Start the run in a process of its own, and say where it is.

    Raises:
        typer.Exit: with 0 while it runs, else with its exit code.
    """
    from harvester.cli import detach

    started = detach.start(detach.words_of(context), library.store_of(config, options, _flag))
    code = started.exit_code or 0
    if code in (0, TooManyFailures.exit_code, StoppedAtLimit.exit_code):
        emit(started.facts(), started.lines(), as_json=as_json)
    raise typer.Exit(code)


@contextmanager
def _saying_when_interrupted() -> Iterator[None]:
    """Say on stderr that a signal ended the block, in which nothing is sent and nothing is written.

    Raises:
        typer.Exit: 128 and the number of the signal.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        message(
            "interrupted while the prompts were checked: nothing was sent and nothing was written; "
            "the same command starts again"
        )
        code = stop.code if isinstance(stop, SystemExit) else None
        raise typer.Exit(code if isinstance(code, int) else Interrupted.exit_code) from None


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def run_prepared(prepared: Prepared, on_status: Callable[[], None] = lambda: None) -> Summary:
    """Run the harvest; show its status on stderr meanwhile.

    Args:
        on_status: is called with each status.
    """
    import_without_certificates("aiohttp")
    with progress_display(prepared.rows_total, "harvest") as show:

        def watch(status: Status) -> None:
            on_status()
            show(status)

        return library.run_prepared(prepared, watch, note=message)
