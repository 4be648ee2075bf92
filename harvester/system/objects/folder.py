"""Publish the files of a folder, such as an adapter, below one name that holds the hash of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from harvester.errors import ConfigError
from harvester.system.command_line.version import __version__
from harvester.system.files import sha256_of
from harvester.system.objects.location import Location
from harvester.system.objects.publication import Publication, PublishedObject
from harvester.system.objects.publisher import Published, PublishOptions, earlier_publication, publish
from harvester.system.objects.transfer import ObjectContent


def files_below(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Return the regular files of a folder by their path in it; hidden ones and links are left out.

    Args:
        prefix: stands before each path.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in parts):
            files[prefix + "/".join(parts)] = path
    return files


def publish_files(
    name: str,
    files: Mapping[str, Path],
    url: str,
    options: PublishOptions | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publish files; another version of them takes the place of this one in the manifest only.

    Args:
        name: of the folder that they make.
        files: by path.

    Raises:
        ConfigError: there are none, or something else was published there.
        FindingsError, UsageError, RemoteStoreError, StoreCorrupt: see `publisher.publish`.
    """
    location = Location.open(url)
    if not files:
        raise ConfigError(
            "there is no file to publish", place=name, remedy="make it first, then publish it again"
        )
    digest, hashed = hashlib.sha256(), {path: sha256_of(file) for path, file in files.items()}
    for path, sha256 in hashed.items():
        digest.update(f"{sha256}  {path}\n".encode())
    version = f"versions/{digest.hexdigest()[:16]}"
    sources = [
        ObjectContent(
            PublishedObject(
                name=f"{version}/{path}", path=path, sha256=hashed[path], size_bytes=file.stat().st_size
            ),
            file,
        )
        for path, file in files.items()
    ]
    publication = Publication(
        kind="folder",
        name=name,
        tool_version=__version__,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source_sha256=digest.hexdigest(),
        files=tuple(source.object for source in sources),
    )
    options = options or PublishOptions()
    before = earlier_publication(location, options)
    return publish(location, publication, sources, before, options, note)
