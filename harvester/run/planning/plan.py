"""Compute what a harvest would do, cost and take (`harvester plan`). Nothing is sent, nothing written."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harvester.api.joining import may_join
from harvester.api.request_builder import cost_microusd, requests
from harvester.config.budget_spans import BudgetSpan
from harvester.config.config import HarvestConfig
from harvester.config.teacher_section import PriceSection
from harvester.config.transport import Transport
from harvester.observe.counters import PassLimits
from harvester.prompts.screen import SkippedPrompts
from harvester.quality.verifiers.verifiers import AnswerVerdict, Verifiers
from harvester.run.accept import expected_asked
from harvester.run.planning import token_estimate
from harvester.run.planning.plan_result import Plan
from harvester.run.planning.plan_rows import SHORT_ANSWER_SHARE, PlanRows, PlanTotals
from harvester.run.planning.prompt_reading import PromptReading
from harvester.run.planning.token_estimate import InputCorrection
from harvester.store import other_settings
from harvester.store.journal import sqlite
from harvester.store.journal.batches import waiting_keys
from harvester.store.journal.journal import Journal
from harvester.store.maintain.bill import compute_spent
from harvester.store.reuse import ReuseIndex, find_answers
from harvester.teacher.budget import Amounts
from harvester.teacher.choice_limit import ChoiceLimit
from harvester.teacher.limiter.limits import Quantity, configured_limits
from harvester.teacher.policies import build_budget
from harvester.terms import gate

if TYPE_CHECKING:
    from harvester.store.maintain.other_store import OtherStore

# Requests looked up in the store at once.
CHUNK = 1000

# Bytes of a listed log-probability: of the answer as received, which the journal holds until it is sealed,
# and of both columns of a sealed shard. Measured on 400 answers of the mock teacher: 68 and 18 with 5
# alternatives to a token, 62 and 14 with 20.
RECEIVED_LOGPROB_BYTES = 68
SEALED_LOGPROB_BYTES = 18


def plan(config: HarvestConfig, root: Path, verdict: gate.Verdict, *, key_note: str = "") -> Plan:
    """Read the prompts once, as a stream, and look their keys up where a store exists.

    Args:
        verdict: of the terms.
        key_note: why a run would find no usable API key, "" if it would.

    Raises:
        PromptError: the first prompt that can't be used, or two different prompts with one id.
    """
    config = _at_batch_price(config)
    reading, limit = PromptReading(config, root), _choice_limit(config, root)
    max_n = limit.size if config.run.transport is Transport.ONLINE else 1
    totals, saved, other_notes = _totals(config, root, reading, max_n, mock=verdict.mock)
    correction = token_estimate.learn(root / config.store.path, config)
    totals = _corrected(totals, correction, config.teacher.price)
    saved = _corrected(saved, correction, config.teacher.price)
    accept = _accept(config, root, totals)
    seconds, limited_by = _time(config, totals)
    priced = config.teacher.price is not None
    return Plan(
        rows=totals.rows,
        cached=totals.cached,
        in_batches=totals.in_batches,
        duplicates=totals.duplicates,
        input_tokens=totals.input_tokens,
        max_output_tokens=totals.max_output_tokens,
        low_usd=totals.low_microusd / 1e6 if priced else None,
        high_usd=totals.high_microusd / 1e6 if priced else None,
        seconds_at_limits=seconds,
        limited_by=limited_by,
        permitted=verdict.permitted,
        terms=verdict.summary(),
        bad=tuple(str(error) for error in reading.bad.passed_over),
        input_basis=correction.basis(),
        preset=config.teacher.preset.name,
        preset_values=config.teacher.preset_values,
        budgets=budgets(config, root, PassLimits()),
        accept=accept,
        logprob_bytes=_logprob_bytes(totals, config.sampling.top_logprobs),
        requests=totals.requests,
        max_n=max_n,
        saved_input_tokens=totals.saved_tokens,
        saved_usd=cost_microusd(config.teacher.price, totals.saved_tokens, 0) / 1e6 if priced else None,
        skipped=_skipped(reading.screen.skipped, saved, priced=priced),
        first_prompts=reading.first_prompts(),
        warnings=(
            *(() if verdict.permitted else (*verdict.reasons, verdict.remedy())),
            *([key_note] if key_note else []),
            *warnings(config),
            *([f"`harvester run` {limit.text()}"] if limit.reason else []),
            *(reading.notes.lines() if config.score is None else ()),
            *other_settings.notes(root / config.store.path, config),
            *other_settings.teacher_notes(root, config),
            *other_notes,
        ),
    )


def _at_batch_price(config: HarvestConfig) -> HarvestConfig:
    """Return the configuration with the price of batches where all rows go into batches.

    A hybrid run is planned at the price of single requests, which it can't exceed.
    """
    price = config.teacher.price
    if price is None or config.run.transport is not Transport.BATCH:
        return config
    teacher = config.teacher.model_copy(update={"price": price.of_batches})
    return config.model_copy(update={"teacher": teacher})


def warnings(config: HarvestConfig) -> tuple[str, ...]:
    """Return what the operator should check before this configuration is run."""
    price, sampling = config.teacher.price, config.sampling
    notes = [price.age_note(datetime.now(UTC).date()) if price is not None else ""]
    notes.append(config.teacher.free_price_note())
    if config.most_samples > 1 and sampling.temperature == 0:
        asked = f"[sampling] samples = {sampling.samples}"
        if config.accept is not None:
            asked = f"[accept] of = {config.accept.of}"
        notes.append(
            f"{asked} at temperature 0 pays for {config.most_samples} (nearly) "
            "equal answers to each prompt: raise temperature, or ask for one"
        )
    notes.append(_why_n_is_not_used(config))
    return (*config.teacher.plain_http_notes(), *(note for note in notes if note))


def _why_n_is_not_used(config: HarvestConfig) -> str:
    """Say why `[teacher] max_n` joins no samples, although there are several; "" where it does."""
    if config.teacher.max_n == 1 or config.most_samples == 1:
        return ""
    name = f"[teacher] max_n = {config.teacher.max_n} is not used"
    if config.run.transport is not Transport.ONLINE:
        return f"{name} in batches: each sample is a line of its own"
    if config.sampling.seed is not None:
        return (
            f"{name}: [sampling] seed gives each sample a seed of its own, and so a request of its own; "
            "leave seed out to pay for each prompt once"
        )
    return ""


def budgets(
    config: HarvestConfig, root: Path, limits: PassLimits
) -> Mapping[str, Mapping[str, float | None]]:
    """Return what is left of each ceiling now, by the ledger of the store, as in status.json.

    A run that begins now goes on from killed runs of its teacher; what they spent counts for it.
    """
    store, now = root / config.store.path, time.time()
    spent: Mapping[BudgetSpan, Amounts] = {}
    if sqlite.has_journal(store):
        with Journal.open(store, read_only=True) as journal:
            spent = compute_spent(journal, now, config.teacher.teacher_id, limits.shared_since)
    return build_budget(config, limits, spent, now).as_dict()


def _choice_limit(config: HarvestConfig, root: Path) -> ChoiceLimit:
    """How many answers one request asks for, by what runs of this store have learned."""
    store = root / config.store.path
    if not sqlite.has_journal(store):
        return ChoiceLimit(config.teacher)
    with Journal.open(store, read_only=True) as journal:
        return ChoiceLimit.of(journal, config.teacher)


def _skipped(skipped: SkippedPrompts, saved: PlanTotals, *, priced: bool) -> Mapping[str, Any]:
    """Return what skipped prompts save, as in `Plan.skipped`."""
    if not skipped:
        return {}
    return {
        "prompts": len(skipped),
        "by_reason": dict(sorted(skipped.by_reason.items())),
        "rows": saved.rows,
        "low_usd": saved.low_microusd / 1e6 if priced else None,
        "high_usd": saved.high_microusd / 1e6 if priced else None,
        "examples": [asdict(skip) for skip in skipped.examples],
    }


def _totals(
    config: HarvestConfig,
    root: Path,
    reading: PromptReading,
    max_n: int,
    *,
    mock: bool,
) -> tuple[PlanTotals, PlanTotals, tuple[str, ...]]:
    """Return the sums of the rows that would be asked, those of rows that the screen skips, and notes.

    A note names a store of `[store] read_also` that has no answer to them.

    Only the samples that are asked in any case count as joined: how many further ones `[accept]` asks at once
    depends on the answers.
    """
    store = root / config.store.path
    rows = PlanRows()
    feed = requests(reading.prompts(), config, range(config.most_samples))
    with contextlib.ExitStack() as stack:
        journal = None
        reuse = ReuseIndex(config.teacher.key_name)
        in_batches: Collection[bytes] = ()
        if sqlite.has_journal(store):
            journal = stack.enter_context(Journal.open(store, read_only=True))
            reuse = ReuseIndex.of(journal, config)
            with journal.reading() as connection:
                in_batches = waiting_keys(connection)
        others = stack.enter_context(_others(config, root, mock=mock))
        samples = config.most_samples
        while chunk := list(itertools.islice(feed, max(1, CHUNK // samples) * samples)):
            held = set(find_answers(journal, chunk, reuse) if journal is not None else ())
            for other in others:
                held |= other.find([request for request in chunk if request.key not in held]).keys()
            first, joined = None, 0
            for request in chunk:
                is_skipped = request.prompt in reading.screen.skipped
                if request.key in held:
                    if not is_skipped:
                        rows.add_held()
                    continue
                if request.key in in_batches:
                    if not is_skipped:
                        rows.add_waiting()
                    continue
                is_joined = (
                    first is not None
                    and joined < max_n
                    and request.sample_index < config.first_samples
                    and may_join(first, request)
                )
                first, joined = (first, joined + 1) if is_joined else (request, 1)
                rows.add(request, config, is_joined=is_joined, is_skipped=is_skipped)
        is_first = journal is None or not journal.totals().copied
        notes = tuple(note for other in others if is_first and (note := other.note()))
    reading.end()
    return *rows.totals(), notes


@contextlib.contextmanager
def _others(config: HarvestConfig, root: Path, *, mock: bool) -> Iterator[list[OtherStore]]:
    """Open the stores of `[store] read_also`, whose answers a run would copy."""
    if not config.store.read_also:
        yield []
        return
    from harvester.store.maintain.other_store import open_others

    others = open_others(config, root, mock=mock)
    try:
        yield others
    finally:
        for other in others:
            other.close()


def _accept(config: HarvestConfig, root: Path, totals: PlanTotals) -> Mapping[str, float | None]:
    """Return how many rows `[accept]` is expected to ask in all, and what they may cost; empty without it.

    The pass rate is that of the answers in the store with sample number 0, which are asked of every prompt.
    One rate for all prompts underestimates what hard prompts need.
    """
    if config.accept is None:
        return {}
    from harvester.export.score import score
    from harvester.store.reader import holds_answers

    store = root / config.store.path
    tallies = score(store, Verifiers(config.verify, root), first=1).values() if holds_answers(store) else ()
    passed, judged = 0, 0
    for tally in tallies:
        passed += tally.verdicts[AnswerVerdict.PASSED]
        judged += sum(tally.verdicts.values())
    if not judged:
        return {"pass_rate": None, "rows_expected": None, "usd_expected": None}
    rate = passed / judged
    prompts = totals.rows / config.accept.of
    rows = prompts * expected_asked(config.accept.per_prompt, config.accept.of, rate)
    if config.accept.until is not None and rate * rows > config.accept.until:
        rows = config.accept.until / rate
    usd = (
        totals.high_microusd / 1e6 * min(1.0, max(0.0, rows - totals.cached) / totals.to_send)
        if totals.to_send
        else 0.0
    )
    return {
        "pass_rate": rate,
        "rows_expected": rows,
        "usd_expected": usd if config.teacher.price is not None else None,
    }


def _corrected(totals: PlanTotals, correction: InputCorrection, price: PriceSection | None) -> PlanTotals:
    """The sums with input tokens, and their cost, as the teacher counts them."""
    input_tokens = correction.total(totals.input_tokens, totals.requests)
    further = round((input_tokens - totals.input_tokens) * (price.input if price is not None else 0.0))
    return replace(
        totals,
        input_tokens=input_tokens,
        saved_tokens=correction.total(totals.saved_tokens, totals.to_send - totals.requests),
        low_microusd=max(0, totals.low_microusd + further),
        high_microusd=max(0, totals.high_microusd + further),
    )


def _logprob_bytes(totals: PlanTotals, top: int) -> Mapping[str, int]:
    """Return the most bytes that log-probabilities take; empty where none are asked for."""
    listed = totals.max_output_tokens * (1 + top)  # the generated token, too
    sizes = {"received": listed * RECEIVED_LOGPROB_BYTES, "sealed": listed * SEALED_LOGPROB_BYTES}
    return sizes if top else {}


def _time(config: HarvestConfig, totals: PlanTotals) -> tuple[float | None, str]:
    """Return the seconds that the slowest configured limit takes, and its name; None without limits."""
    short_output = totals.max_output_tokens * SHORT_ANSWER_SHARE
    amounts = {
        Quantity.REQUESTS: totals.requests,
        Quantity.TOKENS: totals.input_tokens + short_output,
        Quantity.INPUT_TOKENS: totals.input_tokens,
        Quantity.OUTPUT_TOKENS: short_output,
    }
    spans = [
        (amounts[key.quantity] * key.period_s / limit, key.label)
        for key, limit in configured_limits(config.teacher.limits).items()
    ]
    return max(spans, default=(None, ""))
