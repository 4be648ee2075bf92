"""Declare every counter of a run once: its meaning, its unit and its name in each published format.

`Counters` holds what a pass counts. The `Metric` beside each field says where else the field is published;
harvester/observe/metrics.py derives all those tables from it. A new counter is one new field here.
"""

from __future__ import annotations

import functools
import typing
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from enum import Flag, StrEnum, auto
from typing import Annotated, Any

from harvester.api.types import UNUSABLE
from harvester.config.budget_spans import BudgetSpan
from harvester.errors import Ending

# Upper edges of the histogram cells, in seconds and in tokens, as OpenTelemetry's GenAI conventions advise.
# One more cell holds the values above the last edge.
LATENCY_EDGES_S = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
)
TOKEN_EDGES = tuple(4**power for power in range(14))

# At most this many model names are counted by name; answers of further ones are counted as `OTHER_MODELS`.
MOST_MODELS = 20
# Answers with the text of one to another prompt are pointed out from these on.
FEWEST_REPEATED_TEXTS, REPEATED_SHARE = 10, 0.2
OTHER_MODELS = "others"


class Kind(StrEnum):
    """The shape of a published value."""

    COUNTER = "counter"  # a number that only grows during a run
    GAUGE = "gauge"  # a number as it is now
    COUNTS = "counts by name"  # an object: name -> number that only grows
    HISTOGRAM = "histogram"  # a list: values counted by cell
    TEXT = "text"


class Shown(Flag):
    """Where a counter is shown beside status.json."""

    NOWHERE = 0
    SUMMARY = auto()  # the result of `run --json`, and run.json
    PROGRESS = auto()  # the progress records of JSON logs
    CANARY = auto()  # `canary` in status.json, there for the canaries' own requests


RUN = Shown.SUMMARY | Shown.PROGRESS
RUN_AND_CANARY = RUN | Shown.CANARY


@dataclass(frozen=True, slots=True)
class Metric:
    """What a published value means and what other formats call it; an empty name means: not published there.

    Attributes:
        help: one phrase for HELP texts, OpenTelemetry descriptions and data/FORMAT.md.
        unit: UCUM, as OpenTelemetry writes it: `s`, `By`, `{row}`.
        status: its name in status.json, `outer.inner` inside another object; default: the name of the field.
        trace: its column in trace.jsonl.
        shown: in which other places it is shown, by its status name.
        prometheus: its name there without `harvester_`; a name that ends in `_total` is a counter.
        labels: constant Prometheus labels, for fields that share a name.
        otel: its OpenTelemetry name.
        attributes: constant OpenTelemetry attributes, for fields that share a name.
        by: the attribute that holds the name of each of `COUNTS`.
        family: help text of a name that several fields share.
        edges: upper edges of the cells of a `HISTOGRAM`.
        total: the field that holds the sum of its values.
    """

    help: str
    unit: str
    kind: Kind = Kind.COUNTER
    status: str = ""
    trace: str = ""
    shown: Shown = Shown.NOWHERE
    prometheus: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    otel: str = ""
    attributes: tuple[tuple[str, str], ...] = ()
    by: str = ""
    family: str = ""
    edges: Sequence[float] = ()
    total: str = ""


def _row(
    ending: str, help: str, unit: str = "{row}", *, trace: str = "", shown: Shown, otel: str = ""
) -> Metric:
    """A counter of rows that ended; Prometheus has one gauge for all of them."""
    return Metric(
        help,
        unit,
        trace=trace,
        shown=shown,
        prometheus="rows_done",
        labels=(("ending", ending),),
        otel=otel,
        family="Rows of this run with an ending, by ending.",
    )


def _usage(side: str) -> Metric:
    """The histogram of the tokens of one side, `input` or `output`."""
    return Metric(
        f"Answers by {side} tokens.",
        "{token}",
        Kind.HISTOGRAM,
        prometheus="usage_tokens",
        labels=(("type", side),),
        otel="gen_ai.client.token.usage",
        attributes=(("gen_ai.token.type", side),),
        family="Tokens of an answer, by type.",
        edges=TOKEN_EDGES,
        total=f"{side}_tokens",
    )


def _cells(edges: Sequence[float]) -> list[int]:
    return [0] * (len(edges) + 1)


@dataclass(slots=True)
class Counters:
    """What one pass has done so far.

    `rows` are requests taken from the feed. Each ends as exactly one of `from_cache`, `duplicates`,
    `answers_stored` and `dead`, or is still open.
    """

    rows: Annotated[int, Metric("Rows taken from the prompts.", "{row}")] = 0
    from_cache: Annotated[
        int, _row("cached", "Rows whose answer was already stored.", trace="cached", shown=RUN)
    ] = 0
    duplicates: Annotated[
        int, _row("duplicate", "Rows that share the answer of an equal request.", shown=RUN)
    ] = 0
    requests_sent: Annotated[
        int,
        Metric(
            "Attempts put on the wire.",
            "{attempt}",
            trace="sent",
            shown=RUN_AND_CANARY,
            otel="harvester.attempts",
        ),
    ] = 0
    answers_stored: Annotated[
        int,
        _row(
            "answered",
            "Answers that are durable.",
            "{answer}",
            trace="stored",
            shown=RUN_AND_CANARY,
            otel="harvester.answers",
        ),
    ] = 0
    dead: Annotated[
        int,
        _row(
            "failed", "Rows that will get no answer.", trace="dead", shown=RUN, otel="harvester.failed_rows"
        ),
    ] = 0
    answers_early: Annotated[
        int,
        Metric(
            "Answers of batches whose rows this run had not read from the prompts.", "{answer}", shown=RUN
        ),
    ] = 0
    taken_back: Annotated[
        int,
        Metric(
            "Answers of an address that was put aside, taken out of the store; their rows are asked again.",
            "{answer}",
            shown=RUN,
            prometheus="taken_back_total",
        ),
    ] = 0
    possibly_billed: Annotated[
        int,
        Metric(
            "Attempts that may have been billed without an answer; one with n counts once for each answer.",
            "{attempt}",
            shown=RUN_AND_CANARY,
        ),
    ] = 0
    refunded: Annotated[
        int, Metric("Attempts that were not billed, their reservation returned.", "{attempt}")
    ] = 0
    rate_limited: Annotated[
        int, Metric("Attempts refused for the rate.", "{attempt}", trace="limited", shown=Shown.PROGRESS)
    ] = 0
    retries: Annotated[
        int,
        Metric("Attempts after the first of their row.", "{attempt}", trace="retries", shown=Shown.PROGRESS),
    ] = 0
    requests_joined: Annotated[
        int,
        Metric("Requests for several answers (n) that were answered.", "{request}", shown=Shown.SUMMARY),
    ] = 0
    answers_joined: Annotated[
        int, Metric("Answers that came in such requests.", "{answer}", shown=Shown.SUMMARY)
    ] = 0
    choices_missing: Annotated[
        int,
        Metric("Answers that a request with n was short of; asked again.", "{answer}", shown=Shown.SUMMARY),
    ] = 0
    choices_surplus: Annotated[
        int,
        Metric(
            "Choices beyond those asked for, or with an index that came before; paid and not stored.",
            "{answer}",
            shown=Shown.SUMMARY,
        ),
    ] = 0
    accepted: Annotated[
        int, Metric("Rows of [accept] whose answers passed their verifier.", "{row}", shown=RUN)
    ] = 0
    rejected: Annotated[
        int, Metric("Rows of [accept] whose answers failed their verifier.", "{row}", shown=RUN)
    ] = 0
    unverifiable: Annotated[
        int, Metric("Rows of [accept] whose answers no verifier could judge.", "{row}", shown=RUN)
    ] = 0
    usage_corrected: Annotated[
        int,
        Metric(
            "Answers whose reported tokens are fewer than their texts hold; our count was charged.",
            "{answer}",
            shown=Shown.SUMMARY,
            prometheus="usage_corrected_total",
        ),
    ] = 0
    repeated_ids: Annotated[int, Metric("Answers that carry the id of an earlier one.", "{answer}")] = 0
    repeated_texts: Annotated[
        int, Metric("Answers with the text, 40 characters or more, of one to another prompt.", "{answer}")
    ] = 0
    input_tokens: Annotated[
        int,
        Metric("Input tokens of the answers stored.", "{token}", trace="input_tokens", shown=Shown.PROGRESS),
    ] = 0
    output_tokens: Annotated[
        int,
        Metric(
            "Output tokens of the answers stored.", "{token}", trace="output_tokens", shown=Shown.PROGRESS
        ),
    ] = 0
    cost_microusd: Annotated[
        int,
        Metric(
            "Cost of rows at the configured price.",
            "uUSD",
            trace="microusd",
            shown=RUN_AND_CANARY,
            otel="harvester.cost",
        ),
    ] = 0
    outcomes: Annotated[
        dict[str, int], Metric("Answers by outcome.", "{answer}", Kind.COUNTS, shown=Shown.SUMMARY)
    ] = field(default_factory=dict)
    cached_outcomes: Annotated[
        dict[str, int],
        Metric(
            "Rows whose answer was already stored, by outcome.", "{row}", Kind.COUNTS, shown=Shown.SUMMARY
        ),
    ] = field(default_factory=dict)
    errors: Annotated[
        dict[str, int],
        Metric(
            "Attempts without an answer, by error code.",
            "{attempt}",
            Kind.COUNTS,
            trace="errors",
            shown=Shown.PROGRESS,
            otel="harvester.attempt.errors",
            by="error.type",
        ),
    ] = field(default_factory=dict)
    served_models: Annotated[
        dict[str, int],
        Metric("Answers by the model and build they name.", "{answer}", Kind.COUNTS, status="voices"),
    ] = field(default_factory=dict)
    latency_sum_s: Annotated[float, Metric("Sum of the latencies of the answers.", "s")] = 0.0
    latency_counts: Annotated[
        list[int],
        Metric(
            "Send to last byte of the attempts that answered.",
            "s",
            Kind.HISTOGRAM,
            prometheus="request_duration_seconds",
            otel="gen_ai.client.operation.duration",
            edges=LATENCY_EDGES_S,
            total="latency_sum_s",
        ),
    ] = field(default_factory=lambda: _cells(LATENCY_EDGES_S))
    input_token_counts: Annotated[list[int], _usage("input")] = field(
        default_factory=lambda: _cells(TOKEN_EDGES)
    )
    output_token_counts: Annotated[list[int], _usage("output")] = field(
        default_factory=lambda: _cells(TOKEN_EDGES)
    )

    def note_request(self, latency_s: float) -> None:
        """Count one request that was answered, by its latency."""
        self.latency_sum_s += latency_s
        self.latency_counts[bisect_left(LATENCY_EDGES_S, latency_s)] += 1

    def note_answer(self, input_tokens: int, output_tokens: int) -> None:
        """Count the tokens of one answer."""
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.input_token_counts[bisect_left(TOKEN_EDGES, input_tokens)] += 1
        self.output_token_counts[bisect_left(TOKEN_EDGES, output_tokens)] += 1

    def note_model(self, model: str) -> bool:
        """Count one answer by the model and build it names; True when the first answer named another."""
        is_counted = model in self.served_models or len(self.served_models) < MOST_MODELS
        name = model if is_counted else OTHER_MODELS
        self.note(self.served_models, name)
        return name != next(iter(self.served_models))

    def note(self, counts: dict[str, int], name: str) -> None:
        """Add one to a name of `outcomes` or `errors`."""
        counts[name] = counts.get(name, 0) + 1

    def unusable(self) -> dict[str, int]:
        """Return rows of this run, answered now or before, whose answers are not usable, by outcome."""
        return unusable(self.outcomes, self.cached_outcomes)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, by their names in status.json."""
        values = _values(self)
        return {metric.status: values[name] for name, metric in declared(type(self)).items()}

    def summary(self) -> dict[str, Any]:
        """Return the counters that the result of a run holds (`run --json`, run.json)."""
        return self._shown_in(Shown.SUMMARY)

    def of_canaries(self) -> dict[str, Any]:
        """Return the counters that `canary` in status.json holds, if these are of the canaries' requests."""
        return self._shown_in(Shown.CANARY)

    def _shown_in(self, place: Shown) -> dict[str, Any]:
        values = self.as_dict()
        return {m.status: values[m.status] for m in declared(type(self)).values() if place in m.shown}


@dataclass(slots=True)
class Snapshot(Counters):
    """A copy of the counters at one instant, with the state of the limiter. Nobody changes it."""

    in_flight: Annotated[
        int,
        Metric(
            "Requests on the wire.",
            "{request}",
            Kind.GAUGE,
            trace="in_flight",
            shown=Shown.PROGRESS,
            prometheus="in_flight_requests",
            otel="harvester.requests.in_flight",
        ),
    ] = 0
    window: Annotated[
        int,
        Metric(
            "Requests allowed on the wire at once.",
            "{request}",
            Kind.GAUGE,
            trace="window",
            shown=Shown.PROGRESS,
            prometheus="window_requests",
            otel="harvester.requests.window",
        ),
    ] = 0
    waiting: Annotated[
        str,
        Metric(
            "What holds the next request back; '' for nothing.",
            "",
            Kind.TEXT,
            trace="waiting",
            shown=Shown.PROGRESS,
        ),
    ] = ""


def unusable(*counts: Mapping[str, int]) -> dict[str, int]:
    """Return how many of these answers are empty, invalid, filtered, refused or unknown, by outcome."""
    sums = {outcome.value: sum(each.get(outcome, 0) for each in counts) for outcome in UNUSABLE}
    return {name: count for name, count in sums.items() if count}


def unusable_held(counts: Mapping[str, int], held: int | None) -> tuple[int, dict[str, int]]:
    """Return how many answers of a store are not usable at most, and how many by outcome.

    Args:
        counts: answers by outcome.
        held: how many answers are stored; None for all of `counts`. Where they are fewer, some were lost or
            purged whose outcome is not known: then nothing is returned by outcome.
    """
    by_outcome = unusable(counts)
    most = sum(by_outcome.values())
    if held is not None and sum(counts.values()) > held:
        return min(most, held), {}
    return most, by_outcome


def unusable_share(counts: Mapping[str, int], held: int | None) -> tuple[str, str]:
    """Say how many answers of a store are not usable, and how many by outcome; "" where none is or may be.

    Args:
        counts, held: as of `unusable_held`.
    """
    most, by_outcome = unusable_held(counts, held)
    answers = sum(counts.values()) if held is None else held
    if not most or not answers:
        return "", ""
    if not by_outcome:
        return f"at most {most:,} of {answers:,}", ""
    return f"{most:,} of {answers:,}", ", ".join(f"{count:,} {name}" for name, count in by_outcome.items())


def are_texts_repeated(repeated: int, answers: int) -> bool:
    """Whether more answers have the text of one to another prompt than a few equal prompts explain."""
    return repeated >= FEWEST_REPEATED_TEXTS and repeated >= REPEATED_SHARE * answers


def several_text(counts: Mapping[str, Any]) -> str:
    """Say what requests for several answers (`n`) brought; "" where there were none.

    Args:
        counts: by their names in status.json.
    """
    answers, requests = counts.get("answers_joined", 0), counts.get("requests_joined", 0)
    missing, surplus = counts.get("choices_missing", 0), counts.get("choices_surplus", 0)
    if not requests:
        return ""
    notes = [f"{missing:,} were short of what was asked, and asked again"] if missing else []
    notes += [f"{surplus:,} came beyond what was asked, and are paid but not kept"] if surplus else []
    return "; ".join([f"{answers:,} answers came in {requests:,} requests for several", *notes])


def judged_text(counts: Mapping[str, Any]) -> str:
    """Say how many answers [accept] judged and how; "" where it judged none. `counts` as above."""
    accepted, rejected = counts.get("accepted", 0), counts.get("rejected", 0)
    unverifiable = counts.get("unverifiable", 0)
    if not (judged := accepted + rejected + unverifiable):
        return ""
    return (
        f"accepted {accepted:,} of {judged:,} answers: {rejected:,} failed, "
        f"{unverifiable:,} could not be verified"
    )


def declared(counters: type[Counters]) -> dict[str, Metric]:
    """Return the metrics of a class of counters by field, in their order, each with its status name."""
    # mypy takes no dataclass with `__eq__` for hashable, not even the class itself.
    return _declared(counters)  # type: ignore[arg-type]


@functools.cache
def _declared(counters: type[Counters]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for name, annotation in typing.get_type_hints(counters, include_extras=True).items():
        for metric in typing.get_args(annotation)[1:]:
            metrics[name] = replace(metric, status=metric.status or name)
    return metrics


def _values(counters: Counters) -> dict[str, Any]:
    """Copy the fields, and the counts in their dicts and lists; five times as fast as `asdict`."""
    values = {each.name: getattr(counters, each.name) for each in fields(counters)}
    return {name: copy(value) if isinstance(value, dict | list) else value for name, value in values.items()}


def snapshot(counters: Counters, *, in_flight: int = 0, window: int = 0, waiting: str = "") -> Snapshot:
    """Return a copy of the counters, with the state of the limiter."""
    return Snapshot(**_values(counters), in_flight=in_flight, window=window, waiting=waiting)


@dataclass(frozen=True, slots=True)
class PassLimits:
    """Ceilings of one pass, in addition to those of the configuration; None is no ceiling.

    `rows` bounds the requests that are newly sent. `grace_s` is how long requests on the wire may take after
    a stop, because they are paid for. `budget_span` is the span for which `usd` and `tokens` hold, here and
    in [budget]. `shared_since`: runs that were active then or later count as one run, in
    Unix seconds.
    """

    rows: int | None = None
    usd: float | None = None
    tokens: int | None = None
    runtime_s: float | None = None
    grace_s: float = 25.0
    budget_span: BudgetSpan = BudgetSpan.RUN
    shared_since: float | None = None


@dataclass(frozen=True, slots=True)
class PassResult:
    """How a pass ended, what it did, and why."""

    ending: Ending
    counts: Snapshot
    detail: str = ""
