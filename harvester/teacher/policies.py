"""Build the policies of one pass from its configuration: limiters, budget, retries, patience."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from harvester.config.budget_spans import BudgetSpan
from harvester.config.config import HarvestConfig
from harvester.config.teacher_section import PriceSection
from harvester.errors import ConfigError
from harvester.observe.counters import PassLimits
from harvester.system import open_files
from harvester.system.clock import Clock
from harvester.teacher.budget import NOTHING, Amounts, Budget, Ceiling
from harvester.teacher.limiter.rate_limiter import Limiter
from harvester.teacher.limiter.window import OPEN_FILES_NOTE
from harvester.teacher.retry import RetryBudget, RetryPolicy

# Seconds of the rate that a new process may send at once, beside those that pass before its first request
# departs (0.04). Together they stay below FIRST_BURST_S of `learned_burst`: the first requests open
# connections, so that they arrive late and the next ones close behind them.
START_S = 0.04


@dataclass(slots=True)
class Policies:
    """The policies of one pass.

    Attributes:
        limiters: one per endpoint, by base URL.
        weights: of the endpoints, by base URL; one that is not there has 1.
        price: None where the cost is not known.
        patience_s: longest wait for the teacher before the pass parks.
    """

    limiters: Mapping[str, Limiter]
    budget: Budget
    retry: RetryPolicy
    clock: Clock
    price: PriceSection | None = None
    patience_s: float = math.inf
    weights: Mapping[str, float] = field(default_factory=dict)


def require_rate_within_patience(
    name: str, per_minute: float, endpoints: int, patience_s: float, *, place: str = ""
) -> None:
    """Check that a limit admits a request at least every `patience_s` seconds.

    Args:
        name: of the limit, for the message.
        endpoints: how many share the limit.
        place: where the limit is set, for the message.

    Raises:
        ConfigError: the run would park after every request.
    """
    every_s = 60 * endpoints / per_minute
    if every_s > patience_s:
        raise ConfigError(
            f"{name} = {per_minute:g} admits nothing for {every_s:,.0f} s at a time, "
            f"and [run] patience_s is {patience_s:g}: the run would park at once",
            place=place,
            remedy=f"at least {60 * endpoints / patience_s:g}, or a larger [run] patience_s",
        )


def build_policies(
    config: HarvestConfig,
    limits: PassLimits,
    clock: Clock,
    spent: Mapping[BudgetSpan, Amounts] | None = None,
    idle_since: float | None = None,
) -> Policies:
    """Return the policies that a configuration and the ceilings of one pass set.

    Args:
        spent: what the budgets were charged in each span before this pass; None for nothing.
        idle_since: since when nothing was sent, in seconds of the clock: what the rate allows in that time,
            at most in START_S, may be sent at once. None: since now.
    """
    now = clock.now()
    return Policies(
        _limiters(config, now if idle_since is None else max(idle_since, now - START_S)),
        build_budget(config, limits, spent or {}, clock.wall()),
        RetryPolicy(
            config.run.max_attempts,
            config.run.retry_possibly_billed,
            budget=RetryBudget(replicas=len(config.teacher.base_urls) - 1),
        ),
        clock,
        config.teacher.price,
        config.run.patience_s,
        {address.base_url: address.weight for address in config.teacher.addresses},
    )


def _limiters(config: HarvestConfig, now: float) -> dict[str, Limiter]:
    """A limiter per endpoint.

    Limits of `[teacher.limits]` on the rate belong to the credential: each endpoint begins with a part by
    its weight. The limit on requests in flight holds for each endpoint, as do its own limits.
    """
    teacher, run = config.teacher, config.run
    weights = sum(address.weight for address in teacher.addresses)
    wanted = {address.base_url: teacher.max_concurrency_of(address) for address in teacher.addresses}
    allowed = open_files.connections_allowed(sum(wanted.values())) / sum(wanted.values())
    deadline_s = run.deadline_for(config.sampling.max_tokens or 0)
    limiters = {}
    for address in teacher.addresses:
        most = wanted[address.base_url]
        connections = max(1, int(most * allowed))
        limiter = Limiter(
            teacher.limits.model_copy(update={"max_concurrency": connections}),
            now,
            own=address.limits,
            part=address.weight / weights,
            deadline_s=deadline_s,
            patience_s=run.patience_s,
        )
        if connections < most:
            limiter.window.explain_ceiling(OPEN_FILES_NOTE)
        limiters[address.base_url] = limiter
    return limiters


def build_budget(
    config: HarvestConfig, limits: PassLimits, spent: Mapping[BudgetSpan, Amounts], wall: float
) -> Budget:
    """Return a budget with the ceilings of every span; the lower one counts of the file and the command line.

    Args:
        limits: ceilings of the command line, and the span for which those of one run hold.
        spent: what was charged in each span before this pass.
        wall: now, in Unix seconds.
    """
    ceilings: dict[BudgetSpan, list[tuple[float | None, int | None]]] = {span: [] for span in BudgetSpan}
    for span, section in config.budget.by_span.items():
        target = limits.budget_span if span is BudgetSpan.RUN else span
        ceilings[target].append((section.usd, section.tokens))
    ceilings[limits.budget_span].append((limits.usd, limits.tokens))
    return Budget(
        *(
            Ceiling(
                span,
                tokens=min((tokens for _, tokens in values if tokens is not None), default=None),
                microusd=min((int(usd * 1_000_000) for usd, _ in values if usd is not None), default=None),
                spent=spent.get(span, NOTHING),
                ends_at=span.end(wall),
            )
            for span, values in ceilings.items()
        )
    )
