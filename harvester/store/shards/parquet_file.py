"""Write, check and open one Parquet shard file.

Every page carries a checksum; the file's metadata names the lineage of every run whose answers it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from harvester.errors import StoreCorrupt, StoreError, StoreFormatError
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.sqlite import disk_error
from harvester.store.shards.schema import LINEAGE_KEY, SCHEMA, SCHEMA_VERSION, VERSION_KEY
from harvester.system.files import sha256_of
from harvester.terms.lineage import Lineage

SHARD_NAME = re.compile(r"part-(\d{8})-([0-9a-f]{16})\.parquet\Z")
ROWS_PER_GROUP = 2048
BYTES_PER_GROUP = 16 * 1024 * 1024
# Most rows of a shard, even below its target size: its keys are held in memory while it is written, and are
# inserted into the index in one transaction for which a run has to wait.
ROWS_PER_SHARD = 1 << 17

# Column with the key that a row had before it was adopted by an identity.
FORMER_KEY = "former_key"

# Runs that differ in any of these lineage fields never share a file.
APART = ("teacher_id", "host", "model", "terms_id", "permission_sha256", "purpose", "mock", "duties")

_DICTIONARY = [
    "messages.list.element.role",
    "outcome",
    "finish_reason",
    "tags.list.element",
    "source_file",
    "teacher_id",
    "endpoint",
    "request_model",
    "response_model",
    "system_fingerprint",
    "provider",
    "terms_id",
    "permission_sha256",
    "purpose",
    "usage_source",
    "run_id",
    "config_sha256",
    "tool_version",
]


def open_writer(sink: BinaryIO, lineages: Sequence[Lineage]) -> pq.ParquetWriter:
    """A writer of exactly the contract's schema; `lineages` are the runs whose rows will follow."""
    text = orjson.dumps([dict(lineage.stored) for lineage in lineages], option=orjson.OPT_SORT_KEYS)
    return pq.ParquetWriter(
        sink,
        SCHEMA.with_metadata({**(SCHEMA.metadata or {}), LINEAGE_KEY: text}),
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=_DICTIONARY,
    )


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard with verification of page checksums.

    Raises:
        StoreError: it is missing; StoreCorrupt: it is damaged; StoreFormatError: another release wrote it.
            All name the file.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            require_version(path, file)
            yield file
    except FileNotFoundError:
        raise StoreError(
            "is missing", place=str(path), remedy="`harvester verify` names what is lost"
        ) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StoreCorrupt(f"is damaged: {error}", place=str(path)) from error


def decode_all(name: str) -> int:
    """Decode every page of a file and return its rows; for a child process, as Arrow may end it.

    Raises:
        StoreCorrupt: it is damaged.
    """
    rows, path = 0, Path(name)
    with open_shard(path) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            table.validate(full=True)
            rows += table.num_rows
        if rows != file.metadata.num_rows:
            raise StoreCorrupt(f"{rows} rows, its footer says {file.metadata.num_rows}", place=str(path))
    return rows


def require_version(path: Path, file: pq.ParquetFile) -> None:
    """Do nothing for a shard of this schema version, or of none.

    Raises:
        StoreFormatError: it names another version than this program reads.
    """
    version = (file.schema_arrow.metadata or {}).get(VERSION_KEY, b"").decode("ascii", "replace")
    if version and version != str(SCHEMA_VERSION):
        is_number = version.isascii() and version.isdigit() and len(version) < 10
        newer = not is_number or int(version) > SCHEMA_VERSION
        raise StoreFormatError(
            f"columns of version {version[:20]}, this program reads {SCHEMA_VERSION}",
            place=str(path),
            remedy="install a newer release" if newer else "open it with the release that wrote it",
        )


def lineages_in(file: pq.ParquetFile) -> list[Lineage]:
    """Lineages in a shard's metadata, one for each run whose answers it holds.

    Raises:
        StoreCorrupt: what lies there is none.
    """
    try:
        loaded = orjson.loads((file.schema_arrow.metadata or {}).get(LINEAGE_KEY, b"[]"))
    except orjson.JSONDecodeError as error:
        raise StoreCorrupt(f"a shard's lineage can't be read: {error}") from None
    entries = loaded if isinstance(loaded, list) else [loaded]
    if not all(isinstance(entry, dict) for entry in entries):
        raise StoreCorrupt("a shard's lineage is no list of objects")
    return [Lineage(entry) for entry in entries]


def keys_of(file: pq.ParquetFile) -> list[bytes]:
    """The keys of a shard's rows, in order."""
    return [
        bytes.fromhex(text)
        for number in range(file.num_row_groups)
        for text in file.read_row_group(number, ["key"]).column("key").to_pylist()
    ]


def former_keys_of(file: pq.ParquetFile) -> list[bytes]:
    """The former keys of a shard's rows, in order; b"" for a row that was never adopted."""
    if FORMER_KEY not in file.schema_arrow.names:
        return [b""] * file.metadata.num_rows
    return [
        bytes.fromhex(text)
        for number in range(file.num_row_groups)
        for text in file.read_row_group(number, [FORMER_KEY]).column(FORMER_KEY).to_pylist()
    ]


def keys_in_index(
    keys: Sequence[bytes], former_keys: Sequence[bytes], known: Collection[bytes]
) -> list[bytes]:
    """Return the keys that an index with the keys `known` lists these rows under.

    That is the former key of a row that was adopted in its file and not yet in the index.
    """
    pairs = zip(keys, former_keys, strict=True)
    return [former if former and key not in known else key for key, former in pairs]


def lineage_digest(lineage: Lineage) -> str:
    """SHA-256 (64 hex digits) over the parts of a lineage that keep runs in separate files."""
    apart = {name: lineage.stored.get(name) for name in APART}
    return hashlib.sha256(orjson.dumps(apart, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read_back(path: Path, keys: Sequence[bytes]) -> Iterator[None]:
    """Decode every page of a file, one row group a step, and compare its keys with the expected ones.

    Raises:
        StoreCorrupt: they differ.
    """
    expected = iter(keys)
    rows = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            table.validate(full=True)
            rows += table.num_rows
            if any(key != next(expected, b"").hex() for key in table.column("key").to_pylist()):
                raise StoreCorrupt("reads back differently from what was written", place=str(path))
            yield
    if rows != len(keys):
        raise StoreCorrupt(f"{rows} rows read back, {len(keys)} written", place=str(path))


def check_written_file(
    hidden: Path, shard: int, keys: Sequence[bytes], lineage: str
) -> Generator[None, None, ShardEntry]:
    """Read a written file back; return its manifest entry, with a name that contains its hash.

    Raises:
        StoreCorrupt: it reads back differently.
    """
    yield from read_back(hidden, keys)
    digest, size = sha256_of(hidden), hidden.stat().st_size
    yield
    name = f"part-{shard:08d}-{digest[:16]}.parquet"
    return ShardEntry(shard, name, digest, len(keys), size, lineage, time.time())


@contextlib.contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Translate errors of the operating system and of pyarrow to `StoreError`."""
    try:
        yield
    except pa.ArrowMemoryError as error:
        raise StoreError(
            "memory ran out while a shard was written",
            place=str(folder),
            remedy="nothing is lost: free memory, then run again; [store] shard_mib sets the size of a shard",
        ) from error
    except pa.ArrowInvalid as error:
        raise StoreCorrupt(f"not what was written: {error}", place=str(folder)) from error
    except OSError as error:
        raise disk_error(error, folder) from error
