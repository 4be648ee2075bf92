"""The laws of one pass, built from its configuration: limiters, budget, backoff, patience."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from harvester.config.config import HarvestConfig, PriceSection, TeacherSection
from harvester.errors import ConfigError
from harvester.observe.counters import PassLimits
from harvester.system import open_files
from harvester.system.clock import Clock
from harvester.teacher.budget import Budget
from harvester.teacher.rate_limiter import OPEN_FILES, Limiter
from harvester.teacher.retry import Backoff


@dataclass(slots=True)
class Policies:
    """The values that govern one pass; a limiter for each endpoint, by base URL."""

    limiters: Mapping[str, Limiter]
    budget: Budget
    backoff: Backoff
    clock: Clock
    price: PriceSection | None = None
    patience_s: float = math.inf


def require_pace(name: str, per_minute: float, addresses: int, patience_s: float) -> None:
    """Do nothing when a limit lets the least request through within our patience.

    Args:
        addresses: how many share the limit.

    Raises:
        ConfigError: the run would park after every request.
    """
    every_s = 60 * addresses / per_minute
    if every_s > patience_s:
        raise ConfigError(
            f"{name} = {per_minute:g} lets nothing through for {every_s:,.0f} s at a time, "
            f"and [run] patience_s is {patience_s:g}: the run would park at once",
            remedy=f"at least {60 * addresses / patience_s:g}, or a larger [run] patience_s",
        )


def build_policies(config: HarvestConfig, limits: PassLimits, clock: Clock) -> Policies:
    """The laws that a configuration and the ceilings of one pass make."""
    return Policies(
        _limiters(config.teacher, clock.now()),
        _budget(config, limits),
        Backoff(config.run.max_attempts, config.run.retry_possibly_billed),
        clock,
        config.teacher.price,
        config.run.patience_s,
    )


def _limiters(teacher: TeacherSection, now: float) -> dict[str, Limiter]:
    """One for each address; the limits belong to the credential, so each gets its part of them."""
    shares = {
        name: value / len(teacher.base_urls)
        for name, value in teacher.limits.model_dump(exclude={"max_concurrency"}).items()
        if value is not None
    }
    most = open_files.connections_allowed(teacher.limits.max_concurrency)
    limits = teacher.limits.model_copy(update={**shares, "max_concurrency": most})
    limiters = {url: Limiter(limits, now) for url in teacher.base_urls}
    if most < teacher.limits.max_concurrency:
        for limiter in limiters.values():
            limiter.window.held_by = OPEN_FILES
    return limiters


def _budget(config: HarvestConfig, limits: PassLimits) -> Budget:
    """The lower of the file's and the command line's ceilings."""
    usd = [value for value in (config.budget.usd, limits.usd) if value is not None]
    tokens = [value for value in (config.budget.tokens, limits.tokens) if value is not None]
    return Budget(tokens=min(tokens, default=None), microusd=int(min(usd) * 1_000_000) if usd else None)
