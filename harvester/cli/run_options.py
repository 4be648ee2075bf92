"""Define the argument and the options that several commands on a harvest.toml have."""

from __future__ import annotations

import typer

from harvester.config.budget_spans import BudgetSpan

CONFIG = typer.Argument(..., metavar="CONFIG", help="Path of a harvest.toml.", show_default=False)
BUDGET_PER = typer.Option(
    BudgetSpan.RUN,
    help="What --max-usd, --max-tokens and the ceilings of one run in [budget] hold for instead.",
)
MAX_RUNTIME = typer.Option(None, help="Stop after this time: 90s, 30m, 2h.")
GRACE = typer.Option(None, help="Seconds to wait for answers in flight after a signal.")
EPOCH = typer.Option(None, help="A new number asks every prompt once more, on purpose.")
LOG_JSON = typer.Option(False, "--log-json", help="Print JSON records on stderr, one a line.")
