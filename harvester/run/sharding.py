"""Give one shard of a harvest a store of its own, and its part of the limits and the budget.

Each of n shards gets 1/n of the rate limits, of the requests in flight, and of every ceiling in tokens and
USD, on the command line too. Limits that the teacher does not state are learned by each. Time, hours, and
`--limit` hold for each shard as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harvester.config.config import HarvestConfig, LimitsSection
from harvester.config.overrides import Overrides
from harvester.config.run_section import CeilingSection
from harvester.config.shard import Shard
from harvester.errors import ConfigError


def with_shard(config: HarvestConfig, flags: Overrides) -> tuple[HarvestConfig, Overrides]:
    """Return configuration and options of the shard that `--shard` or `[run] shard` names.

    Raises:
        ConfigError: the harvest can't be split.
    """
    text = flags.shard or config.run.shard
    if text is None:
        return config, flags
    try:
        shard = Shard.parse(text)
    except ValueError as error:
        raise ConfigError(str(error), place="--shard", remedy="number and count, as in --shard 2/8") from None
    if config.score is not None and config.score.via == "auto":
        raise ConfigError(
            "the way in which texts are scored is part of the keys that split a harvest",
            place="score.via",
            remedy='name the way, as in via = "echo", before the harvest is split',
        )
    budget: dict[str, Any] = {
        name: _ceiling(getattr(config.budget, name), shard) for name in ("run", "store", "day", "month")
    }
    top = _ceiling(config.budget, shard)
    changes: dict[str, Any] = {
        "teacher": config.teacher.model_copy(update={"limits": _limits(config.teacher.limits, shard)}),
        "store": config.store.model_copy(update={"path": shard.store(config.store.path)}),
        "run": config.run.model_copy(update={"shard": str(shard)}),
        "budget": config.budget.model_copy(update={**budget, "usd": top.usd, "tokens": top.tokens}),
    }
    if config.accept is not None and config.accept.until is not None:
        until = shard.count(config.accept.until)
        changes["accept"] = config.accept.model_copy(update={"until": until})
    tokens = None if flags.tokens is None else shard.count(flags.tokens)
    usd = None if flags.usd is None else flags.usd / shard.of
    return config.model_copy(update=changes), replace(flags, shard=str(shard), tokens=tokens, usd=usd)


def _limits(limits: LimitsSection, shard: Shard) -> LimitsSection:
    rates = {
        name: value / shard.of
        for name, value in limits.model_dump(exclude={"max_concurrency"}).items()
        if value is not None
    }
    return limits.model_copy(update={**rates, "max_concurrency": shard.count(limits.max_concurrency)})


def _ceiling(ceiling: CeilingSection, shard: Shard) -> CeilingSection:
    return CeilingSection(
        usd=None if ceiling.usd is None else ceiling.usd / shard.of,
        tokens=None if ceiling.tokens is None else shard.count(ceiling.tokens),
    )


def note(config: HarvestConfig) -> str:
    """Say what part of the harvest a shard makes."""
    shard = Shard.parse(config.run.shard or "1/1")
    limits = config.teacher.limits
    return (
        f"{shard}: 1/{shard.of} of the rate limits, of the budget and of the requests in flight "
        f"({limits.max_concurrency:,}); `harvester merge` puts the stores together"
    )
