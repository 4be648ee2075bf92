"""Give one shard of a harvest a store of its own, and its part of the limits and the budget.

Each of n shards gets 1/n of the rate limits, of the requests in flight, and of every ceiling in tokens and
USD, on the command line too. The parts never add up to more than the whole: what n shards can't share is
refused. Limits that the teacher does not state are learned by each. Time, hours, and `--limit` hold for each
shard as they are. Ranks of a fleet share limits and budget otherwise (`allotment`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from harvester.api.max_tokens import positive_max_tokens_of
from harvester.config.config import HarvestConfig, StoreSection
from harvester.config.overrides import Overrides
from harvester.config.run_section import AcceptSection, CeilingSection
from harvester.config.shard import Shard
from harvester.config.teacher_section import LimitsSection, RateLimitsSection, ReplicaSection
from harvester.errors import ConfigError

# Tables of [budget] that hold a ceiling each, beside the one of a run at its top.
_SPANS = ("run", "store", "day", "month")


def with_shard(config: HarvestConfig, flags: Overrides) -> tuple[HarvestConfig, Overrides]:
    """Return configuration and options of the shard that `--shard` or `[run] shard` names.

    Raises:
        ConfigError: the harvest can't be split, or not into so many shards.
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
    _require_parts(config, flags, shard)
    changes: dict[str, Any] = {
        "store": _store(config.store, shard),
        "run": config.run.model_copy(update={"shard": str(shard)}),
    }
    if config.accept is not None:
        changes["accept"] = _accept(config.accept, shard)
    if flags.is_allocated:  # limits and budget are those of the whole harvest, and not shared otherwise
        changes["run"] = changes["run"].model_copy(update={"share_limits": False})
        return config.model_copy(update=changes), replace(flags, shard=str(shard))
    budget: dict[str, Any] = {name: _ceiling(getattr(config.budget, name), shard) for name in _SPANS}
    top = _ceiling(config.budget, shard)
    changes["teacher"] = config.teacher.model_copy(
        update={
            "limits": _limits(config.teacher.limits, shard),
            "replica": tuple(_replica(replica, shard) for replica in config.teacher.replica),
        }
    )
    changes["budget"] = config.budget.model_copy(update={**budget, "usd": top.usd, "tokens": top.tokens})
    tokens = None if flags.tokens is None else shard.count(flags.tokens)
    usd = None if flags.usd is None else flags.usd / shard.of
    return config.model_copy(update=changes), replace(flags, shard=str(shard), tokens=tokens, usd=usd)


def _store(store: StoreSection, shard: Shard) -> StoreSection:
    """Return a store of the shard's own, and a mirror of its own: each holds one store."""
    mirror = shard.store(store.mirror) if store.mirror else ""
    return store.model_copy(update={"path": shard.store(store.path), "mirror": mirror})


def _accept(accept: AcceptSection, shard: Shard) -> AcceptSection:
    if accept.until is None:
        return accept
    return accept.model_copy(update={"until": shard.count(accept.until)})


def _require_parts(config: HarvestConfig, flags: Overrides, shard: Shard) -> None:
    """Refuse counts below the number of shards, and parts of a budget that are too small for one answer.

    Every shard of a harvest is refused alike, whatever its number.

    Raises:
        ConfigError: names the limit or the ceiling, the number of shards, and the remedy.
    """
    places = {"teacher.limits": config.teacher.limits.max_concurrency}
    places |= {
        f"teacher.replica {replica.base_url} limits": replica.limits.max_concurrency
        for replica in config.teacher.replica
        if replica.limits.max_concurrency is not None
    }
    for place, in_flight in places.items():
        if in_flight >= shard.of:
            continue
        raise ConfigError(
            f"max_concurrency = {in_flight:,} can't be shared by {shard.of:,} shards: each needs one request "
            "in flight",
            place=f"{place}.max_concurrency",
            remedy=f"use {in_flight:,} shards or fewer, or raise max_concurrency to {shard.of:,} or more",
        )
    if config.accept is not None and config.accept.until is not None and config.accept.until < shard.of:
        raise ConfigError(
            f"until = {config.accept.until:,} can't be shared by {shard.of:,} shards",
            place="accept.until",
            remedy="use fewer shards, or raise until",
        )
    sampling = config.sampling
    limit = {} if sampling.max_tokens is None else {"max_tokens": sampling.max_tokens}
    # What the answer to one request may take, where the file says so. A scored text has no answer.
    answer = 0 if config.score is not None else positive_max_tokens_of({**limit, **sampling.extra})
    for place, tokens in () if flags.is_allocated else _token_ceilings(config, flags):
        part = tokens // shard.of
        if shard.of > 1 and part < max(1, answer):
            needed = f"one answer may take {answer:,} ([sampling] max_tokens)" if answer else "it is below 1"
            raise ConfigError(
                f"the part of one of {shard.of:,} shards is {part:,} of {tokens:,} tokens, and {needed}: it "
                "could send nothing",
                place=place,
                remedy="use fewer shards, or a larger budget",
            )


def _token_ceilings(config: HarvestConfig, flags: Overrides) -> Iterator[tuple[str, int]]:
    """Yield each ceiling in tokens and where it stands."""
    budget = config.budget
    sections = [("budget", budget), *((f"budget.{span}", getattr(budget, span)) for span in _SPANS)]
    for name, section in sections:
        if section.tokens is not None:
            yield f"{name}.tokens", section.tokens
    if flags.tokens is not None:
        yield "--max-tokens", flags.tokens


def _limits(limits: LimitsSection, shard: Shard) -> LimitsSection:
    count = shard.count(limits.max_concurrency)
    return limits.model_copy(update={**_rates(limits, shard), "max_concurrency": count})


def _rates(limits: RateLimitsSection, shard: Shard) -> dict[str, float]:
    """Return the shard's part of each limit per minute or day."""
    return {
        name: value / shard.of
        for name in RateLimitsSection.model_fields
        if (value := getattr(limits, name)) is not None
    }


def _replica(replica: ReplicaSection, shard: Shard) -> ReplicaSection:
    limits = replica.limits
    most = limits.max_concurrency
    concurrency = {} if most is None else {"max_concurrency": shard.count(most)}
    parts = limits.model_copy(update={**_rates(limits, shard), **concurrency})
    return replica.model_copy(update={"limits": parts})


def _ceiling(ceiling: CeilingSection, shard: Shard) -> CeilingSection:
    return CeilingSection(
        usd=None if ceiling.usd is None else ceiling.usd / shard.of,
        tokens=None if ceiling.tokens is None else shard.count(ceiling.tokens),
    )


def note(config: HarvestConfig, *, is_allocated: bool = False) -> str:
    """Say what part of the harvest a shard makes."""
    shard = Shard.parse(config.run.shard or "1/1")
    if is_allocated:
        return f"{shard}: limits and budget are allocated to it by what it can use"
    limits = config.teacher.limits
    return (
        f"{shard}: 1/{shard.of} of the rate limits, of the budget and of the requests in flight "
        f"({limits.max_concurrency:,}); `harvester merge` puts the stores together"
    )
