"""Start and reach the processes of a fleet through Ray, which is imported only here, when it is needed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, HarvesterError

# Seconds within which a call of an actor returns that only looks at its memory.
CALL_S = 30.0
# Seconds that a rank waits for the coordinator's answer.
EXCHANGE_S = 2.0
# The object store carries messages of a few kilobytes.
_LOCAL_STORE_BYTES = 96 << 20


class RankLost(Exception):
    """The process of an actor is gone, or its machine."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster.

    Attributes:
        id: Ray's name of it. host: its host name and address. cpus: how many it offers.
    """

    id: str
    host: str
    cpus: float


@contextlib.contextmanager
def connected(address: str | None, local_cpus: int) -> Iterator[Cluster]:
    """Connect to a Ray cluster, or start one on this machine, during the block.

    Args:
        address: of the cluster, as `ray.init` takes it; None starts one.
        local_cpus: how many ranks one that is started can hold.

    Raises:
        ConfigError: the cluster can't be reached.
    """
    # Ray reports the use of clusters that it starts to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    with contextlib.ExitStack() as stack:
        # Ray prints what its processes log last on stdout, where the result of the command belongs.
        silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123 - no file
        stack.enter_context(contextlib.redirect_stdout(silence))
        _connect(address, local_cpus)
        stack.callback(ray.shutdown)
        yield Cluster()


def _connect(address: str | None, local_cpus: int) -> None:
    """Connect as `connected` says.

    Raises:
        ConfigError: the cluster can't be reached.
    """
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address is None:
            own = {"num_cpus": local_cpus, "include_dashboard": False}
            ray.init(address="local", object_store_memory=_LOCAL_STORE_BYTES, **own, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"the Ray cluster can't be used: {str(error).splitlines()[0] if str(error) else error!r}",
            place="--address",
            remedy="`ray status` on its head node shows it; without --address one is started here",
        ) from None


class Cluster:
    """The cluster that this process is connected to."""

    def nodes(self) -> list[Node]:
        """Return the machines that are up and offer CPUs, in a fixed order; all that are up if none does.

        Raises:
            RankLost: the cluster does not answer.
        """
        import ray

        try:
            known = ray.nodes()
        except ray.exceptions.RayError as error:
            raise RankLost(f"the cluster does not list its machines ({type(error).__name__})") from None
        up = [
            Node(
                node["NodeID"],
                f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}",
                node["Resources"].get("CPU", 0.0),
            )
            for node in known
            if node["Alive"]
        ]
        return sorted([node for node in up if node.cpus > 0] or up, key=lambda node: node.id)

    def stores_at(self, node: Node, config: Path) -> list[str]:
        """Return the shards whose stores lie on a machine (`rank.stores_here`).

        Raises:
            HarvesterError: the configuration can't be read there. RankLost: the machine is gone.
        """
        import ray

        from harvester.fleet.rank import stores_here

        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": _at(node.id)}
        call = ray.remote(stores_here).options(**options)
        found: list[str] = result(call.remote(str(config)), CALL_S)
        return found

    def coordinator(self, spec: str) -> Actor:
        """Start the coordinator beside this process."""
        import ray

        from harvester.fleet.coordinator import Coordinator

        here = ray.get_runtime_context().get_node_id()
        return Actor(_actor(Coordinator, here, cpus=0).remote(spec))

    def rank(self, spec: str, coordinator: Actor, node: Node, cpus: float) -> Actor:
        """Start a rank at a node, where it takes so many CPUs."""
        return Actor(_actor(RankActor, node.id, cpus=cpus).remote(spec, coordinator.handle))


def _at(node: str) -> Any:
    """Return what places a process at a node, and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _actor(kind: type, node: str, *, cpus: float) -> Any:
    import ray

    return ray.remote(kind).options(num_cpus=cpus, scheduling_strategy=_at(node), max_restarts=0)


class RankActor:
    """A rank (`rank.Rank`) that reaches its coordinator by Ray."""

    def __init__(self, spec: str, coordinator: Any) -> None:
        from harvester.fleet.rank import Rank

        # The run must not heed what ends this process: Ray's SIGTERM handler exits at once.
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - stays open for life
        self._coordinator = coordinator
        self._rank = Rank(spec, self._send)

    def _send(self, rank: int, incarnation: int, text: str) -> str:
        import ray

        reply = self._coordinator.exchange.remote(rank, incarnation, text)
        try:
            answer: str = ray.get(reply, timeout=EXCHANGE_S)
        except ray.exceptions.RayError as error:
            raise HarvesterError(
                f"the coordinator does not answer ({type(error).__name__})",
                remedy="`harvester fleet` with the same arguments resumes; `ray status` shows the cluster",
            ) from None
        return answer

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the rank."""
        return getattr(self._rank, method)(*arguments)


class Actor:
    """An actor of this fleet. Calls return within the time, or raise RankLost."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def ask(self, method: str, *arguments: Any) -> Any:
        """Begin a call of an actor's method; `result` waits for it."""
        return getattr(self.handle, method).remote(*arguments)

    def ask_rank(self, method: str, *arguments: Any) -> Any:
        """Begin a call of a rank's method."""
        return self.ask("call", method, *arguments)

    def get(self, method: str, *arguments: Any) -> Any:
        """Call a method and wait for its result.

        Raises:
            RankLost: the process is gone.
        """
        return result(self.ask(method, *arguments), CALL_S)

    def kill(self) -> None:
        """End the process at once."""
        import ray

        ray.kill(self.handle)


def is_ready(call: Any) -> bool:
    """Whether the result of a call is there, or an error."""
    import ray

    return bool(ray.wait([call], timeout=0)[0])


def result(call: Any, timeout_s: float | None = None) -> Any:
    """Wait for the result of a call.

    Raises:
        RankLost: the process is gone, or does not answer.
        HarvesterError: the call failed there.
    """
    import ray

    try:
        return ray.get(call, timeout=timeout_s)
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.ActorUnschedulableError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.GetTimeoutError,
    ) as error:
        raise RankLost(str(error).strip().splitlines()[0] if str(error).strip() else repr(error)) from None
    except ray.exceptions.RayError as error:
        raise HarvesterError(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}") from None
