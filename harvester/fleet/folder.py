"""Keep the folder of a fleet beside its stores: `status.json` for people, `fleet.json` for the next fleet.

`fleet.json` holds how many ranks there are, where each ran last, and what the coordinator must know of money
(`allocator.Allocator.state`). The truth about money is in the stores; this counts for a store that is gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, StoreError
from harvester.store.journal.sqlite import disk_error
from harvester.system import own_files
from harvester.system.own_files import ForeignFileError

STATE = "fleet.json"
# A state has about a kilobyte for each rank.
_MOST_BYTES = 64 << 20
_FORMAT = 1


@dataclass(slots=True)
class FleetState:
    """What one fleet leaves to the next.

    Attributes:
        ranks: how many there are; the stores are named after it.
        hosts: where each rank ran last, by rank.
        coordinator: `Allocator.state`, None before the first start.
    """

    ranks: int
    hosts: dict[int, str] = field(default_factory=dict)
    coordinator: Mapping[str, Any] | None = None


def folder_of(store: Path) -> Path:
    """Return the folder of the fleet whose whole store this would be."""
    return store.with_name(f"{store.name}-fleet")


def read_state(folder: Path) -> FleetState | None:
    """Return what an earlier fleet left; None where there was none.

    Raises:
        StoreError: it can't be read.
    """
    path = folder / STATE
    try:
        values = json.loads(own_files.read_text(path, _MOST_BYTES))
        if values["format"] != _FORMAT:
            raise ValueError
        hosts = {int(rank): str(host) for rank, host in values["hosts"].items()}
        return FleetState(int(values["ranks"]), hosts, values["coordinator"])
    except FileNotFoundError:
        return None
    except (OSError, ForeignFileError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(
            "can't be read: it is damaged, or of another release",
            place=str(path),
            remedy="move it away; then the budget counts what the stores of the ranks hold, and nothing else",
        ) from None


def write_state(folder: Path, state: FleetState) -> None:
    """Replace the state on disk.

    Raises:
        StoreError: the disk refuses.
    """
    values = {
        "format": _FORMAT,
        "ranks": state.ranks,
        "hosts": {str(rank): host for rank, host in state.hosts.items()},
        "coordinator": state.coordinator,
    }
    try:
        with own_files.replacing(folder / STATE, durable=True) as file:
            file.write(json.dumps(values).encode())
    except OSError as error:
        raise disk_error(error, folder / STATE) from None


def require_ranks(state: FleetState | None, wanted: int | None, folder: Path) -> None:
    """Refuse another number of ranks than the fleet has: prompts are split by it, and stores named after it.

    Raises:
        ConfigError: names both numbers.
    """
    if state is None or wanted is None or wanted == state.ranks:
        return
    raise ConfigError(
        f"this fleet has {state.ranks} ranks, and its prompts are split by that",
        place="--ranks",
        remedy=f"leave it out; or `harvester merge` its stores, name them in [store] read_also, and move "
        f"{folder} away",
    )
