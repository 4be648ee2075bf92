"""What a harvest would do, cost and take: zero requests, nothing written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harvester.api.request_builder import requests
from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.prompts import reader
from harvester.prompts.bad_lines import BadLines
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.reuse import ReuseIndex, find_answers
from harvester.teacher.limits import Quantity, configured_limits
from harvester.terms import gate

CHUNK = 1000
SHORT_ANSWER_SHARE = 0.1
"""Lower end of the cost range: answers a tenth as long as max_tokens allows. The upper end is certain."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts, tokens, money and time of a run that has not started.

    Attributes:
        preset_values: what `[teacher] preset` set, by dotted key of `[teacher]`.
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
    preset: str = ""
    preset_values: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        to_send = self.rows - self.cached - self.duplicates
        said = [
            f"rows      {self.rows:,}: {self.cached:,} held already, {self.duplicates:,} share a request, "
            f"{to_send:,} to send",
            f"tokens    about {self.input_tokens:,} in, at most {self.max_output_tokens:,} out",
        ]
        if self.high_usd is None or self.low_usd is None:
            said.append("cost      unknown: no [teacher.price]; set [budget] tokens to cap it")
        else:
            said.append(f"cost      ${self.low_usd:,.4f} to ${self.high_usd:,.4f}")
        if self.seconds_at_limits is None:
            said.append("time      unknown: no limits configured; they will be learned")
        else:
            said.append(f"time      at least {_span(self.seconds_at_limits)} ({self.limited_by})")
        if self.bad:
            said.append(f"bad       {len(self.bad):,} lines will be passed over; the first: {self.bad[0]}")
        said.append(f"terms     {self.terms}")
        if self.preset:
            values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.preset_values.items())
            said.append(f"preset    {self.preset}: {values or 'the file sets all of its values itself'}")
        return said


def plan(config: HarvestConfig, root: Path, verdict: gate.Verdict) -> Plan:
    """Walk the prompts once, streaming; look keys up where a store exists.

    Raises:
        PromptError: the first prompt that can't be used.
    """
    store = root / config.store.path
    journal = Journal.open(store, read_only=True) if (store / paths.JOURNAL).exists() else None
    rows = cached = duplicates = tokens_in = tokens_out = low = high = 0
    seen: set[bytes] = set()
    ceilings = ReuseIndex.of(journal, config) if journal else ReuseIndex(config.teacher.base_url)
    bad = BadLines(config.prompts.max_bad)
    feed = requests(reader.read(config.prompts.files, root, bad), config)
    while chunk := list(itertools.islice(feed, CHUNK)):
        rows += len(chunk)
        held = set(find_answers(journal, chunk, ceilings)) if journal else set()
        cached += sum(r.key in held for r in chunk)
        fresh: list[Request] = []
        for request in chunk:
            if request.key in held:
                continue
            if request.key in seen:
                duplicates += 1
                continue
            seen.add(request.key)
            fresh.append(request)
        tokens_in += sum(r.input_tokens for r in fresh)
        tokens_out += sum(r.output_tokens for r in fresh)
        high += sum(r.estimated_microusd for r in fresh)
        low += sum(_low_microusd(r, config) for r in fresh)
    if journal is not None:
        journal.close()
    seconds, why = _time(config, rows - cached - duplicates, tokens_in, tokens_out)
    priced = config.teacher.price is not None
    return Plan(
        rows,
        cached,
        duplicates,
        tokens_in,
        tokens_out,
        low / 1e6 if priced else None,
        high / 1e6 if priced else None,
        seconds,
        why,
        verdict.permitted,
        verdict.summary(),
        tuple(str(one) for one in bad.passed_over),
        config.teacher.preset,
        config.teacher.preset_values,
    )


def _low_microusd(request: Request, config: HarvestConfig) -> int:
    price = config.teacher.price
    if price is None:
        return 0
    return round(
        request.input_tokens * price.input + request.output_tokens * SHORT_ANSWER_SHARE * price.output
    )


def _time(config: HarvestConfig, rows: int, tokens_in: int, tokens_out: int) -> tuple[float | None, str]:
    """The slowest of the configured limits decides."""
    short_out = tokens_out * SHORT_ANSWER_SHARE
    amounts = {
        Quantity.REQUESTS: rows,
        Quantity.TOKENS: tokens_in + short_out,
        Quantity.INPUT_TOKENS: tokens_in,
        Quantity.OUTPUT_TOKENS: short_out,
    }
    spans = [
        (amounts[key.quantity] * key.period_s / limit, key.label)
        for key, limit in configured_limits(config.teacher.limits).items()
    ]
    return max(spans, default=(None, ""))


def _span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
