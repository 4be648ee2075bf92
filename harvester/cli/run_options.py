"""Define the argument and the options that several commands on a harvest.toml have."""

from __future__ import annotations

import typer

from harvester.config.budget_spans import BudgetSpan

CONFIG = typer.Argument(..., metavar="CONFIG", help="Path of a harvest.toml.", show_default=False)
BUDGET_PER = typer.Option(
    BudgetSpan.RUN,
    help="Scope of --max-usd, --max-tokens and [budget] usd/tokens: this run (default), all runs of the "
    "store, a UTC day or month.",
)
MAX_RUNTIME = typer.Option(None, help="Stop after this time: 90s, 30m, 2h.")
GRACE = typer.Option(
    None, help="Seconds to wait for answers in flight after a signal. Default: [run] grace_s (25)."
)
EPOCH = typer.Option(
    None,
    help="Part of every request key; a number not used before asks all prompts again. Default: [run] epoch "
    "(0).",
)
LOG_JSON = typer.Option(False, "--log-json", help="Print JSON records on stderr, one a line.")
