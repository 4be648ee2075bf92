"""Hold what a plan found, and say it in lines for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from harvester.observe.status import budget_texts, span
from harvester.prompts.screen import Skip, excerpt


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts, tokens, money and time of a run that has not started.

    Attributes:
        in_batches: rows that wait in batches of earlier runs: the next run collects their answers.
        input_basis: what `input_tokens` rests on.
        preset_values: what `[teacher] preset` set, by dotted key of `[teacher]`.
        budgets: ceilings, spending so far and what is left, by span, as in status.json.
        warnings: what to check before the run.
        accept: with [accept], `rows_expected`, `usd_expected` and the `pass_rate` they rest on; null where
            the store holds no answer to judge. All other figures are then those of the most rows it may ask.
        requests: that would be sent; fewer than the rows to send where `n` joins them.
        max_n: most answers of one request: [teacher] max_n, or what an earlier run learned.
        saved_input_tokens, saved_usd: prompt tokens that are not paid again for the rows that are joined; the
            figures above leave them out already.
        logprob_bytes: with [sampling] top_logprobs, the most that log-probabilities take in the answers as
            `received` and in `sealed` shards.
        first_prompts: with [prompts] template, the texts that it writes from the first rows.
        skipped: `prompts` that will not be asked, `by_reason`; `rows` and money that are saved by it
            (`low_usd`, `high_usd`); `examples`. Empty where every prompt is asked.
        shard: which part of the harvest this is, and its part of limits and budget; "" for the whole.
    """

    rows: int
    cached: int
    duplicates: int
    input_tokens: int
    max_output_tokens: int
    low_usd: float | None
    high_usd: float | None
    seconds_at_limits: float | None
    limited_by: str
    permitted: bool
    terms: str
    bad: tuple[str, ...] = ()
    input_basis: str = ""
    preset: str = ""
    preset_values: Mapping[str, Any] = field(default_factory=dict)
    budgets: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    accept: Mapping[str, float | None] = field(default_factory=dict)
    logprob_bytes: Mapping[str, int] = field(default_factory=dict)
    requests: int = 0
    max_n: int = 1
    saved_input_tokens: int = 0
    saved_usd: float | None = None
    skipped: Mapping[str, Any] = field(default_factory=dict)
    first_prompts: tuple[str, ...] = ()
    shard: str = ""
    in_batches: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for --json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        to_send = self.rows - self.cached - self.duplicates - self.in_batches
        waiting = f"{self.in_batches:,} wait in batches, " if self.in_batches else ""
        lines = [
            f"rows      {self.rows:,}: {self.cached:,} already stored, {self.duplicates:,} share a request, "
            f"{waiting}{to_send:,} to send",
            f"tokens    about {self.input_tokens:,} in ({self.input_basis}), at most "
            f"{self.max_output_tokens:,} out",
        ]
        if self.shard:
            lines.insert(0, f"shard     {self.shard}")
        if self.high_usd is None or self.low_usd is None:
            lines.append("cost      unknown: no [teacher.price]; set [budget] tokens to cap it")
        else:
            lines.append(f"cost      ${self.low_usd:,.4f} to ${self.high_usd:,.4f}")
        if self.requests < to_send:
            usd = "" if self.saved_usd is None else f" (${self.saved_usd:,.4f})"
            lines.append(
                f"n         {to_send:,} answers in {self.requests:,} requests for up to {self.max_n} each: "
                f"about {self.saved_input_tokens:,} prompt tokens saved{usd}"
            )
        if self.accept:
            lines.append(f"accept    {_accept_text(self.accept)}")
        if self.logprob_bytes:
            received, sealed = (
                f"{self.logprob_bytes[name] / 1e6:,.1f} MB" for name in ("received", "sealed")
            )
            lines.append(f"logprobs  at most about {received} in the journal, {sealed} once sealed")
        lines += [f"budget    {text}" for text in budget_texts(self.budgets)]
        if self.seconds_at_limits is None:
            lines.append("time      unknown: no rate limit is configured; it will be learned")
        else:
            lines.append(f"time      at least {span(self.seconds_at_limits)} ({self.limited_by})")
        lines += _skipped_lines(self.skipped)
        lines += [f"prompt    {excerpt(text)}" for text in self.first_prompts]
        if self.bad:
            lines.append(f"bad       {len(self.bad):,} lines will be passed over; the first: {self.bad[0]}")
        lines.append(f"terms     {self.terms}")
        if self.preset:
            values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.preset_values.items())
            lines.append(f"preset    {self.preset}: {values or 'the file sets all of its values itself'}")
        lines += [f"note      {warning}" for warning in self.warnings]
        return lines


def _skipped_lines(skipped: Mapping[str, Any]) -> list[str]:
    if not skipped:
        return []
    counts = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in skipped["by_reason"].items()
    )
    money = ""
    if skipped["high_usd"] is not None:
        money = f", ${skipped['low_usd']:,.4f} to ${skipped['high_usd']:,.4f}"
    lines = [
        f"skipped   {skipped['prompts']:,} prompts will not be asked ({counts}); it saves "
        f"{skipped['rows']:,} rows{money}"
    ]
    return lines + [f"          {Skip(**example).line()}" for example in skipped["examples"]]


def _accept_text(accept: Mapping[str, float | None]) -> str:
    rate, rows, usd = (accept[name] for name in ("pass_rate", "rows_expected", "usd_expected"))
    if rate is None or rows is None:
        return "rows, tokens and cost are the most it may ask; no stored answer shows how many to expect"
    cost = "" if usd is None else f", up to ${usd:,.4f}"
    return (
        f"rows, tokens and cost are the most it may ask; expected are about {rows:,.0f} rows in all{cost} "
        f"({rate:.1%} of the stored first answers pass)"
    )
