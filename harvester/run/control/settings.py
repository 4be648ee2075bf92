"""Control a run: pause it, resume it, change its limits and its budget.

Changes last until the run ends; the configuration file stays as it is. Everything here runs on the event loop
of the pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harvester.config.budget_spans import BudgetSpan
from harvester.errors import ConfigError
from harvester.teacher.budget import SPAN_NAMES, Budget
from harvester.teacher.choice_limit import ChoiceLimit
from harvester.teacher.endpoints import Endpoints
from harvester.teacher.limiter.limits import REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE, LimitKey
from harvester.teacher.policies import require_rate_within_patience

_BUDGETS = {
    "budget": BudgetSpan.RUN,
    "budget-store": BudgetSpan.STORE,
    "budget-day": BudgetSpan.DAY,
    "budget-month": BudgetSpan.MONTH,
}
SETTABLE = ("max-concurrency", "rpm", "tpm", *_BUDGETS)
MOST_CONCURRENCY = 100_000

# In USD or tokens: a larger number is a slip of the pen.
MOST_BUDGET = 1e12

_LIMITS = {"rpm": REQUESTS_PER_MINUTE, "tpm": TOKENS_PER_MINUTE}
_AMOUNT = re.compile(r"(\$?)([\d_,]*\.?\d+)\s*(usd|tokens)?\Z", re.IGNORECASE)
# A comma may only separate groups of three digits: elsewhere it may be meant as a decimal point.
_GROUPED = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d*)?|[^,]*")


@dataclass(frozen=True, slots=True)
class BudgetValue:
    """A budget as an operator writes it: dollars, or tokens."""

    amount: float
    in_tokens: bool


class RunControl:
    """Pauses of one run and, during its pass, its settings. It exists before the pass and after it.

    Several sources may pause at once (operator, schedule, drift); the run goes on when all have resumed.
    """

    def __init__(self) -> None:
        self.settings: RuntimeSettings | None = None
        self.is_over = False
        self._pauses: dict[str, str] = {}
        self._gauges: Mapping[str, Any] = {"limits": {}, "budget": {}, "budgets": {}}

    def show_budget(self, budget: Budget) -> None:
        """Show this budget of a run that has no pass, because nothing is to be sent."""
        self._gauges = {**self._gauges, **_budget_gauges(budget)}

    def attach(self, settings: RuntimeSettings) -> None:
        """The pass begins: pause it, if anything pauses the run."""
        self.settings = settings
        self._apply()

    def detach(self) -> None:
        """The pass is over: keep its last gauges; nothing pauses any more."""
        self._gauges = self.gauges()
        self.settings = None
        self.is_over = True

    def pause(self, source: str, reason: str) -> None:
        """Send nothing new; requests in flight are awaited."""
        self._pauses[source] = reason
        self._apply()

    def resume(self, source: str) -> None:
        """Withdraw this source's pause, if there is one."""
        if self._pauses.pop(source, None) is not None:
            self._apply()

    def _apply(self) -> None:
        if self.settings is not None:
            self.settings.pause_for("; ".join(self._pauses.values()))

    @property
    def pauses(self) -> Mapping[str, str]:
        """The reason of each source that pauses the run; empty when the pass is over."""
        return {} if self.is_over else self._pauses

    def gauges(self) -> Mapping[str, Any]:
        """Limits and budget as `RuntimeSettings.gauges`; before the pass empty, after it the last ones."""
        return self._gauges if self.settings is None else self.settings.gauges()


class RuntimeSettings:
    """The limits and the budget of one pass, changeable while it runs.

    Args:
        endpoints: the endpoints whose queues, limits and budget are changed.
        choice_limit: how many answers a request asks for, as learned.
        replicas: returns the state of each endpoint, where there are several.
        cancel_batches: lets the pass cancel its batches when it ends; None where it has none.
        others: returns which other harvests share the limits; None where none can.
        is_allocated: whether a coordinator allocates limits and budget, so that nobody else may change them.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        choice_limit: ChoiceLimit,
        replicas: Callable[[], list[dict[str, Any]]],
        cancel_batches: Callable[[], None] | None = None,
        others: Callable[[], list[dict[str, Any]]] | None = None,
        *,
        is_allocated: bool = False,
    ) -> None:
        self._is_allocated = is_allocated
        self._others = others
        self._replicas = replicas
        self._endpoints = endpoints
        self._choice_limit = choice_limit
        self._cancel_batches = cancel_batches

    def pause_for(self, reason: str) -> None:
        """Admit no request for this reason; go on when it is ""."""
        for queue in self._endpoints.queues:
            if queue.hold_reason != reason:
                queue.hold(reason)

    def cancel_batches_at_end(self) -> bool:
        """Cancel batches at the provider when the pass ends; return whether there may be any."""
        if self._cancel_batches is None:
            return False
        self._cancel_batches()
        return True

    def set(self, name: str, text: str) -> str:
        """Change a limit of the pass; return a sentence that says the new value.

        Raises:
            ConfigError: unknown name or impossible value; nothing was changed.
        """
        value = parse_setting(name, text)
        if self._is_allocated:
            raise ConfigError(
                "limits and budget of this rank are allocated by its fleet",
                remedy="stop the fleet, change harvest.toml, and start it again: it goes on where it was",
            )
        if isinstance(value, BudgetValue):
            message = self._set_budget(_BUDGETS[name], value)
        elif name in _LIMITS:
            message = self._set_rate(name, value)
        else:
            message = self._set_concurrency(int(value or 1))
        self._endpoints.recheck()
        return message

    def _set_concurrency(self, number: int) -> str:
        for queue in self._endpoints.queues:
            queue.limiter.window.set_ceiling(number)
            queue.limiter.window.explain_ceiling("")  # it is the operator's now
        return f"max-concurrency is {number:,}"

    def _set_rate(self, name: str, value: float | None) -> str:
        queues, now = self._endpoints.queues, self._endpoints.policies.clock.now()
        if value is None:
            for queue in queues:
                queue.limiter.set_rate(_LIMITS[name], None, now)
            return f"{name} has no configured limit"
        require_rate_within_patience(name, value, len(queues), self._endpoints.policies.patience_s)
        for queue in queues:  # the limit belongs to the credential: each endpoint has its part
            queue.limiter.set_rate(_LIMITS[name], value / 60, now)
        return f"{name} is {value:,.10g}"

    def _set_budget(self, span: BudgetSpan, value: BudgetValue) -> str:
        budget, price = self._endpoints.policies.budget, self._endpoints.policies.price
        ceiling, name_of_span = budget.ceilings[span], SPAN_NAMES[span][0]
        if value.in_tokens:
            ceiling.set_tokens(int(value.amount))
            return f"the budget of {name_of_span} is {int(value.amount):,} tokens"
        if price is None:
            raise ConfigError(
                "a budget in USD needs [teacher.price]", remedy="give it in tokens, as in 3000000tokens"
            )
        ceiling.set_usd(value.amount)
        return f"the budget of {name_of_span} is ${value.amount:,.2f}"

    def _learned(self) -> list[str]:
        """What was learned about each endpoint; with the endpoint where there are several."""
        queues = [queue for queue in self._endpoints.queues if queue.limiter.learned]
        several = len(self._endpoints.queues) > 1
        learned = [
            (f"{queue.endpoint}: " if several else "") + ", ".join(queue.limiter.learned) for queue in queues
        ]
        if self._choice_limit.reason:
            learned.append(self._choice_limit.text())
        return learned

    def gauges(self) -> dict[str, Any]:
        """Return limits and budget as they are now.

        `limits`: units per minute over all endpoints, None where no limit is known. `budget`: ceilings
        (None for none), what was spent, and what requests in flight have reserved, of this run. `budgets`:
        the same for every span that has a ceiling, and what is left. `learned`: what was learned about each
        endpoint, in words. `replicas`: state and pace of each endpoint, where there are several. `shared`:
        which other harvests share the limits of each endpoint.
        """
        rates: dict[LimitKey, float] = {}
        for queue in self._endpoints.queues:
            for key, bucket in queue.limiter.buckets.items():
                rates[key] = rates.get(key, 0.0) + bucket.rate * 60
        per_queue = [queue.limiter.requests_per_minute for queue in self._endpoints.queues]
        requests = sum(per_queue)
        return {
            "limits": {
                "requests_per_minute": requests if requests < math.inf else None,
                "tokens_per_minute": rates.get(TOKENS_PER_MINUTE),
                "max_concurrency": int(max(queue.limiter.window.ceiling for queue in self._endpoints.queues)),
                "by_name": {key.label: rate for key, rate in rates.items()},
            },
            "learned": self._learned(),
            "replicas": self._replicas(),
            "shared": [] if self._others is None else self._others(),
            **_budget_gauges(self._endpoints.policies.budget),
        }


def _budget_gauges(budget: Budget) -> dict[str, Any]:
    """Return `budget` and `budgets` as `RuntimeSettings.gauges` describes them."""
    of_run = budget.ceilings[BudgetSpan.RUN]
    return {
        "budget": {
            "tokens": of_run.tokens,
            "microusd": of_run.microusd,
            "tokens_spent": of_run.spent[0],
            "microusd_spent": of_run.spent[1],
            "tokens_reserved": budget.reserved[0],
            "microusd_reserved": budget.reserved[1],
        },
        "budgets": budget.as_dict(),
    }


def parse_setting(name: str, text: str) -> float | BudgetValue | None:
    """Read the value of a setting as an operator writes it; None for `none`, which removes a rate limit.

    Raises:
        ConfigError: unknown name or impossible value.
    """
    if name in _BUDGETS:
        return _budget_value(text)
    if name in _LIMITS:
        value = None if text == "none" else _number(text, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be more than 0", remedy="`harvester pause` sends nothing at all")
        return value
    if name != "max-concurrency":
        raise ConfigError(f"can't set {name!r}", remedy=f"one of {', '.join(SETTABLE)}")
    number = _number(text, name)
    if number != int(number) or not 1 <= number <= MOST_CONCURRENCY:
        raise ConfigError(
            f"max-concurrency is a whole number from 1 to {MOST_CONCURRENCY:,}, not {text}",
            remedy="as in `harvester set STORE max-concurrency 64`",
        )
    return number


def _budget_value(text: str) -> BudgetValue:
    match = _AMOUNT.match(text.strip())
    if (
        match is None
        or (match[1] and (match[3] or "usd").lower() != "usd")
        or not _GROUPED.fullmatch(match[2])
    ):
        raise ConfigError(f"{text!r} is not a budget", remedy="as in 12.50, $12.50, or 3000000tokens")
    amount = float(match[2].replace(",", "").replace("_", ""))
    if not amount < MOST_BUDGET:
        raise ConfigError(f"a budget is less than {MOST_BUDGET:.0e}", remedy="as in 12.50 or 3000000tokens")
    return BudgetValue(amount, in_tokens=(match[3] or "").lower() == "tokens")


def _number(text: str, name: str) -> float:
    try:
        value = (
            float(text.replace(",", "").replace("_", "")) if _GROUPED.fullmatch(text.strip()) else math.nan
        )
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"{text!r} is not a number for {name}", remedy=f"as in `harvester set STORE {name} 600`"
        )
    return value
