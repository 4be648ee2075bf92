"""Compute what a harvest would do, cost and take (`harvester plan`). Nothing is sent, nothing written."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harvester.api.joining import may_join
from harvester.api.request_builder import cost_microusd, requests
from harvester.api.types import Prompt, Request
from harvester.config.budget_spans import BudgetSpan
from harvester.config.config import HarvestConfig, PriceSection
from harvester.config.transport import Transport
from harvester.observe.counters import PassLimits
from harvester.observe.status import budget_texts, span
from harvester.prompts import reader
from harvester.prompts.bad_lines import BadLines
from harvester.prompts.duplicate_ids import DuplicateIds
from harvester.prompts.own_prompts import OwnPrompts
from harvester.prompts.row_rules import rules_of
from harvester.prompts.screen import PromptScreen, Skip, SkippedPrompts, excerpt
from harvester.run import token_estimate
from harvester.run.accept import expected_asked
from harvester.run.prompt_notes import PromptNotes
from harvester.run.token_estimate import InputCorrection
from harvester.store import other_settings
from harvester.store.journal import sqlite
from harvester.store.journal.journal import Journal
from harvester.store.maintain.bill import compute_spent
from harvester.store.reuse import ReuseIndex, find_answers
from harvester.teacher.budget import Amounts
from harvester.teacher.choice_limit import ChoiceLimit
from harvester.teacher.limits import Quantity, configured_limits
from harvester.teacher.policies import build_budget
from harvester.terms import gate
from harvester.verify.verifiers import AnswerVerdict, Verifiers

if TYPE_CHECKING:
    from harvester.store.maintain.other_store import OtherStore

# Requests looked up in the store at once.
CHUNK = 1000
# Prompts that are shown as a template writes them.
SHOWN_PROMPTS = 3

# The lower end of the cost range assumes answers of a tenth of max_tokens. The upper end can't be exceeded.
SHORT_ANSWER_SHARE = 0.1

# Bytes of a listed log-probability: of the answer as received, which the journal holds until it is sealed,
# and of both columns of a sealed shard. Measured on 400 answers of the mock teacher: 68 and 18 with 5
# alternatives to a token, 62 and 14 with 20.
RECEIVED_LOGPROB_BYTES = 68
SEALED_LOGPROB_BYTES = 18

# Arrow's types of the columns of `_Rows`, by type code of their array.
_ARROW_TYPES = {"Q": "uint64", "q": "int64", "b": "int8"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts, tokens, money and time of a run that has not started.

    Attributes:
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

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for --json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        to_send = self.rows - self.cached - self.duplicates
        lines = [
            f"rows      {self.rows:,}: {self.cached:,} held already, {self.duplicates:,} share a request, "
            f"{to_send:,} to send",
            f"tokens    about {self.input_tokens:,} in ({self.input_basis}), at most "
            f"{self.max_output_tokens:,} out",
        ]
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


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over the rows of a plan; tokens and micro-USD are those of the requests that would be sent.

    `saved_tokens` are the prompt tokens that requests for several rows send once.
    """

    rows: int
    cached: int
    duplicates: int
    requests: int
    saved_tokens: int
    input_tokens: int
    max_output_tokens: int
    low_microusd: int
    high_microusd: int

    @property
    def to_send(self) -> int:
        """Rows that would be asked."""
        return self.rows - self.cached - self.duplicates


class _PromptReading:
    """The prompts of a plan as they are read, and what is to be said of them.

    Attributes:
        bad: lines that can't be used.
        notes: what the operator should know.
        screen: decides which prompts are skipped.
    """

    def __init__(self, config: HarvestConfig, root: Path) -> None:
        self._prompts, self._root = config.prompts, root
        self._rules = rules_of(config.prompts, root)
        self._ids = DuplicateIds()
        self.bad = BadLines(config.prompts.max_bad)
        self._own = OwnPrompts(config)
        self.notes, self.screen = PromptNotes(), PromptScreen(config, root, self._rules)

    def prompts(self) -> Iterator[Prompt]:
        """Yield every prompt of this shard, also those that are skipped."""
        for prompt in reader.read(self._prompts.files, self._root, self.bad, rules=self._rules):
            self._ids.note(prompt)
            is_skipped = self.screen.is_skipped(prompt)
            if prompt not in self._own:
                continue
            if not is_skipped:
                self.notes.add(prompt)
            yield prompt

    def end(self) -> None:
        """Refuse two different prompts with one id, once all were read.

        Raises:
            PromptError: names both places.
        """
        self.screen.close()
        self._ids.require_unique(self._again)

    def first_prompts(self) -> tuple[str, ...]:
        """Return what the template writes from the first rows; nothing without a template."""
        if self._rules.template is None:
            return ()
        first = itertools.islice(self._again(), SHOWN_PROMPTS)
        return tuple(str(prompt.messages[0]["content"]) for prompt in first)

    def _again(self) -> Iterator[Prompt]:
        bad = BadLines(self._prompts.max_bad)
        return reader.read(self._prompts.files, self._root, bad, rules=self._rules)


class _Rows:
    """The rows of a plan as columns of numbers: 57 bytes a row to send, whatever its text.

    Equal requests are found at the end, by 64-bit digests of their keys.
    """

    def __init__(self) -> None:
        self._rows = self._cached = 0
        self._columns = {
            "key": array("Q"),
            "requests": array("q"),
            "saved": array("q"),
            "input": array("q"),
            "output": array("q"),
            "low": array("q"),
            "high": array("q"),
            "skipped": array("b"),
        }

    def add_held(self) -> None:
        """Count one row whose answer the store holds."""
        self._rows += 1
        self._cached += 1

    def add(
        self, request: Request, config: HarvestConfig, *, is_joined: bool, is_skipped: bool = False
    ) -> None:
        """Count one row to send, or to skip. `is_joined`: its prompt is paid with the row before it."""
        self._rows += not is_skipped
        input_tokens = 0 if is_joined else request.input_tokens
        values = (
            int.from_bytes(request.key[:8], "little"),
            0 if is_joined else 1,
            request.input_tokens - input_tokens,
            input_tokens,
            request.output_tokens,
            _low_microusd(input_tokens, request.output_tokens, config.teacher.price),
            cost_microusd(config.teacher.price, input_tokens, request.output_tokens),
            is_skipped,
        )
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def totals(self) -> tuple[_Totals, _Totals]:
        """Sum up the rows that are asked, and those that skipping saves. Of equal requests one is sent."""
        import pyarrow as pa
        import pyarrow.compute as pc

        arrays = [
            pa.Array.from_buffers(
                pa.type_for_alias(_ARROW_TYPES[column.typecode]),
                len(column),
                [None, pa.py_buffer(column)],
            )
            for column in self._columns.values()
        ]
        table = pa.table(arrays, names=list(self._columns))
        unique = table.group_by("key").aggregate([(name, "min") for name in self._columns if name != "key"])
        totals = []
        for skipped in (0, 1):  # a request that is also made for a prompt that is asked saves nothing
            chosen = unique.filter(pc.equal(unique["skipped_min"], skipped))
            sums = {
                name: pc.sum(chosen[f"{name}_min"]).as_py() or 0
                for name in self._columns
                if name not in {"key", "skipped"}
            }
            to_send = chosen.num_rows
            asked = to_send if skipped else pc.sum(pc.equal(table["skipped"], 0)).as_py() or 0
            totals.append(
                _Totals(
                    rows=to_send if skipped else self._rows,
                    cached=0 if skipped else self._cached,
                    duplicates=asked - to_send,
                    requests=sums["requests"],
                    saved_tokens=sums["saved"],
                    input_tokens=sums["input"],
                    max_output_tokens=sums["output"],
                    low_microusd=sums["low"],
                    high_microusd=sums["high"],
                )
            )
        return totals[0], totals[1]


def plan(config: HarvestConfig, root: Path, verdict: gate.Verdict, *, key_note: str = "") -> Plan:
    """Read the prompts once, as a stream, and look their keys up where a store exists.

    Args:
        verdict: of the terms.
        key_note: why a run would find no usable API key, "" if it would.

    Raises:
        PromptError: the first prompt that can't be used, or two different prompts with one id.
    """
    config = _at_batch_price(config)
    reading, limit = _PromptReading(config, root), _choice_limit(config, root)
    max_n = limit.size if config.run.transport is Transport.ONLINE else 1
    totals, saved = _totals(config, root, reading, max_n, mock=verdict.mock)
    correction = token_estimate.learn(root / config.store.path, config)
    totals = _corrected(totals, correction, config.teacher.price)
    saved = _corrected(saved, correction, config.teacher.price)
    accept = _accept(config, root, totals)
    seconds, limited_by = _time(config, totals)
    priced = config.teacher.price is not None
    return Plan(
        rows=totals.rows,
        cached=totals.cached,
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
            *other_settings.unadopted_notes(root / config.store.path, config),
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
            spent = compute_spent(journal, now, teacher_id=config.teacher.teacher_id)
    return build_budget(config, limits, spent, now).as_dict()


def _choice_limit(config: HarvestConfig, root: Path) -> ChoiceLimit:
    """How many answers one request asks for, by what runs of this store have learned."""
    store = root / config.store.path
    if not sqlite.has_journal(store):
        return ChoiceLimit(config.teacher)
    with Journal.open(store, read_only=True) as journal:
        return ChoiceLimit.of(journal, config.teacher)


def _skipped(skipped: SkippedPrompts, saved: _Totals, *, priced: bool) -> Mapping[str, Any]:
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


def _totals(
    config: HarvestConfig,
    root: Path,
    reading: _PromptReading,
    max_n: int,
    *,
    mock: bool,
) -> tuple[_Totals, _Totals]:
    """Return the sums of the rows that would be asked, and of those that the screen skips.

    Only the samples that are asked in any case count as joined: how many further ones `[accept]` asks at once
    depends on the answers.
    """
    store = root / config.store.path
    rows = _Rows()
    feed = requests(reading.prompts(), config, range(config.most_samples))
    with contextlib.ExitStack() as stack:
        journal = None
        reuse = ReuseIndex(config.teacher.key_name)
        if sqlite.has_journal(store):
            journal = stack.enter_context(Journal.open(store, read_only=True))
            reuse = ReuseIndex.of(journal, config)
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
                is_joined = (
                    first is not None
                    and joined < max_n
                    and request.sample_index < config.first_samples
                    and may_join(first, request)
                )
                first, joined = (first, joined + 1) if is_joined else (request, 1)
                rows.add(request, config, is_joined=is_joined, is_skipped=is_skipped)
    reading.end()
    return rows.totals()


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


def _accept(config: HarvestConfig, root: Path, totals: _Totals) -> Mapping[str, float | None]:
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


def _accept_text(accept: Mapping[str, float | None]) -> str:
    rate, rows, usd = (accept[name] for name in ("pass_rate", "rows_expected", "usd_expected"))
    if rate is None or rows is None:
        return "rows, tokens and cost are the most it may ask; no stored answer shows how many to expect"
    cost = "" if usd is None else f", up to ${usd:,.4f}"
    return (
        f"rows, tokens and cost are the most it may ask; expected are about {rows:,.0f} rows in all{cost} "
        f"({rate:.1%} of the stored first answers pass)"
    )


def _corrected(totals: _Totals, correction: InputCorrection, price: PriceSection | None) -> _Totals:
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


def _logprob_bytes(totals: _Totals, top: int) -> Mapping[str, int]:
    """Return the most bytes that log-probabilities take; empty where none are asked for."""
    listed = totals.max_output_tokens * (1 + top)  # the generated token, too
    sizes = {"received": listed * RECEIVED_LOGPROB_BYTES, "sealed": listed * SEALED_LOGPROB_BYTES}
    return sizes if top else {}


def _low_microusd(input_tokens: int, output_tokens: int, price: PriceSection | None) -> int:
    """Return the cost of a request with a short answer; prices are USD per million tokens."""
    if price is None:
        return 0
    return round(input_tokens * price.input + output_tokens * SHORT_ANSWER_SHARE * price.output)


def _time(config: HarvestConfig, totals: _Totals) -> tuple[float | None, str]:
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
