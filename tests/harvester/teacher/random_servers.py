"""Draw servers at random over all families of limits, with and without headers and unrelated refusals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.harvester.teacher.simulation import (
    ConcurrencyCap,
    FixedWindow,
    Server,
    SlidingWindow,
    TokenBucket,
    ask,
)

FAMILIES = ("token bucket", "leaky bucket with a small burst", "fixed window", "sliding window", "cap")
WINDOWS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# The time in which a limit is to be found, and the time over which shares are taken: so many seconds, so many
# requests, or so many windows, whichever takes longest.
LEAST_S = 30.0
LEAST_REQUESTS = 600
LEAST_WINDOWS = 3
IN_FLIGHT = 1024


@dataclass(frozen=True, slots=True)
class Drawn:
    """A server, the rate that it grants in requests per second, and when shares are taken."""

    server: Server
    per_s: float
    begun_at: float
    ended_at: float
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Accepted over granted, and the share refused beyond the unrelated refusals."""

    share: float
    refused: float
    text: str


def draw(seed: int, *, unrelated: bool = True, families: tuple[str, ...] = FAMILIES) -> Drawn:
    """Draw a server.

    Args:
        unrelated: whether half of the servers refuse up to a tenth of the requests whatever the rate.
        families: one of these is drawn.
    """
    chance = random.Random(seed)
    family = chance.choice(families)
    more = {"latency_s": _between(chance, 0.1, 3.0), "jitter": chance.uniform(0, 0.3)}
    server, per_s, window_s = _server(family, chance, more)
    if family not in {"cap", FAMILIES[1]} and chance.random() < 0.35 and not 0 < window_s < 1:
        server.headers = _headers(server, chance)
    if isinstance(server, FixedWindow) and chance.random() < 0.3:
        server.retry_after = lambda now: max(1.0, math.ceil(server.left_s(now)))
    if unrelated:
        server.unrelated = chance.choice([0.0, chance.uniform(0, 0.1)])
        server.unrelated_wait_s = chance.choice([None, None, 1.0])
    begun_at = max(LEAST_S, LEAST_REQUESTS / per_s, LEAST_WINDOWS * window_s + 20)
    lasts_s = max(LEAST_S, LEAST_REQUESTS / per_s, LEAST_WINDOWS * window_s)
    if window_s:
        lasts_s = math.ceil(lasts_s / window_s) * window_s
    text = (
        f"seed {seed}: {family}, {per_s:.1f}/s, window {window_s:g} s, latency {server.latency_s:.2f} s, "
        f"unrelated {server.unrelated:.1%}, headers {bool(server.headers(0.0))}"
    )
    return Drawn(server, per_s, begun_at, begun_at + lasts_s, text)


def outcome(drawn: Drawn) -> Outcome:
    """Ask a server for as long as was drawn."""
    result = ask(drawn.server, until=drawn.ended_at, max_concurrency=IN_FLIGHT)
    share = result.rate(drawn.begun_at, drawn.ended_at) / drawn.per_s
    refused = result.refused(drawn.begun_at, drawn.ended_at) - drawn.server.unrelated
    return Outcome(share, refused, drawn.text)


def _between(chance: random.Random, low: float, high: float) -> float:
    """A number whose logarithm is uniform."""
    return math.exp(chance.uniform(math.log(low), math.log(high)))


def _server(family: str, chance: random.Random, more: Mapping[str, float]) -> tuple[Server, float, float]:
    """The server, its rate, and the length of its window, 0 where it has none."""
    own = random.Random(chance.random())
    if family == FAMILIES[0]:
        rate = _between(chance, 5, 200)
        return TokenBucket(own, rate, max(2.0, rate * _between(chance, 0.1, 3)), **more), rate, 0.0
    if family == FAMILIES[1]:
        rate = _between(chance, 10, 300)
        return TokenBucket(own, rate, 1 + chance.randint(2, max(3, int(rate / 5))), **more), rate, 0.0
    if family == "cap":
        slots = round(_between(chance, 1, 80))
        server = ConcurrencyCap(own, slots, **more)
        server.status = chance.choice([429, 429, 503])
        return server, slots / server.latency_s, 0.0
    window_s = chance.choice(WINDOWS_S)
    limit = max(10, round(window_s * _between(chance, 5, 100)))
    kind = FixedWindow if family == "fixed window" else SlidingWindow
    return kind(own, limit, window_s, **more), limit / window_s, window_s


def _headers(server: Server, chance: random.Random) -> Callable[[float], Mapping[str, str]]:
    """Headers as such servers send them; those of a window don't always say how long it is."""
    if isinstance(server, TokenBucket):

        def bucket(now: float) -> Mapping[str, str]:
            used = server.burst - max(0.0, server.level)
            return {
                "x-ratelimit-limit-requests": f"{server.rate * 60:.0f}",
                "x-ratelimit-remaining-requests": f"{max(0.0, server.rate * 60 - used):.0f}",
                "x-ratelimit-reset-requests": f"{max(0.001, used / server.rate):.3f}s",
            }

        return bucket
    prefix = chance.choice(["x-ratelimit", "ratelimit"])
    assert isinstance(server, FixedWindow | SlidingWindow)

    def window(now: float) -> Mapping[str, str]:
        if isinstance(server, FixedWindow):
            used, left_s = server.count, server.left_s(now)
        else:
            used, left_s = len(server.log), server.log[0] + server.window_s - now if server.log else 0.0
        policy = f";w={server.window_s:g}" if prefix == "ratelimit" else ""
        return {
            f"{prefix}-limit": f"{server.limit}{policy}",
            f"{prefix}-remaining": str(max(0, server.limit - used)),
            f"{prefix}-reset": str(math.ceil(left_s)),
        }

    return window
