"""Load filters that users write: `module:function` beside curate.toml, or an installed entry point.

The function takes a `harvester.Sample` and returns None to keep the row or a `harvester.Drop(reason,
detail)`. It runs in this process, with the rights of the operator.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError
from harvester.export.drops import Drop, Filter
from harvester.store.shards.schema import Sample

# Group of entry points whose names curate.toml may use like those of built-in filters.
GROUP = "harvester.filters"


def load(name: str, folder: Path) -> Filter:
    """Return the filter of `module:function`; modules in `folder` are found.

    Raises:
        ConfigError: it can't be imported, or is no function.
    """
    module, _, function = name.partition(":")
    try:
        with _importing_from(folder):
            found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything
        raise ConfigError(
            f"the filter {name} can't be imported ({type(error).__name__}: {error})",
            remedy="name module:function; modules beside the configuration file are found",
        ) from None
    if not callable(found):
        raise ConfigError(
            f"the filter {name} is no function",
            remedy='{python = "my_filters:short"} names the function short in my_filters.py',
        )
    return _checked(name, found)


def installed(name: str) -> Filter | None:
    """Return the filter that an installed package offers under this name; None if there is none."""
    for entry in entry_points(group=GROUP, name=name):
        return _checked(name, entry.load())
    return None


def _checked(name: str, function: Callable[[Sample], Any]) -> Filter:
    """Name the filter and the row where it raises or returns something else."""

    def check(sample: Sample) -> Drop | Sample | None:
        try:
            result = function(sample)
        except Exception as error:
            raise ConfigError(
                f"the filter {name} raised {type(error).__name__}: {error}",
                place=f"row {sample.key[:12]}",
                remedy="correct the function; a field of a sample may be None, such as completion",
            ) from error
        if result is not None and not isinstance(result, Drop | Sample):
            raise ConfigError(
                f"the filter {name} returned {type(result).__name__}",
                place=f"row {sample.key[:12]}",
                remedy="return None to keep the row, or harvester.Drop(reason)",
            )
        return result

    return check


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    path = str(folder.resolve())
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)
