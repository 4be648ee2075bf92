"""The argument that names a store: its folder, or the configuration that names it."""

from __future__ import annotations

from pathlib import Path

import typer

from harvester.store import paths


def _folder(named: Path) -> Path:
    """A harvest.toml, or a folder that holds one and is no store itself, means the store it names."""
    toml = named if named.suffix == ".toml" else named / "harvest.toml"
    if not toml.is_file() or any((named / part).exists() for part in (paths.JOURNAL, paths.SHARDS)):
        return named
    from harvester.config import config

    return toml.parent / config.load(toml).store.path


STORE = typer.Argument(
    ..., help="The store's folder, or the harvest.toml that names it.", callback=_folder, show_default=False
)
