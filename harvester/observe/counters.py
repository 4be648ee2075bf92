"""A pass in numbers: its ceilings, its counters and latencies, its ending. Plain values that add up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from harvester.errors import Ending

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
"""Upper edges of the histogram cells; both are those OpenTelemetry's GenAI conventions advise."""


MOST_MODELS = 20
OTHER_MODELS = "others"


@dataclass(slots=True)
class Tally:
    """What one pass has done so far.

    `rows` are requests taken from the feed; each ends as exactly one of from_cache, duplicates,
    answers_stored and dead, or is still open. `requests_sent` counts attempts on the wire.
    """

    rows: int = 0
    from_cache: int = 0
    duplicates: int = 0
    requests_sent: int = 0
    answers_stored: int = 0
    dead: int = 0
    possibly_billed: int = 0
    refunded: int = 0
    rate_limited: int = 0
    retries: int = 0
    repeated_ids: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    voices: dict[str, int] = field(default_factory=dict)
    latency_sum_s: float = 0.0
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_EDGES_S) + 1))
    input_token_counts: list[int] = field(default_factory=lambda: [0] * (len(TOKEN_EDGES) + 1))
    output_token_counts: list[int] = field(default_factory=lambda: [0] * (len(TOKEN_EDGES) + 1))

    def note_answer(self, latency_s: float, input_tokens: int, output_tokens: int) -> None:
        """Count one answer into the three histograms and their sums."""
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.latency_sum_s += latency_s
        self.latency_counts[bisect_left(LATENCY_EDGES_S, latency_s)] += 1
        self.input_token_counts[bisect_left(TOKEN_EDGES, input_tokens)] += 1
        self.output_token_counts[bisect_left(TOKEN_EDGES, output_tokens)] += 1

    def note_voice(self, voice: str) -> bool:
        """Count one answer by the model and build it names; True when these are not the first one's."""
        known = voice if voice in self.voices or len(self.voices) < MOST_MODELS else OTHER_MODELS
        self.note(self.voices, known)
        return known != next(iter(self.voices))

    def note(self, cells: dict[str, int], name: str) -> None:
        """Count one of `outcomes` or `errors`."""
        cells[name] = cells.get(name, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def merge(tallies: list[Tally]) -> Tally:
    """The sum of several ranks' tallies."""
    total = Tally()
    for tally in tallies:
        for name, value in tally.as_dict().items():
            mine = getattr(total, name)
            if isinstance(value, int | float):
                setattr(total, name, mine + value)
            elif isinstance(value, Mapping):
                for key, count in value.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(total, name, [a + b for a, b in zip(mine, value, strict=True)])
    return total


@dataclass(frozen=True, slots=True)
class PassLimits:
    """Ceilings of one pass, beside those of the configuration; None is no ceiling.

    `rows` bounds the requests that are newly sent; `grace_s` is how long what is on the wire may take
    after a stop, because it is paid for.
    """

    rows: int | None = None
    usd: float | None = None
    tokens: int | None = None
    runtime_s: float | None = None
    grace_s: float = 25.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pass at one instant. Counts as in Tally; `why` says what holds the next request back."""

    rows: int = 0
    from_cache: int = 0
    duplicates: int = 0
    requests_sent: int = 0
    answers_stored: int = 0
    dead: int = 0
    possibly_billed: int = 0
    refunded: int = 0
    rate_limited: int = 0
    retries: int = 0
    repeated_ids: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    voices: Mapping[str, int] = field(default_factory=dict)
    latency_sum_s: float = 0.0
    latency_counts: tuple[int, ...] = ()
    input_token_counts: tuple[int, ...] = ()
    output_token_counts: tuple[int, ...] = ()
    in_flight: int = 0
    window: int = 0
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PassResult:
    """How a pass ended, what it did, and why."""

    ending: Ending
    counts: Snapshot
    detail: str = ""


def snapshot(tally: Tally, *, in_flight: int = 0, window: int = 0, why: str = "") -> Snapshot:
    """A frozen copy of the counters, with the state of the limiter beside them."""
    values = tally.as_dict()
    for name in ("latency_counts", "input_token_counts", "output_token_counts"):
        values[name] = tuple(values[name])
    return Snapshot(**values, in_flight=in_flight, window=window, why=why)
