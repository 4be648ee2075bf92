"""Bring a store's new shards to its mirror: what `[store] mirror` does after each seal, in its own process.

The terms of the rows were checked when they were sealed; those of the runs are checked again. The report
needs all rows, so it is that of the last `harvester publish`.
"""

from __future__ import annotations

from pathlib import Path

from harvester.errors import ConfigError
from harvester.publish.store import REPORT_NAME, documents_without_report, publish_snapshot, take_snapshot
from harvester.publish.terms import require_publishable
from harvester.store.reader import Corpus
from harvester.system.command_line.shell_words import shell_word
from harvester.system.objects.location import Location
from harvester.system.objects.publisher import PublishOptions
from harvester.system.objects.transfer import ObjectContent, read_publication
from harvester.system.objects.url import require_elsewhere


def mirror_store(store: Path, url: str) -> tuple[str, ...]:
    """Publish the sealed answers of a store as they are now; return the names of its shards.

    Shards may be merged meanwhile: then it fails for want of a file, and the next try has the new ones.

    Raises:
        TermsRefused, FindingsError, RemoteStoreError, StoreError: as `publish_store`.
    """
    require_elsewhere(store, url)
    location = Location.open(url)
    snapshot = take_snapshot(store, Corpus.open(store))
    places = (store.resolve().parent,)
    require_publishable(snapshot.lineages, (), *places, use="keep")
    before = read_publication(location, absent_is_none=True)
    documents = documents_without_report(store, snapshot, places)
    if before is not None:
        documents += [ObjectContent(file) for file in before.files if file.path == REPORT_NAME]
    try:
        publish_snapshot(location, store, snapshot, documents, before, PublishOptions(workers=1))
    except ConfigError as error:
        error.remedy = (
            "name another URL in [store] mirror, or give this one to this store by "
            f"`harvester publish {shell_word(store)} URL --replace`; the objects there stay"
        )
        raise
    return tuple(Path(shard.path).name for shard in snapshot.shards)
