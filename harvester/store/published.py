"""Read a published store: as a local store of the same format, in the user's cache.

Shards are downloaded, not streamed: a shard counts only when the SHA-256 of the whole file is that of the
manifest, a trainer reads each many times, and all that reads a store then reads this one. What is downloaded
lies in the cache by its SHA-256 and is linked into the store's folder; its journal holds the published
manifest, runs and asks. A folder is never changed: a later publication is another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson

from harvester.api.max_tokens import max_tokens_of
from harvester.errors import ConfigError, StoreCorrupt, StoreError
from harvester.store import paths
from harvester.store.journal import sqlite
from harvester.store.journal.copies import insert_row
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.sqlite import OUTCOME_CODES
from harvester.store.shards.manifest import UNKNOWN_ASKER, insert_missing_keys, insert_new_entry
from harvester.store.shards.parquet_file import open_shard
from harvester.store.shards.proved import require_proved
from harvester.system import own_files
from harvester.system.files import fsync_tree, sha256_of
from harvester.system.objects.cache import cache_folder, fetched, forget, refused
from harvester.system.objects.location import Location
from harvester.system.objects.publication import (
    MANIFEST_NAME,
    Publication,
    PublishedObject,
    PublishedShard,
    damaged_manifest,
)
from harvester.system.objects.transfer import read_publication
from harvester.system.objects.url import require_path_or_url, url_in

_WORKERS = 4
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


def local_store(store: str | os.PathLike[str]) -> Path:
    """Return the folder of a store: the path itself, or for a URL a verified copy in the cache.

    Raises:
        RemoteStoreError: nothing was published there, it is torn, or the storage refuses.
        StoreCorrupt, StoreFormatError: an object or the manifest is not what was published.
        UsageError: the URL can't be used. StoreError: the cache can't be written.
    """
    require_path_or_url(os.fspath(store))
    url = url_in(store)
    return _newest(url) if url else Path(store)


def is_copy(store: Path) -> bool:
    """Whether a folder is the copy of a published store, into which nothing is written."""
    return store.is_relative_to(cache_folder())


def _newest(url: str) -> Path:
    location = Location.open(url)
    publication = read_publication(location)
    assert publication is not None
    if publication.kind == "folder":
        raise ConfigError(
            f"holds the folder {publication.name!r}, which is no store",
            place=location.url,
            remedy="name the URL of a store or corpus; `harvester fetch URL FOLDER` downloads a folder",
        )
    content = hashlib.sha256(publication.model_copy(update={"made_at": "", "tool_version": ""}).to_bytes())
    name = _UNFIT.sub("-", publication.name).strip(".-") or "store"
    final = cache_folder() / "stores" / f"{name[:80]}-{content.hexdigest()[:16]}" / "store"
    if final.is_dir() and publication.kind == "store" and not _is_proved(final):
        _move_away(final)
    if final.is_dir():
        for shard in publication.shards:
            _require_whole(location, final, shard)
    else:
        build(location, publication, final)
        _prove(final)
    return final


def _proof_of(store: Path) -> Path:
    """Return the file beside a store of the cache that holds the SHA-256 of its journal."""
    return store.with_name(f"{store.name}.journal.sha256")


def _prove(store: Path) -> None:
    """Write down the SHA-256 of the journal that was just made."""
    with contextlib.suppress(FileNotFoundError):  # a corpus has none
        digest = sha256_of(store / paths.JOURNAL)
        with own_files.replacing(_proof_of(store)) as file:
            file.write(digest.encode() + b"\n")


def _is_proved(store: Path) -> bool:
    """Whether the journal of a store of the cache has the bytes that it was made with."""
    try:
        return _proof_of(store).read_text("ascii").strip() == sha256_of(store / paths.JOURNAL)
    except (OSError, ValueError):
        return False


def _move_away(store: Path) -> None:
    """Remove a store of the cache, so that it is made again of the objects that were downloaded.

    Raises:
        StoreError: the cache can't be written.
    """
    try:
        trash = Path(tempfile.mkdtemp(prefix=f".{store.name}.", dir=store.parent))
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            store.rename(trash / store.name)
    except OSError as error:
        raise StoreError(
            f"a damaged copy can't be replaced: {error.strerror or error}",
            place=str(store),
            remedy="delete this folder of the cache; it is made again",
        ) from None
    shutil.rmtree(trash, ignore_errors=True)


def _require_whole(location: Location, store: Path, shard: PublishedShard) -> None:
    """Replace a shard of the cache that is gone or whose bytes have changed on disk."""
    path = store / shard.path
    try:
        if path.is_file():
            require_proved(path, shard.sha256, shard.size_bytes)
            return
    except StoreCorrupt:
        forget(shard)
        path.unlink(missing_ok=True)
    _link(fetched(location, shard), path)


def build(
    location: Location,
    publication: Publication,
    final: Path,
    note: Callable[[str], None] = lambda _: None,
    *,
    own: bool = False,
) -> None:
    """Download a publication and make its folder, which appears as a whole.

    Args:
        note: is called with a line for each object.
        own: make copies instead of links into the cache: for a folder that its owner may change.

    Raises:
        RemoteStoreError, StoreCorrupt, StoreError: see `local_store`.
    """
    try:
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise refused(error, "the folder can't be made", final.parent) from None
    try:
        _fill(location, publication, hidden, note, own=own)
        fsync_tree(hidden)
        try:
            hidden.rename(final)
        except OSError:
            if not final.is_dir():  # another process made the same one
                raise
    except OSError as error:
        raise refused(error, "the folder can't be written", final) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _fill(
    location: Location, publication: Publication, folder: Path, note: Callable[[str], None], *, own: bool
) -> None:
    def place(published: PublishedObject, path: Path) -> None:
        is_shard = isinstance(published, PublishedShard)  # which is proved below
        source = fetched(location, published, verify=not is_shard)
        if own:
            shutil.copyfile(source, path)
        else:
            _link(source, path)

    def bring(published: PublishedObject) -> None:
        path = folder / published.path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place(published, path)
        if isinstance(published, PublishedShard):
            try:
                require_proved(path, published.sha256, published.size_bytes)
            except StoreCorrupt:  # the cache has changed on disk
                forget(published)
                path.unlink(missing_ok=True)
                place(published, path)
            _require_rows(location, published, path)
        note(f"fetched {published.path} ({published.size_bytes:,} bytes)")

    with ThreadPoolExecutor(_WORKERS, "fetch") as pool:
        list(pool.map(bring, (*publication.shards, *publication.files)))
    if publication.kind == "store":
        (folder / paths.SHARDS).mkdir(mode=0o700, exist_ok=True)
        asks = b""
        if publication.asks is not None:
            asks = fetched(location, publication.asks, verify=True).read_bytes()
        try:
            sqlite.create(
                folder, lambda connection: _enter(connection, publication, asks.splitlines(), folder)
            )
        except (sqlite3.IntegrityError, ValueError, KeyError, TypeError) as error:
            raise _damaged(location, str(error)) from None


def _require_rows(location: Location, shard: PublishedShard, path: Path) -> None:
    """Compare the rows of a shard with what the manifest says of it."""
    with open_shard(path) as file:
        rows = file.metadata.num_rows
    if rows != shard.rows:
        raise _damaged(location, f"it says that {shard.name} has {shard.rows:,} rows; it has {rows:,}")


def _damaged(location: Location, what: str) -> StoreCorrupt:
    return damaged_manifest(what, f"{location.url}/{MANIFEST_NAME}")


def _enter(
    connection: sqlite3.Connection, publication: Publication, asks: Iterable[bytes], folder: Path
) -> None:
    """Write manifest, key index, runs and asks into a new journal.

    Without the index, a run in this folder would pay for every answer again.
    """
    for run in publication.runs:
        insert_row(connection, "runs", run.model_dump())
    for shard in publication.shards:
        name = shard.path.rsplit("/", 1)[-1]
        facts = (shard.sha256, shard.rows, shard.size_bytes, shard.lineage_digest, shard.sealed_us / 1e6)
        insert_new_entry(connection, ShardEntry(shard.shard, name, *facts))
        insert_missing_keys(connection, shard.shard, _keys_of(folder / shard.path))
    for line in asks:
        ask = orjson.loads(line)
        values = {name: bytes.fromhex(ask[name]) for name in ("key", "asker")}
        insert_row(connection, "asks", {**ask, **values})


def _keys_of(path: Path) -> Iterator[tuple[bytes, int, int | None, bytes]]:
    """Yield the index rows of a shard."""
    with open_shard(path) as file:
        for batch in file.iter_batches(columns=["key", "outcome", "request_json"]):
            for row in batch.to_pylist():
                try:
                    most = max_tokens_of(orjson.loads(row["request_json"]))
                    yield bytes.fromhex(row["key"]), OUTCOME_CODES[row["outcome"]], most, UNKNOWN_ASKER
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise StoreCorrupt(f"has a row that can't be read: {error!r}", place=path.name) from None


def _link(source: Path, path: Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links.

    Raises:
        OSError: the disk refuses.
    """
    try:
        path.hardlink_to(source)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, path)
