"""What an operator may pull while a pass lives: hold it, let it go on, change its limits and its budget.

Changes hold for the pass that lives; the configuration file stays what it is. Everything here runs on the
event loop of the pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from harvester.errors import ConfigError
from harvester.teacher.endpoints import Endpoints
from harvester.teacher.limits import LEARNED_REQUESTS, REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE, LimitKey
from harvester.teacher.policies import require_rate_within_patience

SETTABLE = ("max-concurrency", "rpm", "tpm", "budget")
_LIMITS = {"rpm": REQUESTS_PER_MINUTE, "tpm": TOKENS_PER_MINUTE}
MOST_CONCURRENCY = 100_000
MOST_BUDGET = 1e12
_AMOUNT = re.compile(r"(\$?)([\d_,]*\.?\d+)\s*(usd|tokens)?\Z", re.IGNORECASE)


class RuntimeSettings:
    """The levers of one pass.

    Args:
        endpoints: the endpoints whose limits, budget and holds are changed.
        widen: tells the pass how many may be in flight, so that it has as many workers.
    """

    def __init__(self, endpoints: Endpoints, widen: Callable[[int], None]) -> None:
        self._endpoints = endpoints
        self._widen = widen
        self._holds: dict[str, str] = {}

    def hold(self, who: str, why: str) -> None:
        """Admit nobody; what is on the wire is awaited. Several may hold; all must let go."""
        self._holds[who] = why
        self._apply()

    def release(self, who: str) -> None:
        """Let go; a hold that isn't there is no error."""
        self._holds.pop(who, None)
        self._apply()

    def _apply(self) -> None:
        why = "; ".join(self._holds.values())
        for queue in self._endpoints.queues:
            if queue.hold_reason != why:
                queue.hold(why)

    @property
    def holds(self) -> Mapping[str, str]:
        """Who holds the pass, and why."""
        return self._holds

    def set(self, name: str, text: str) -> str:
        """Change a limit of the living pass; returns what is true now, in words.

        Raises:
            ConfigError: no such name, or a value it can't take; nothing was changed.
        """
        if name == "max-concurrency":
            said = self._set_concurrency(text)
        elif name in _LIMITS:
            said = self._set_rate(name, text)
        elif name == "budget":
            said = self._set_budget(text)
        else:
            raise ConfigError(f"can't set {name!r}", remedy=f"one of {', '.join(SETTABLE)}")
        self._endpoints.recheck()
        return said

    def _set_concurrency(self, text: str) -> str:
        number = _number(text, "max-concurrency")
        if number != int(number) or not 1 <= number <= MOST_CONCURRENCY:
            raise ConfigError(
                f"max-concurrency is a whole number from 1 to {MOST_CONCURRENCY:,}, not {text}",
                remedy="as in `harvester set STORE max-concurrency 64`",
            )
        self._widen(int(number))
        for queue in self._endpoints.queues:
            queue.limiter.window.set_ceiling(int(number))
        return f"max-concurrency is {int(number):,}"

    def _set_rate(self, name: str, text: str) -> str:
        queues, now = self._endpoints.queues, self._endpoints.policies.clock.now()
        if text == "none":
            for queue in queues:
                queue.limiter.set_rate(_LIMITS[name], None, now)
            return f"{name} has no configured limit"
        value = _number(text, name)
        if value <= 0:
            raise ConfigError(f"{name} must be more than 0", remedy="`harvester pause` sends nothing at all")
        require_rate_within_patience(name, value, len(queues), self._endpoints.policies.patience_s)
        for queue in queues:  # the limit belongs to the credential: each address has its part
            queue.limiter.set_rate(_LIMITS[name], value / 60 / len(queues), now)
        return f"{name} is {value:,.10g}"

    def _set_budget(self, text: str) -> str:
        budget, price = self._endpoints.policies.budget, self._endpoints.policies.price
        match = _AMOUNT.match(text.strip())
        if match is None or (match[1] and (match[3] or "usd").lower() != "usd"):
            raise ConfigError(f"{text!r} is not a budget", remedy="as in 12.50, $12.50, or 3000000tokens")
        value = float(match[2].replace(",", "").replace("_", ""))
        if not value < MOST_BUDGET:
            raise ConfigError(
                f"a budget is less than {MOST_BUDGET:.0e}", remedy="as in 12.50 or 3000000tokens"
            )
        tokens, microusd = budget.ceilings
        if (match[3] or "").lower() == "tokens":
            budget.ceilings = (int(value), microusd)
            return f"the budget of this run is {int(value):,} tokens"
        if price is None:
            raise ConfigError(
                "a budget in USD needs [teacher.price]", remedy="give it in tokens, as in 3000000tokens"
            )
        budget.ceilings = (tokens, int(value * 1_000_000))
        return f"the budget of this run is ${value:,.2f}"

    def gauges(self) -> dict[str, Any]:
        """Limits and budget as they are now.

        `limits`: units per minute over all addresses, None where no limit is known. `budget`: ceilings (None:
        none), what was spent, and what requests in flight have reserved.
        """
        rates: dict[LimitKey, float] = {}
        for queue in self._endpoints.queues:
            for key, bucket in queue.limiter.buckets.items():
                rates[key] = rates.get(key, 0.0) + bucket.rate * 60
        requests = [rates[key] for key in (REQUESTS_PER_MINUTE, LEARNED_REQUESTS) if key in rates]
        budget = self._endpoints.policies.budget
        return {
            "limits": {
                "requests_per_minute": min(requests, default=None),
                "tokens_per_minute": rates.get(TOKENS_PER_MINUTE),
                "max_concurrency": int(max(queue.limiter.window.ceiling for queue in self._endpoints.queues)),
                "by_name": {key.label: rate for key, rate in rates.items()},
            },
            "budget": {
                "tokens": budget.ceilings[0],
                "microusd": budget.ceilings[1],
                "tokens_spent": budget.spent[0],
                "microusd_spent": budget.spent[1],
                "tokens_reserved": budget.reserved[0],
                "microusd_reserved": budget.reserved[1],
            },
        }


def _number(text: str, name: str) -> float:
    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"{text!r} is not a number for {name}", remedy=f"as in `harvester set STORE {name} 600`"
        )
    return value
