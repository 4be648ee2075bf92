"""Hold the command-line options that override harvest.toml, and build the command that resumes. No I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from harvester.config.budget_spans import BudgetSpan
from harvester.config.transport import Transport
from harvester.errors import ConfigError
from harvester.system.command_line.shell_words import shell_line


@dataclass(frozen=True, slots=True)
class Overrides:
    """The options of one run.

    `rows`, `usd`, `tokens`, `runtime_s` and `finish_by` are ceilings; None leaves the file's value.
    `retry` are outcomes of stored answers that are asked again, `retry_dead` asks failed rows again.
    `budget_span` is the span for which `usd` and `tokens` hold, here and at the top of [budget].
    `share_opening` makes runs since the opening hours began count as one: they share the ceilings of a run.
    `transport` and `shard` replace `[run] transport` and `[run] shard`. `is_allocated` says that a
    coordinator allocates limits and budget, so that a shard is not given its part of them from the start.
    """

    rows: int | None = None
    usd: float | None = None
    tokens: int | None = None
    runtime_s: float | None = None
    grace_s: float | None = None
    epoch: int | None = None
    watch: bool = False
    finish_by: float | None = None
    metrics_file: Path | None = None
    otel: bool = False
    budget_span: BudgetSpan = BudgetSpan.RUN
    share_opening: bool = False
    retry: frozenset[str] = frozenset()
    retry_dead: bool = False
    transport: Transport | None = None
    shard: str | None = None
    is_allocated: bool = False

    @property
    def retries(self) -> bool:
        """Whether stored answers or failed rows are asked again."""
        return bool(self.retry) or self.retry_dead

    def require(self, *, priced: bool) -> None:
        """Do nothing when the options can be met.

        Args:
            priced: whether the teacher has a price; without one no cost is known.

        Raises:
            ConfigError: names the first option that can't be met.
        """
        for flag, value in (("--max-usd", self.usd), ("--grace", self.grace_s)):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{value} is not a finite number", place=flag, remedy="as in 5 or 2.50")
        if self.usd is not None and not priced:
            raise ConfigError(
                "a ceiling in USD needs a [teacher.price]",
                place="--max-usd",
                remedy="write the price into the file, or give --max-tokens",
            )

    def again(self, config: Path) -> str:
        """Return the command that resumes the run, quoted for a shell.

        Options other than ceilings are repeated: without its epoch, the run would pay again. Ceilings are
        left out, because one of them may have ended the run.
        """
        words: list[str | Path] = ["harvester", "run", config]
        for flag, value in (
            ("--shard", self.shard),
            ("--epoch", self.epoch),
            ("--grace", self.grace_s),
            ("--metrics-file", self.metrics_file),
        ):
            if value is not None:
                shown = f"{value:g}" if isinstance(value, float) else value
                words += [flag, shown if isinstance(shown, Path) else str(shown)]
        if self.budget_span is not BudgetSpan.RUN:
            words += ["--budget-per", self.budget_span.value]
        if self.transport is not None:
            words += ["--transport", self.transport.value]
        words += ["--share-opening"] * self.share_opening + ["--watch"] * self.watch + ["--otel"] * self.otel
        return shell_line(*words)
