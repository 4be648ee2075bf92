"""`harvester fleet`: one harvest on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from harvester.cli.commands import HARVEST, HarvesterApp
from harvester.cli.console import JSON, emit, log_as_json, message, progress_display
from harvester.cli.run_options import BUDGET_PER, CONFIG, EPOCH, GRACE, LOG_JSON, MAX_RUNTIME
from harvester.config.budget_spans import BudgetSpan
from harvester.errors import HarvesterError, StoreError
from harvester.library import HarvestOptions
from harvester.system.command_line.shell_words import shell_line
from harvester.system.counted import counted

if TYPE_CHECKING:
    from harvester.fleet.driver import FleetSummary


def register(app: HarvesterApp) -> None:
    """Add the command of this module to `app`."""
    app.command(epilog="Example: harvester fleet my-run/harvest.toml --address auto", section=HARVEST)(fleet)


def fleet(
    config: Path = CONFIG,
    address: str | None = typer.Option(
        None, help="Address of a Ray cluster, or auto; default: one is started on this machine."
    ),
    ranks: int | None = typer.Option(
        None, help="How many processes share the prompts; default: one for each machine of the cluster."
    ),
    max_usd: float | None = typer.Option(
        None, help="US dollars all ranks together may cost (needs [teacher.price]); default: [budget] usd."
    ),
    max_tokens: int | None = typer.Option(
        None, help="Tokens all ranks together may use; default: [budget] tokens."
    ),
    budget_per: BudgetSpan = BUDGET_PER,
    max_runtime: str | None = MAX_RUNTIME,
    grace: float | None = GRACE,
    epoch: int | None = EPOCH,
    retry_dead: bool = typer.Option(False, "--retry-dead", help="Ask again for failed rows."),
    pay_again: bool = typer.Option(
        False, "--pay-again", help="Begin a new store for a rank whose own can't be reached."
    ),
    merge: bool = typer.Option(
        False, "--merge", help="Merge the stores of all ranks into [store] path when all rows are done."
    ),
    log_json: bool = LOG_JSON,
    as_json: bool = JSON,
) -> None:
    """Harvest on several machines by Ray: one rank each, with one set of limits and one budget.

    Run the same command again to resume. Needs the extra `ray`.
    """
    from harvester.fleet import driver
    from harvester.fleet.checks import FleetOptions
    from harvester.run import signals

    if log_json:
        log_as_json()
    signals.end_at_once()
    harvest = HarvestOptions(
        max_usd=max_usd,
        max_tokens=max_tokens,
        budget_per=budget_per.value,
        max_runtime=max_runtime,
        grace=grace,
        epoch=epoch,
        retry_dead=retry_dead,
    )
    options = FleetOptions(address, ranks, pay_again, harvest)
    with progress_display(0, "fleet") as show:
        summary = driver.run(config, options, show, message)
    lines = _lines(summary, config)
    merged = _merge(summary) if merge and summary.exit_code == 0 else None
    if merged is not None:
        lines.append(merged[1])
    elif summary.exit_code in (0, 3):
        stores = shell_line(*map(Path, summary.stores))
        lines.append(f"merge with: harvester merge {stores} {shell_line(Path(summary.whole))}")
    try:
        emit({**_data(summary), **({} if merged is None else merged[0])}, lines, as_json=as_json)
    except StoreError as error:
        message(str(error))  # the exit code is that of the fleet, whether or not its result could be printed
    raise typer.Exit(summary.exit_code)


def _merge(summary: FleetSummary) -> tuple[dict[str, Any], str]:
    """Merge the stores that lie here; return what to print."""
    from harvester.store.maintain.merge import merge

    absent = [store for store in summary.stores if not Path(store).is_dir()]
    if absent:
        return {"merged": None}, (
            f"not merged: {', '.join(absent)} do not lie on this machine; copy or `harvester publish` them, "
            "then use `harvester merge`"
        )
    out = Path(summary.whole)
    try:
        merged = merge([Path(store) for store in summary.stores], out)
    except HarvesterError as error:
        return {"merged": None}, f"not merged: {error}"
    line = f"merged {counted(merged.answers, 'answer')} and {merged.failed:,} failed rows into {out}"
    return {"merged": str(out)}, line


def _data(summary: FleetSummary) -> dict[str, Any]:
    status = summary.status
    names = ("rows_total", "requests_sent", "answers_stored", "from_cache", "dead", "cost_microusd")
    return {
        "exit_code": summary.exit_code,
        "ending": status["state"],
        **{name: status.get(name) for name in names},
        "ranks": [{**view, **_outcome(summary.ranks[number])} for number, view in enumerate(status["ranks"])],
        "stores": list(summary.stores),
        "folder": summary.folder,
        "messages": summary.exchanges,
        "message_bytes": summary.message_bytes,
    }


def _outcome(outcome: Mapping[str, Any]) -> dict[str, Any]:
    return {name: outcome[name] for name in ("exit_code", "ending", "error", "detail") if outcome.get(name)}


def _lines(summary: FleetSummary, config: Path) -> list[str]:
    status = summary.status
    lines = [
        f"{status['state']}: {counted(status['requests_sent'], 'request')} sent, "
        f"{counted(status['answers_stored'], 'answer')} stored, {status['from_cache']:,} already stored, "
        f"{status['dead']:,} failed, cost ${status['cost_microusd'] / 1e6:.4f}, by "
        f"{counted(len(summary.ranks), 'rank')}"
    ]
    for view, outcome in zip(status["ranks"], summary.ranks.values(), strict=True):
        lost = f", lost {view['losses']}x" if view["losses"] else ""
        where = f"answers in {view['store']} on {view['host']}" if view["store"] else "nothing was sent"
        lines.append(
            f"rank {view['rank']}: {outcome.get('ending', view['state'])}{lost}, "
            f"{view['rows_done']:,} of {view['rows_total']:,} rows, {where}"
        )
        if error := outcome.get("error"):
            shown = HarvesterError(error["message"], place=error["place"], remedy=error["remedy"])
            lines.append(f"  {shown}")
        elif outcome.get("detail"):
            lines.append(f"  why: {outcome['detail']}")
    lines.append(f"status lies in {summary.folder}/status.json")
    if summary.exit_code not in {0, 3}:
        lines.append(f"resume with: harvester fleet {shell_line(config)}")
    return lines
