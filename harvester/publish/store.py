"""Publish a store, or a corpus without a journal: sealed shards, runs, asks, documents and report."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from harvester.errors import ConfigError
from harvester.export.cards.curation import CURATION_NAME
from harvester.export.cards.facts import ShardFacts
from harvester.export.decontaminate import HITS_NAME
from harvester.observe.report.report import write_report
from harvester.publish.documents import write_papers
from harvester.publish.terms import require_publishable
from harvester.store import paths
from harvester.store.journal.checksums import checked_rows
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import micros
from harvester.store.reader import Corpus
from harvester.store.shards.manifest import manifest_rows
from harvester.store.shards.parquet_file import lineage_digest
from harvester.store.shards.swap import hold_for_reading, locate
from harvester.system.command_line.shell_words import shell_word
from harvester.system.command_line.version import __version__
from harvester.system.counted import counted
from harvester.system.files import sha256_of
from harvester.system.objects.location import Location
from harvester.system.objects.publication import Publication, PublishedObject, PublishedRun, PublishedShard
from harvester.system.objects.publisher import Published, PublishOptions, earlier_publication, publish
from harvester.system.objects.transfer import ObjectContent
from harvester.system.objects.url import require_elsewhere
from harvester.terms.lineage import FACT_COLUMNS, Lineage

REPORT_NAME = "report.html"
_PAPERS = "papers"
# What a published run keeps of its configuration: what tells how rows were chosen. The rest names hosts,
# folders and files of this machine.
_KEPT_CONFIG: Mapping[str, tuple[str, ...]] = {
    "run": ("epoch", "purpose"),
    "prompts": ("dedupe",),
    "decontaminate": ("sets",),
}


@dataclass(frozen=True, slots=True)
class StoreSnapshot:
    """What of a store is published, as of one moment.

    Attributes:
        lineages: of the runs that have rows in shards.
        asks: the prompts that share an answer, one JSON object a line.
        unsealed: answers that are not in a shard yet, and are not published.
    """

    kind: str
    folder: Path
    shards: tuple[PublishedShard, ...]
    runs: tuple[PublishedRun, ...] = ()
    lineages: tuple[Lineage, ...] = ()
    asks: bytes = b""
    files: Mapping[str, bytes] | None = None
    unsealed: int = 0

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)


def publish_store(
    store: Path,
    url: str,
    options: PublishOptions | None = None,
    *,
    beside: Sequence[Path] = (),
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Published, StoreSnapshot]:
    """Publish the sealed answers of a store, or a corpus, with its documents and its report.

    Args:
        beside: folders with own terms records, besides those found from the store.
        note: is called with a line for each object that was uploaded.

    Raises:
        TermsRefused: exit 77; nothing was sent. UsageError: the URL can't be used.
        FindingsError: exit 1; published objects are missing or changed there.
        RemoteStoreError: the storage can't be reached, or refuses. StoreError, StoreCorrupt: of the store.
    """
    require_elsewhere(store, url)
    location = Location.open(url)
    corpus = Corpus.open(store)
    places = (store.resolve().parent, *beside)
    with hold_for_reading(corpus.folder):
        snapshot = take_snapshot(store, corpus)
        if snapshot.unsealed and not snapshot.shards:
            raise ConfigError(
                f"no answer is in a shard yet: {counted(snapshot.unsealed, 'answer')} only in the journal",
                place=str(store),
                remedy=f"`harvester seal {shell_word(store)}`, then publish again",
            )
        require_publishable(snapshot.lineages, _facts(corpus, snapshot), *places, use="keep")
        options = options or PublishOptions()
        before = earlier_publication(location, options)
        with _documents(store, snapshot, places, before, options) as documents:
            return publish_snapshot(location, store, snapshot, documents, before, options, note), snapshot


def publish_snapshot(  # noqa: PLR0913 - what is published, where, and how
    location: Location,
    store: Path,
    snapshot: StoreSnapshot,
    documents: Sequence[ObjectContent],
    before: Publication | None,
    options: PublishOptions,
    note: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publish what a snapshot holds, with documents; see `publish_store`."""
    sources = [
        ObjectContent(shard, locate(snapshot.folder, Path(shard.path).name)) for shard in snapshot.shards
    ]
    asks = _object("asks", "asks.jsonl", snapshot.asks) if snapshot.asks else None
    if asks is not None:
        sources.append(asks)
    sources += documents
    publication = Publication(
        kind="store" if snapshot.kind == "store" else "corpus",
        name=_name_of(store),
        tool_version=__version__,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source_sha256=source_sha256(snapshot),
        shards=snapshot.shards,
        runs=snapshot.runs,
        asks=None if asks is None else asks.object,
        files=tuple(source.object for source in documents),
    )
    here = [source for source in sources if source.file is not None or source.content]
    return publish(location, publication, here, before, options, note)


def take_snapshot(store: Path, corpus: Corpus) -> StoreSnapshot:
    """Read what of a store is to be published.

    Raises:
        StoreError, StoreCorrupt: the store can't be read.
    """
    if not (store / paths.JOURNAL).exists():
        files = {}
        for name in (CURATION_NAME, HITS_NAME):
            with contextlib.suppress(FileNotFoundError):
                files[name] = (store / name).read_bytes()
        entries = [_hashed(corpus.folder, entry) for entry in corpus.manifest]
        return StoreSnapshot(
            "corpus", corpus.folder, tuple(entries), lineages=tuple(corpus.lineages()), files=files
        )
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        connection.execute("BEGIN")
        runs = checked_rows(connection, "runs", store)
        asks = checked_rows(connection, "asks", store, "key IN (SELECT key FROM keys) ORDER BY id")
        (unsealed,) = connection.execute("SELECT count(*) FROM answers").fetchone()
        shards = tuple(_published(entry) for entry in manifest_rows(connection))
        connection.execute("COMMIT")
    lineages = [Lineage.from_json(row["lineage_json"]) for row in runs]
    digests = {shard.lineage_digest for shard in shards}
    return StoreSnapshot(
        "store",
        corpus.folder,
        shards,
        tuple(_run(row) for row in runs),
        tuple(lineage for lineage in lineages if lineage_digest(lineage) in digests),
        b"".join(_ask_line(row) for row in asks),
        unsealed=int(unsealed),
    )


def _facts(corpus: Corpus, snapshot: StoreSnapshot) -> list[Mapping[str, Any]]:
    """Return what the rows say of themselves, but for runs of which no row is in a shard."""
    if not snapshot.shards:
        return []
    sealed = {lineage.run_id for lineage in snapshot.lineages}
    unsealed = {run.run_id for run in snapshot.runs} - sealed
    return [fact for fact in corpus.distinct(FACT_COLUMNS) if fact["run_id"] not in unsealed]


def source_sha256(snapshot: StoreSnapshot) -> str:
    """Return the digest of all that was not generated for the publication."""
    digest = hashlib.sha256()
    digest.update(orjson.dumps([shard.model_dump() for shard in snapshot.shards]))
    digest.update(orjson.dumps([run.model_dump() for run in snapshot.runs]))
    digest.update(snapshot.asks)
    for name, content in sorted((snapshot.files or {}).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _documents(
    store: Path,
    snapshot: StoreSnapshot,
    places: Sequence[Path],
    before: Publication | None,
    options: PublishOptions,
) -> Iterator[list[ObjectContent]]:
    """Give the documents: those that are there already if the rows are the same, else new ones."""
    is_same = before is not None and before.source_sha256 == source_sha256(snapshot)
    has_report = is_same and before is not None and any(file.path == REPORT_NAME for file in before.files)
    if before is not None and is_same and (has_report or snapshot.kind != "store") and not options.repair:
        yield [ObjectContent(file) for file in before.files]
        return
    sources = documents_without_report(store, snapshot, places)
    with tempfile.TemporaryDirectory(prefix="harvester-publish-") as folder:
        if snapshot.kind == "store":
            content = write_report(store, Path(folder) / REPORT_NAME).read_bytes()
            sources.append(_object(_PAPERS, REPORT_NAME, content))
        yield sources


def documents_without_report(
    store: Path, snapshot: StoreSnapshot, places: Sequence[Path]
) -> list[ObjectContent]:
    """Return card, NOTICE, terms records, and the record of a curation."""
    shards = [ShardFacts(each.name, each.sha256, each.rows, each.size_bytes) for each in snapshot.shards]
    papers = write_papers(store, _name_of(store), shards, snapshot.lineages, *places)
    return [
        *(_object(_PAPERS, f"{_PAPERS}/{name}", content) for name, content in papers.items()),
        *(_object(_PAPERS, name, content) for name, content in (snapshot.files or {}).items()),
    ]


def _object(folder: str, path: str, content: bytes) -> ObjectContent:
    """Return an object whose name holds the hash of its content."""
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"{folder}/{sha256[:16]}-{path.rsplit('/', 1)[-1]}"
    return ObjectContent(
        PublishedObject(name=name, path=path, sha256=sha256, size_bytes=len(content)), None, content
    )


def _published(entry: ShardEntry) -> PublishedShard:
    return PublishedShard(
        name=f"{paths.SHARDS}/{entry.name}",
        path=f"{paths.SHARDS}/{entry.name}",
        sha256=entry.sha256,
        size_bytes=entry.size_bytes,
        shard=entry.shard,
        rows=entry.rows,
        lineage_digest=entry.lineage_digest,
        sealed_us=micros(entry.sealed_at),
    )


def _hashed(folder: Path, entry: ShardEntry) -> PublishedShard:
    """Return a file that no manifest names; where its name does not hold its hash, the object's does."""
    sha256 = sha256_of(folder / entry.name)
    shard = _published(replace(entry, sha256=sha256))
    if sha256[:16] in entry.name:
        return shard
    return shard.model_copy(update={"name": f"{paths.SHARDS}/{sha256[:16]}-{entry.name}"})


def _run(row: Mapping[str, Any]) -> PublishedRun:
    config = orjson.loads(row["config_json"])
    kept = {
        section: {name: config[section][name] for name in names if name in config[section]}
        for section, names in _KEPT_CONFIG.items()
        if isinstance(config.get(section), dict)
    }
    values = {name: row[name] for name in PublishedRun.model_fields if name != "config_json"}
    return PublishedRun(**values, config_json=orjson.dumps(kept).decode())


def _ask_line(row: Mapping[str, Any]) -> bytes:
    values = {
        "key": row["key"].hex(),
        "asker": row["asker"].hex(),
        "sample_index": row["sample_index"],
        "prompt_json": row["prompt_json"],
    }
    return orjson.dumps(values) + b"\n"


def _name_of(store: Path) -> str:
    """Return the name of a store; one that is called `store` is named by the folder around it."""
    path = store.resolve()
    return path.parent.name if path.name in {"store", "shards"} and path.parent.name else path.name
