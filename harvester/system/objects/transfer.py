"""Write, verify and read single objects.

An object is verified by reading it back and computing its SHA-256. The checksums of servers differ (an ETag
is an MD5, or none, by how it was uploaded), and the filesystems of the libraries show none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from harvester.errors import RemoteStoreError, StoreCorrupt
from harvester.system.failpoints import reach
from harvester.system.files import sha256_of
from harvester.system.objects.location import Location, translating
from harvester.system.objects.publication import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    UPLOADED_AGAIN,
    Publication,
    PublishedObject,
    parse_publication,
    torn,
)

_CHUNK = 8 * 1024 * 1024
# How often an object is uploaded before it counts as one that can't be.
_TRIES = 2

# Readings of a manifest, at most, until two in a row are equal.
MANIFEST_READS = 10


@dataclass(frozen=True, slots=True)
class Seen:
    """What a listing says of an object: size, and when it was written, in nanoseconds."""

    size_bytes: int
    written_ns: int


@dataclass(frozen=True, slots=True)
class ObjectContent:
    """The content of an object to be: a file, or bytes made for the publication."""

    object: PublishedObject
    file: Path | None = None
    content: bytes = b""

    def chunks(self) -> Iterator[bytes]:
        """Yield the content in parts of limited size."""
        if self.file is None:
            yield self.content
            return
        with self.file.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def require_unchanged(self) -> None:
        """Do nothing when the file is still what the manifest will say.

        Raises:
            StoreCorrupt: its bytes changed.
        """
        if self.file is not None and sha256_of(self.file) != self.object.sha256:
            raise StoreCorrupt(
                "its bytes are not those that were to be published",
                place=str(self.file),
                remedy="`harvester verify STORE` names what is damaged; nothing names this object yet",
            )


def listing(location: Location) -> dict[str, Seen]:
    """Return what lies under a location, by name.

    Raises:
        RemoteStoreError: no such bucket, or no right to list it.
    """
    selector = pafs.FileSelector(location.prefix, recursive=True, allow_not_found=True)
    with translating(location.url):
        infos = location.filesystem.get_file_info(selector)
        if not infos:  # an absent bucket looks like an empty one
            _require_bucket(location)
    begin = len(location.prefix) + 1
    return {
        info.path[begin:]: Seen(info.size or 0, info.mtime_ns or 0)
        for info in infos
        if info.type == pafs.FileType.File
    }


def _require_bucket(location: Location) -> None:
    bucket = location.prefix.split("/", 1)[0]
    if location.is_local or location.url.startswith("hf:"):
        return
    if location.filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise RemoteStoreError(
            "there is no such bucket, or the credentials may not see it",
            place=location.url,
            remedy="make the bucket first (none is made here), or check the credentials in the environment",
        )


def sha256_there(location: Location, name: str) -> tuple[str, int]:
    """Read an object and return its SHA-256 and size.

    Raises:
        RemoteStoreError: it is not there, or can't be read.
    """
    digest, size = hashlib.sha256(), 0
    for chunk in _read(location, name):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def upload(location: Location, source: ObjectContent) -> Seen:
    """Write an object and verify it by reading it back.

    Raises:
        RemoteStoreError: it can't be written, or what was read back is something else.
        StoreCorrupt: the file is not what the manifest will say.
    """
    published = source.object
    source.require_unchanged()
    for _ in range(_TRIES):
        _write(location, published.name, source.chunks())
        reach("publish.after_upload")
        if sha256_there(location, published.name) == (published.sha256, published.size_bytes):
            with translating(location.url):
                info = location.filesystem.get_file_info(location.path(published.name))
            return Seen(info.size or 0, info.mtime_ns or 0)
    raise RemoteStoreError(
        f"what was read back of {published.name} is not what was written, {_TRIES} times",
        place=location.url,
        remedy="the manifest does not name it; check the storage and publish again",
    )


def _write(location: Location, name: str, chunks: Iterator[bytes], *, must_be_new: bool = False) -> None:
    path = location.path(name)
    with translating(f"{location.url}/{name}"):
        if location.is_local:
            try:
                _write_file(Path(path), chunks, must_be_new=must_be_new)
            except FileNotFoundError:  # no folder can be made there, as below /proc
                raise RemoteStoreError(
                    "the place can't be written: no folder can be made there",
                    place=location.url,
                    remedy="name a folder in which you may write",
                ) from None
            return
        with location.filesystem.open_output_stream(path) as stream:
            for chunk in chunks:
                stream.write(chunk)
                reach("publish.amid_upload")


def _write_file(path: Path, chunks: Iterator[bytes], *, must_be_new: bool = False) -> None:
    """Write a file under a hidden name and rename it: object storage shows no half objects either.

    Args:
        must_be_new: leave a file that is there already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with hidden.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            reach("publish.amid_upload")
    if must_be_new:
        # Without hard links on that file system it is renamed all the same.
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(hidden)
            hidden.unlink()
            return
    hidden.replace(path)


def _read(location: Location, name: str) -> Iterator[bytes]:
    with (
        translating(f"{location.url}/{name}"),
        location.filesystem.open_input_stream(location.path(name)) as stream,
    ):
        while chunk := stream.read(_CHUNK):
            yield chunk


def download(location: Location, published: PublishedObject, file: Any) -> None:
    """Write an object into an open file, and verify it on the way.

    Raises:
        RemoteStoreError: it is not there, or can't be read. StoreCorrupt: it is not what was published.
    """
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in _read(location, published.name):
            size += len(chunk)
            if size > published.size_bytes:
                break
            digest.update(chunk)
            file.write(chunk)
    except RemoteStoreError as error:
        if isinstance(error.__context__, FileNotFoundError):
            raise torn(published.name, location.url) from None
        raise
    if (digest.hexdigest(), size) != (published.sha256, published.size_bytes):
        raise StoreCorrupt(
            "the object is not what was published: another SHA-256 or size",
            place=f"{location.url}/{published.name}",
            remedy=UPLOADED_AGAIN,
        )


def read_publication(location: Location, *, absent_is_none: bool = False) -> Publication | None:
    """Read the manifest at a location.

    Args:
        absent_is_none: return None where there is none.

    Raises:
        RemoteStoreError: there is none, or it can't be read. StoreCorrupt, StoreFormatError by cause.
    """
    place = f"{location.url}/{MANIFEST_NAME}"
    with translating(place):
        info = location.filesystem.get_file_info(location.path(MANIFEST_NAME))
    if info.type == pafs.FileType.NotFound:
        if absent_is_none:
            return None
        with translating(location.url):
            _require_bucket(location)
        raise RemoteStoreError(
            "nothing was published here: there is no publication.json",
            place=location.url,
            remedy="name the URL that `harvester publish STORE URL` was given; before its manifest is "
            "written, a publication is not there",
        )
    content = _manifest_bytes(location, place)
    for _ in range(MANIFEST_READS):
        # One that is replaced while it is read may be a mixture of both.
        previous, content = content, _manifest_bytes(location, place)
        if content == previous:
            return parse_publication(content, place)
    raise RemoteStoreError(
        f"the manifest was replaced while it was read, {MANIFEST_READS} times",
        place=place,
        remedy="try again when the publications there have ended",
    )


def _manifest_bytes(location: Location, place: str) -> bytes:
    content = bytearray()
    for chunk in _read(location, MANIFEST_NAME):
        content += chunk
        if len(content) > MAX_MANIFEST_BYTES:
            raise StoreCorrupt("the manifest is too large", place=place)
    return bytes(content)


def write_publication(
    location: Location,
    publication: Publication,
    require_ours: Callable[[Publication], None],
    *,
    is_first: bool,
) -> None:
    """Write the manifest and read it back.

    Args:
        require_ours: is called with the manifest that is read back where it is another one, and raises
            where that is not of the same store: another publication wrote it at the same time.
        is_first: no manifest is there. In a folder, one that appears is not replaced before it was compared;
            object storage has no such write here.

    Raises:
        RemoteStoreError: it can't be written, or is not what was written.
    """
    content = publication.to_bytes()
    written = (hashlib.sha256(content).hexdigest(), len(content))
    for number in range(_TRIES):
        _write(location, MANIFEST_NAME, iter((content,)), must_be_new=is_first and number == 0)
        reach("publish.after_upload")
        if sha256_there(location, MANIFEST_NAME) == written:
            return
        with contextlib.suppress(StoreCorrupt):
            there = read_publication(location, absent_is_none=True)
            if there is not None:
                require_ours(there)
    raise RemoteStoreError(
        f"what was read back of {MANIFEST_NAME} is not what was written, {_TRIES} times",
        place=location.url,
        remedy="another publication may be writing there, or the storage is at fault; publish again",
    )
