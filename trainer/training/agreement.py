"""Require that processes on several machines learn the same, and let one make a shared token store."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.training.distributed import World

# Where files lie may differ from machine to machine; what they hold may not, and is compared by its hash.
# Machines may also have other numbers of cores.
_OWN = frozenset(
    {
        *("student.base", "student.template", "data.corpus", "data.cache", "out.path", "train.threads"),
        *("evaluate.judge", "evaluate.general_prompts", "evaluate.machine_usd_per_hour"),
    }
)

# Differences that a message names.
_MOST_NAMED = 4


def require_equal_inputs(config: TrainConfig, facts: Mapping[str, Any], world: World) -> None:
    """Refuse a training whose processes have other settings, rows, bases or templates than the first one.

    Args:
        facts: of this process, by name: settings, hashes of corpus, base and template.

    Raises:
        ConfigError: on every process, with the differences.
    """
    own = {name: value for name, value in {**_flat(config), **facts}.items() if name not in _OWN}
    everyone = [world.share_json(own, source=rank) for rank in range(world.size)]
    for rank, theirs in enumerate(everyone):
        names = sorted(name for name in {*everyone[0], *theirs} if everyone[0].get(name) != theirs.get(name))
        if names:
            shown = "; ".join(
                f"{name} {everyone[0].get(name)!r} there, {theirs.get(name)!r} here"
                for name in names[:_MOST_NAMED]
            )
            more = f"; {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            raise ConfigError(
                f"process {rank} has other inputs than process 0: {shown}{more}",
                place=str(config.root),
                remedy="give every machine the same train.toml, corpus, base and template",
            )


def _flat(config: TrainConfig) -> dict[str, Any]:
    dumped = config.model_dump(mode="json")
    return {
        f"{section}.{key}": value
        for section, values in dumped.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


@contextmanager
def leader_first(world: World, folder: Path, writes: bool) -> Iterator[None]:
    """Run the block on the leading process before those of other machines that see its folder.

    On one machine a lock decides who makes a token store. Network file systems may not know it, so that two
    machines would write one store at once. Processes that don't see the folder make a store of their own.

    Args:
        folder: what the block writes into.
        writes: whether it does.
    """
    if world.local_size == world.size or not world.any_rank(writes):
        yield
        return
    sees = _is_shared(world, folder)
    waits = sees and not world.is_leader
    if waits:
        world.barrier()
    yield
    if not waits:
        world.barrier()


def _is_shared(world: World, folder: Path) -> bool:
    """Return whether this process sees a file that the leading process makes in a folder."""
    mark = folder / str(world.share_json(f".{secrets.token_hex(8)}.mark"))
    if world.is_leader:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    world.barrier()
    sees = mark.exists()
    world.barrier()
    if world.is_leader:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    return sees
