"""Bring the launchers of several machines together, by the rendezvous of torchrun and with its arguments.

What no option says is taken from the environment that torchrun reads too (`PET_NNODES`, ...: Kubeflow sets it
in the pods of a PyTorchJob), and from that of Slurm and of the `env://` method (`MASTER_ADDR`, ...).
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from trainer.errors import ConfigError, ProcessLost

# torchrun sets it in its workers: they are processes of a training already, and start none.
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"

# Port of torchrun's c10d backend.
DEFAULT_PORT = 29400

# Seconds that nodes wait for each other before they give up.
JOIN_S = 900.0

_HANDLED_BY = "torch.distributed.elastic.rendezvous"


@dataclass(frozen=True, slots=True)
class Options:
    """What the options of a command say about the nodes of a training; see `Rendezvous`.

    Attributes:
        nodes, node: None where they were not given. backend, endpoint, run_id: empty then.
    """

    nodes: int | None = None
    node: int | None = None
    backend: str = ""
    endpoint: str = ""
    run_id: str = ""
    join_s: float = JOIN_S


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """How the nodes of a training find each other; the meanings are those of torchrun.

    Attributes:
        nodes: how many take part.
        node: number of this one, from 0; None: by order of arrival, which the backend "static" can't.
        backend: "static", "c10d" or another one that torch knows.
        endpoint: host and port where they meet.
        run_id: name of the meeting; nodes of another name are not let in.
        join_s: seconds to wait for the others.
    """

    nodes: int
    node: int | None
    backend: str
    endpoint: str
    run_id: str
    join_s: float = JOIN_S


@dataclass(frozen=True, slots=True)
class Meeting:
    """A rendezvous that took place.

    Attributes:
        node: number of this node, from 0; nodes: of all.
        store: key-value store of the nodes (`torch.distributed.Store`).
        handler: keeps the membership alive while it is referenced.
        address: of this machine, as the others reach it.
    """

    node: int
    nodes: int
    store: Any
    handler: Any
    address: str


def chosen(options: Options, environment: Mapping[str, str]) -> Rendezvous | None:
    """Return the rendezvous that options and environment ask for; None for a training on this machine alone.

    Args:
        environment: variables of this process.

    Raises:
        ConfigError: something is missing or contradicts, or an elastic number of nodes is asked for.
    """
    if options.nodes is None and UNDER_TORCHRUN in environment:
        return None
    wanted = options.nodes or _number_of_nodes(environment.get("PET_NNODES") or "1")
    if wanted == 1:
        return None
    node = options.node
    if node is None:
        node = _number(environment, "PET_NODE_RANK", "SLURM_NODEID", "RANK")
    backend = options.backend or environment.get("PET_RDZV_BACKEND") or ("c10d" if node is None else "static")
    endpoint = options.endpoint or _endpoint(environment)
    if not endpoint:
        raise ConfigError(
            f"{wanted} nodes need a place to meet",
            place="--rdzv-endpoint",
            remedy="name host and port of one of them, as in --rdzv-endpoint node1:29500",
        )
    if backend == "static" and node is None:
        raise ConfigError(
            'the rendezvous backend "static" needs the number of each node',
            place="--node-rank",
            remedy="give --node-rank 0, 1, ... or --rdzv-backend c10d",
        )
    if node is not None and not 0 <= node < wanted:
        raise ConfigError(
            f"node {node} is none of {wanted}", place="--node-rank", remedy=f"number them 0 to {wanted - 1}"
        )
    run_id = options.run_id or environment.get("PET_RDZV_ID") or environment.get("SLURM_JOB_ID") or "none"
    return Rendezvous(wanted, node, backend, _with_port(endpoint), run_id, options.join_s)


def processes_of(environment: Mapping[str, str]) -> int:
    """Return how many processes the environment asks for on this machine; 1 without a word about it.

    Raises:
        ConfigError: what it says is no number and not "gpu" or "auto", which mean one for each GPU.
    """
    text = environment.get("PET_NPROC_PER_NODE") or "1"
    if UNDER_TORCHRUN in environment:
        return 1
    if text in {"auto", "gpu"}:
        import torch

        return max(1, torch.cuda.device_count())
    if re.fullmatch(r"[1-9]\d{0,3}", text):
        return int(text)
    raise ConfigError(
        f"{text!r} is no number of processes",
        place="environment variable PET_NPROC_PER_NODE",
        remedy='set a number, or "gpu" for one for each GPU',
    )


def _number_of_nodes(text: str) -> int:
    least, _, most = text.partition(":")
    if least != (most or least):
        raise ConfigError(
            f"a training can't change its number of nodes, as {text} asks for",
            place="environment variable PET_NNODES",
            remedy="set one number; a training that lost a node resumes with any number of processes",
        )
    if not re.fullmatch(r"[1-9]\d{0,4}", least):
        raise ConfigError(
            f"{text!r} is no number of nodes",
            place="environment variable PET_NNODES",
            remedy="set it to a number, as in PET_NNODES=2, or unset it and give --nnodes",
        )
    return int(least)


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if value := environment.get(name):
            if not re.fullmatch(r"\d{1,5}", value):
                raise ConfigError(
                    f"{value!r} is no number of a node",
                    place=f"environment variable {name}",
                    remedy=f"set it to a number from 0, as in {name}=0, or unset it",
                )
            return int(value)
    return None


def _endpoint(environment: Mapping[str, str]) -> str:
    if endpoint := environment.get("PET_RDZV_ENDPOINT"):
        return endpoint
    for prefix in ("PET_", ""):
        if (host := environment.get(f"{prefix}MASTER_ADDR")) and (
            port := environment.get(f"{prefix}MASTER_PORT")
        ):
            return f"{host}:{port}"
    return ""


def _with_port(endpoint: str) -> str:
    host, port = _split(endpoint)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(endpoint: str) -> tuple[str, int]:
    """Return host and port of "host:port", "[::1]:port" or "host".

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:/\s]+)(?::(\d{1,5}))?", endpoint.strip())
    port = int(match[2]) if match and match[2] else DEFAULT_PORT
    if match is None or not 0 < port < 1 << 16:
        raise ConfigError(
            f"{endpoint!r} is no host and port",
            place="--rdzv-endpoint",
            remedy="as in node1:29500, 10.0.0.5:29500 or [fd00::5]:29500",
        )
    return match[1].strip("[]"), port


def meet(rendezvous: Rendezvous) -> Meeting:
    """Wait for the other nodes. A signal ends the wait, as the waiting is done in a thread.

    Raises:
        ProcessLost: they did not come together in time.
        ConfigError: torch knows no such backend.
    """
    results: list[Meeting | BaseException] = []
    arrived = threading.Event()

    def join() -> None:
        try:
            results.append(_meet(rendezvous))
        except BaseException as error:  # noqa: BLE001 - it is raised again by the thread that waits
            results.append(error)
        finally:
            arrived.set()

    threading.Thread(target=join, name="rendezvous", daemon=True).start()
    while not arrived.wait(0.1):
        pass
    [result] = results
    if isinstance(result, Meeting):
        return result
    if isinstance(result, ConfigError):
        raise result
    lines = str(result).strip().splitlines() or [type(result).__name__]
    raise ProcessLost(
        f"{rendezvous.nodes} nodes did not come together within {rendezvous.join_s:,.0f} s: {lines[0][:300]}",
        place=rendezvous.endpoint,
        remedy="start all of them with one --rdzv-endpoint and --rdzv-id; the port must be reachable",
    ) from None


def _meet(rendezvous: Rendezvous) -> Meeting:
    logging.getLogger(_HANDLED_BY).setLevel(logging.CRITICAL)
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    host, _ = _split(rendezvous.endpoint)
    address = _own_address(host)
    seconds = max(1, round(rendezvous.join_s))
    options: dict[str, Any] = {"timeout": seconds}
    if rendezvous.backend == "static":
        options["rank"] = rendezvous.node
    else:
        options |= {"join_timeout": seconds, "last_call_timeout": 1, "read_timeout": min(60, seconds)}
    parameters = RendezvousParameters(
        backend=rendezvous.backend,
        endpoint=rendezvous.endpoint,
        run_id=rendezvous.run_id,
        min_nodes=rendezvous.nodes,
        max_nodes=rendezvous.nodes,
        local_addr=address,
        **options,
    )
    try:
        handler = get_rendezvous_handler(parameters)
    except ValueError as error:
        raise ConfigError(
            f"torch has no rendezvous backend {rendezvous.backend!r}: {error}",
            place="--rdzv-backend",
            remedy="static or c10d",
        ) from None
    info = handler.next_rendezvous()
    info.store.set_timeout(timedelta(seconds=seconds))
    return Meeting(info.rank, info.world_size, info.store, handler, address)


def _own_address(host: str) -> str:
    """Return the address of this machine from which it reaches the endpoint, where others reach it, too.

    The machine of the endpoint itself may know its own name as a loopback address: then the name is returned.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            address = str(probe.getsockname()[0])
    except OSError:
        return socket.getfqdn()
    return host if address.startswith("127.") or address == "::1" else address


def workers_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for workers: without what would make each of them a launcher."""
    return {name: value for name, value in environment.items() if not name.startswith("PET_")}
