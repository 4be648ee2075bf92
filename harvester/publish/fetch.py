"""Download a publication into a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harvester.errors import ConfigError
from harvester.store.published import build
from harvester.system.objects.location import Location
from harvester.system.objects.publication import Publication
from harvester.system.objects.transfer import read_publication


def fetch(url: str, folder: Path, note: Callable[[str], None] = lambda _: None) -> Publication:
    """Download what was published at a URL into a new folder, which appears as a whole.

    Args:
        note: is called with a line for each file.

    Raises:
        ConfigError: something lies at `folder`. RemoteStoreError, StoreCorrupt, StoreError by cause.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError("is there already", place=str(folder), remedy="name a new folder")
    location = Location.open(url)
    publication = read_publication(location)
    assert publication is not None
    build(location, publication, folder, note, own=True)
    return publication
