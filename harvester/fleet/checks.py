"""Check a fleet before it starts: configuration, options, terms, number of ranks, stores on its machines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from harvester import library
from harvester.config import config as settings
from harvester.config.config import HarvestConfig
from harvester.config.overrides import Overrides
from harvester.config.shard import Shard
from harvester.config.transport import Transport
from harvester.errors import ConfigError
from harvester.fleet.cluster import Cluster
from harvester.fleet.folder import FleetState
from harvester.run import prepare
from harvester.run.sharding import with_shard
from harvester.teacher.policies import require_rate_within_patience
from harvester.teacher.sharing.limit_leases import LEAST

# From so many ranks on, the coordinator needs more than one core (benchmarks/large_run.py).
MOST_RANKS = 200


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How a fleet is run.

    Attributes:
        address: of the Ray cluster; None starts one on this machine.
        ranks: how many; None for as many as there are machines.
        pay_again: begin a new store for a rank whose own can't be reached.
        harvest: options of the harvest, for each rank.
    """

    address: str | None
    ranks: int | None
    pay_again: bool
    harvest: library.HarvestOptions


def require_possible(config: Path, options: FleetOptions) -> tuple[HarvestConfig, Overrides]:
    """Check what costs nothing and needs no cluster: configuration, options, terms.

    Raises:
        ConfigError, TermsRefused: a fleet could not run this.
    """
    loaded, flags = settings.load(config), library.overrides(options.harvest)
    flags.require(priced=loaded.teacher.price is not None)
    prepare.gate(loaded, config.resolve().parent).require()
    if options.ranks is not None and not 1 <= options.ranks <= MOST_RANKS:
        raise ConfigError(
            f"a fleet has 1 to {MOST_RANKS} ranks, not {options.ranks}",
            place="--ranks",
            remedy="as in --ranks 4",
        )
    if loaded.run.shard is not None:
        raise ConfigError("a shard can't be split again", place="run.shard", remedy="leave it out")
    if (flags.transport or loaded.run.transport) is not Transport.ONLINE:
        raise ConfigError(
            "the ranks of a fleet ask one by one, not in batches",
            place="run.transport",
            remedy='set [run] transport = "online"; or split the harvest with `harvester run --shard`',
        )
    if loaded.score is not None:
        raise ConfigError(
            "a fleet can't score texts",
            place="score",
            remedy="split the harvest with `harvester run --shard`",
        )
    return loaded, flags


def require_divisible(config: Path, loaded: HarvestConfig, flags: Overrides, ranks: int) -> None:
    """Refuse limits that so many ranks can't share."""
    with_shard(loaded, replace(flags, shard=f"1/{ranks}", is_allocated=True))
    for name, value in loaded.teacher.limits.model_dump().items():
        if value is not None and name.endswith("_per_minute"):
            require_rate_within_patience(
                name,
                value * LEAST,
                ranks * len(loaded.teacher.base_urls),
                loaded.run.patience_s,
                place=f"{config}: teacher.limits, divided by {ranks} ranks",
            )


def find_stores(config: Path, cluster: Cluster, ranks: int | None) -> FleetState:
    """Return the state of a fleet that left none here: its stores are looked for on all machines.

    Raises:
        ConfigError: stores of another number of ranks are there.
    """
    nodes = cluster.nodes()
    hosts: dict[int, str] = {}
    begun: set[int] = set()
    for node in nodes:
        for shard in map(Shard.parse, cluster.stores_at(node, config.resolve())):
            begun.add(shard.of)
            hosts[shard.rank] = node.host
    number = ranks or (begun.pop() if len(begun) == 1 else min(MOST_RANKS, len(nodes)))
    if others := begun - {number}:
        raise ConfigError(
            f"stores of a split into {min(others)} are there: {number} ranks would ask again for what they "
            "hold",
            place="--ranks",
            remedy="name that number; or merge these stores, name the result in [store] read_also, and move "
            "them away",
        )
    return FleetState(number, hosts)
